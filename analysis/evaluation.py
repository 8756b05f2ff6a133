"""How well ablated models predict: means over predictions, and intervals of what ablation changed.

A sample (a text or an image) is the unit that was drawn at random, and one text has many
predictions. So every interval treats a mean over predictions as the ratio of two sums over samples
and linearises it (Cochran 1977, Sampling Techniques, section 6.4), with Student's t at S - 1
degrees of freedom for S samples. For images, with one prediction each, a difference has the
interval of the paired t-test. Differences are always paired: the same samples went through both
models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

__all__ = ["Interval", "SampleScores", "change", "excess", "means", "ratio"]

LEVEL = 0.95
"""Coverage of all intervals."""

_SUMS = ("n", "loss", "top1", "top10", "n_uncommon", "top1_uncommon", "top10_uncommon")


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval; bounds are None where one sample cannot give them.

    The value is NaN, and null in tables, where there is nothing to estimate it from.
    """

    value: float
    lower: float | None
    upper: float | None

    def columns(self, name: str) -> dict[str, float | None]:
        """As columns ``name``, ``name_lower`` and ``name_upper``."""
        value = None if math.isnan(self.value) else self.value
        return {name: value, f"{name}_lower": self.lower, f"{name}_upper": self.upper}


@dataclass(frozen=True, slots=True, eq=False)
class SampleScores:
    """How well each of S samples was predicted, as sums over its predictions."""

    samples: np.ndarray
    """(S,) indices of the samples inside their task."""
    labels: np.ndarray
    """(S,) indices of their classes; -1 without one."""
    sums: Mapping[str, np.ndarray]
    """(S,) float64: predictions ``n``, and sums over them of ``loss``, ``top1`` and ``top10``; of
    those of uncommon tokens ``n_uncommon``, ``top1_uncommon`` and ``top10_uncommon``."""

    @classmethod
    def of(
        cls,
        *,
        samples: np.ndarray,
        labels: np.ndarray,
        predictions: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        kept: Sequence[np.ndarray],
        uncommon: Sequence[np.ndarray],
    ) -> "SampleScores":
        """Add up the predictions of samples.

        Args:
            samples: (S,) indices of the samples.
            labels: (S,) their classes.
            predictions: (loss, top1, top10) of each sample's predictions.
            kept: which predictions count.
            uncommon: which of those are of uncommon tokens.
        """
        rows = []
        for (loss, top1, top10), counts, rare in zip(predictions, kept, uncommon, strict=True):
            rows.append(
                (
                    counts.sum(),
                    loss[counts].sum(dtype=np.float64),
                    top1[counts].sum(),
                    top10[counts].sum(),
                    rare.sum(),
                    top1[rare].sum(),
                    top10[rare].sum(),
                )
            )
        columns = np.array(rows, dtype=np.float64).reshape(-1, len(_SUMS)).T
        return cls(samples, labels, dict(zip(_SUMS, columns, strict=True)))

    @classmethod
    def join(cls, parts: Sequence["SampleScores"]) -> "SampleScores":
        """The samples of all parts, by index, so that scores of two models pair up."""
        samples = np.concatenate([part.samples for part in parts])
        order = np.argsort(samples, kind="stable")
        labels = np.concatenate([part.labels for part in parts])
        sums = {n: np.concatenate([part.sums[n] for part in parts])[order] for n in _SUMS}
        return cls(samples[order], labels[order], sums)

    def of_label(self, label: int) -> "SampleScores":
        """The samples of one class."""
        chosen = self.labels == label
        sums = {name: values[chosen] for name, values in self.sums.items()}
        return SampleScores(self.samples[chosen], self.labels[chosen], sums)

    def per(self, measure: str) -> np.ndarray:
        """(S,) predictions that a measure is a mean over."""
        return self.sums["n_uncommon" if measure.endswith("_uncommon") else "n"]


def means(scores: SampleScores) -> dict[str, float | int | None]:
    """Means over predictions; ``perplexity`` is exp(mean loss); None where there is none.

    Returns:
        n, loss, perplexity, top1, top10, n_uncommon, top1_uncommon and top10_uncommon.
    """
    found: dict[str, float | int | None] = {}
    for name, values in scores.sums.items():
        total = float(values.sum())
        if name.startswith("n"):
            found[name] = int(total)
            continue
        count = float(scores.per(name).sum())
        found[name] = total / count if count else None
        if name == "loss":
            found["perplexity"] = float(np.exp(total / count)) if count else None
    return found


def change(before: SampleScores, after: SampleScores, measure: str) -> Interval:
    """What a mean over predictions changed by, from one model to another.

    Args:
        before: of the first model.
        after: of the second one, on the same samples.
        measure: such as ``loss``.
    """
    return _mean(after.sums[measure] - before.sums[measure], before.per(measure))


def ratio(before: SampleScores, after: SampleScores, measure: str) -> Interval:
    """A mean over predictions of one model as a share of that of another, before; args as `change`.

    The interval is that of a ratio of two sums over the same samples.
    """
    return _mean(after.sums[measure], before.sums[measure])


def excess(
    selected: SampleScores, controls: Sequence[SampleScores], measure: str
) -> tuple[Interval, float | None]:
    """How much more a selection changes a mean over predictions than random controls do.

    Both the samples and the controls are drawn at random. The variance of the difference is that
    over samples, of the selection against the mean of the controls, plus that over controls,
    divided by their number, with Satterthwaite's degrees of freedom; what the two share is counted
    twice, so the interval is on the wide side.

    Args:
        selected: without the selection.
        controls: without each of at least two controls, on the same samples.
        measure: such as ``loss``.

    Returns:
        The difference, and the standard deviation over controls.
    """
    per = selected.per(measure)
    total = float(per.sum())
    sums = np.stack([control.sums[measure] for control in controls])
    differences = selected.sums[measure] - sums.mean(0)
    value = float(differences.sum()) / total
    if len(controls) < 2 or len(per) < 2:
        return Interval(value, None, None), None
    spread = float((sums.sum(1) / total).std(ddof=1))
    parts = [
        (_variance(differences - value * per, total), len(per) - 1),
        (spread**2 / len(controls), len(controls) - 1),
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Interval(value, value, value), spread
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(student.ppf((1 + LEVEL) / 2, freedom)) * variance**0.5
    return Interval(value, value - half, value + half), spread


def _mean(sums: np.ndarray, per: np.ndarray) -> Interval:
    """sum(sums) / sum(per), with the interval of a ratio of sums over samples."""
    total = float(per.sum())
    if total == 0:
        return Interval(math.nan, None, None)
    value = float(sums.sum()) / total
    if len(per) < 2:
        return Interval(value, None, None)
    error = _variance(sums - value * per, total) ** 0.5
    half = float(student.ppf((1 + LEVEL) / 2, len(per) - 1)) * error
    return Interval(value, value - half, value + half)


def _variance(residuals: np.ndarray, total: float) -> float:
    """Variance of a ratio of sums over samples, whose residuals sum to zero."""
    count = len(residuals)
    return float((residuals**2).sum()) * count / (count - 1) / total**2
