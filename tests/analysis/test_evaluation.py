"""Intervals cover what they estimate, and selectivity agrees with curves drawn by hand."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import ttest_rel

from analysis.evaluation import SampleScores, change, excess, means, ratio
from analysis.selectivity import selectivity


def scores(losses: list[np.ndarray], samples: np.ndarray | None = None) -> SampleScores:
    """Scores of samples whose predictions have these losses; below 1 they are right."""
    every = [np.ones(len(loss), dtype=bool) for loss in losses]
    return SampleScores.of(
        samples=np.arange(len(losses)) if samples is None else samples,
        labels=np.full(len(losses), -1),
        predictions=[(loss, loss < 1, loss < 2) for loss in losses],
        kept=every,
        uncommon=[counts & (np.arange(len(counts)) % 2 == 1) for counts in every],
    )


def test_means_are_over_predictions_and_parts_join_by_sample() -> None:
    random = np.random.default_rng(0)
    losses = [random.exponential(size=size) for size in (3, 7, 1, 12)]
    flat = np.concatenate(losses)
    rare = np.concatenate([loss[1::2] for loss in losses])
    found = means(scores(losses))
    assert found == {
        "n": 23,
        "loss": pytest.approx(flat.mean()),
        "perplexity": pytest.approx(np.exp(flat.mean())),
        "top1": (flat < 1).mean(),
        "top10": (flat < 2).mean(),
        "n_uncommon": len(rare),
        "top1_uncommon": (rare < 1).mean(),
        "top10_uncommon": (rare < 2).mean(),
    }
    parts = [scores([losses[n] for n in order], np.array(order)) for order in ([3, 0], [2, 1])]
    joined = SampleScores.join(parts)
    assert joined.samples.tolist() == [0, 1, 2, 3]
    assert np.array_equal(joined.sums["loss"], scores(losses).sums["loss"])
    assert means(scores([np.empty(0)]))["loss"] is None


def test_with_one_prediction_per_sample_the_interval_is_that_of_the_paired_t_test() -> None:
    random = np.random.default_rng(1)
    before, after = random.normal(size=(2, 30))
    found = change(scores(list(before[:, None])), scores(list(after[:, None])), "loss")
    expected = ttest_rel(after, before)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx((after - before).mean())
    assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high))
    alone = change(scores([before]), scores([after]), "loss")
    assert (alone.lower, alone.upper) == (None, None)


def _texts(random: np.random.Generator, shift: float) -> tuple[SampleScores, SampleScores]:
    """Samples of unequal length that have an effect of their own each; its mean is `shift`."""
    sizes = random.integers(1, 40, 25)
    own = random.normal(shift, 1, 25)
    before = [random.exponential(size=size) for size in sizes]
    after = [b + e + random.normal(0, 0.5, len(b)) for b, e in zip(before, own, strict=True)]
    return scores(before), scores(after)


def _change_covers(random: np.random.Generator) -> bool:
    found = change(*_texts(random, 0.3), "loss")
    return found.lower is not None and found.upper is not None and found.lower < 0.3 < found.upper


def _ratio_covers(random: np.random.Generator) -> bool:
    before = [random.exponential(2, size=size) for size in random.integers(1, 40, 25)]
    after = [b * f for b, f in zip(before, random.normal(0.8, 0.2, 25), strict=True)]
    found = ratio(scores(before), scores(after), "loss")
    return found.lower is not None and found.upper is not None and found.lower < 0.8 < found.upper


def _excess_covers(random: np.random.Generator) -> bool:
    _, selected = _texts(random, 0.5)
    per, seeds = selected.per("loss"), random.normal(0.2, 0.1, 4)
    controls = []
    for seed in seeds:
        noise = selected.sums["loss"] + per * (seed - 0.5 + random.normal(0, 0.3, len(per)))
        controls.append(
            SampleScores(selected.samples, selected.labels, {**selected.sums, "loss": noise})
        )
    found, spread = excess(selected, controls, "loss")
    assert spread is not None
    return found.lower is not None and found.upper is not None and found.lower < 0.3 < found.upper


@pytest.mark.parametrize(
    ("covers", "most"), [(_change_covers, 0.98), (_ratio_covers, 0.98), (_excess_covers, 1.0)]
)
def test_intervals_cover_what_they_estimate(
    covers: Callable[[np.random.Generator], bool], most: float
) -> None:
    # Of 400 draws, 95 % +- 4 standard deviations; unequal lengths cost a little.
    share = np.mean([covers(np.random.default_rng([2, draw])) for draw in range(400)])
    assert 0.90 <= share <= most


def test_selectivity_of_curves_drawn_by_hand() -> None:
    alike = selectivity([0.8, 0.4, 0.0], [0.6, 0.3, 0.0])
    assert alike == pytest.approx({"max_difference": 0, "area": 0, "area_ratio": 1})
    # Forget is gone before retain drops, which then drops to nothing.
    perfect = selectivity([0.8, 0.0, 0.0], [0.6, 0.6, 0.0])
    assert perfect == pytest.approx({"max_difference": 100, "area": 1, "area_ratio": 2})
    reverse = selectivity([0.8, 0.8, 0.0], [0.6, 0.0, 0.0])
    assert reverse == pytest.approx({"max_difference": 0, "area": -1, "area_ratio": 0})
    assert set(selectivity([0.0, 0.0], [0.5, 0.5]).values()) == {None}
