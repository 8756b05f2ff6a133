"""What a run keeps, what each thing takes on disk, and what is kept within a budget of bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor, log10, sqrt

from ray_app.capture.shards import PlannedShard
from ray_app.facts import ModelFacts
from ray_app.placement import PlanError, num_pairs
from ray_app.study import CaptureSettings, ValuesSettings

__all__ = ["Kept", "Work", "kept_things", "within_budget"]

# Bytes on disk after zstd: what to expect, measured on SmolLM2 and rounded up by a fifth, and the
# most, which random numbers reach.
_STATS = 60, 82
_TOP = 7, 12.5
"""Of each activation kept as one of the highest or lowest, with its sample and position."""
_POOLED = 4, 4.2
_PAIR = 12, 12.5
_VALUE = {"float32": (4.0, 4.1), "float16": (2.0, 2.2), "int8": (0.8, 1.1)}
_ROW = 4, 24
"""Of each row of table values: its neuron, number of values, scale and bound."""
_PLACE = 3, 9
"""Of each position whose values are kept: its sample and position."""
_TOKEN = 20, 60
"""Of each token: its rows in samples and tokens; the most is that of rare and long tokens."""
_FILE = 5_000, 12_000
"""Of each file: names of columns, bounds of row groups, checksums in the commit record."""

_LEAST_SHARE = 0.001
"""Fewer positions than this say nothing of a task."""
_SPREADS = 6
"""Standard deviations by which more positions may be drawn than expected."""

Bytes = tuple[float, float]
"""What to expect, and the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a run computes, as far as it decides how much is written."""

    model: ModelFacts
    """The model."""
    shards: Sequence[PlannedShard]
    """All shards."""
    num_image_bytes: int
    """Bytes of all images, which are kept as they are."""
    num_stages: int
    """Stages of a pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """One thing that a run keeps."""

    name: str
    """What it is called to people."""
    num_files: int
    """Files in the store."""
    num_bytes: int
    """Bytes on disk to expect."""
    most_bytes: int
    """Bytes on disk that it never exceeds."""


def kept_things(capture: CaptureSettings, work: Work) -> list[Kept]:
    """All that a run keeps.

    Args:
        capture: what to keep; its budget is not looked at.
        work: what is computed.
    """
    return list(_things(capture, work))


def _things(capture: CaptureSettings, work: Work) -> Iterator[Kept]:
    num_shards, neurons = len(work.shards), work.model.num_neurons
    tokens = sum(shard.num_tokens for shard in work.shards)
    files = 3 * num_shards + 2
    yield _kept("inputs and tokens", files, (tokens, _TOKEN), (work.num_image_bytes, (1, 1)))
    files = num_shards * work.num_stages
    yield _kept("statistics", files, (num_shards * neurons, _STATS))
    if capture.top:
        activations = num_shards * neurons * 2 * capture.top
        yield _kept(f"top {capture.top} activations", files, (activations, _TOP))
    if capture.pooled:
        values = sum(shard.num_samples for shard in work.shards) * neurons * len(capture.pooled)
        yield _kept("pooled activations", files, (values, _POOLED))
    if pairs := num_pairs(capture, work.model.sites):
        yield _kept("pairs of neurons", files, (num_shards * pairs, _PAIR))
    if capture.values is not None:
        yield _values(capture.values, work)


def _values(values: ValuesSettings, work: Work) -> Kept:
    widths = [site.width for site in work.model.sites if values.keeps(site.site, site.layer)]
    shards = [shard for shard in work.shards if values.keeps_task(shard.task)]
    positions = sum(shard.num_counted for shard in shards) * values.share
    # Positions are drawn one by one: their number spreads around what is expected.
    most = positions + (_SPREADS * sqrt(positions) if values.share < 1 else 0)
    share = "" if values.share == 1 else f"{100 * values.share:.3g} % of "
    return _kept(
        f"{share}raw values ({values.encoding})",
        len(shards) * (1 + len(widths)),
        (len(shards) * sum(widths), _ROW),
        (positions * sum(widths), (_VALUE[values.encoding][0], 0)),
        (most * sum(widths), (0, _VALUE[values.encoding][1])),
        (positions, _PLACE),
    )


def _kept(name: str, num_files: int, *parts: tuple[float, Bytes]) -> Kept:
    expected, most = (
        sum(count * size[index] for count, size in (*parts, (num_files, _FILE)))
        for index in range(2)
    )
    return Kept(name=name, num_files=num_files, num_bytes=round(expected), most_bytes=round(most))


def within_budget(capture: CaptureSettings, work: Work) -> CaptureSettings:
    """What is kept of what is asked for, so that a run never exceeds its budget.

    Inputs, statistics and what is asked for by name (pooled values, pairs of neurons) must fit.
    Of what is left, top activations come first, as many as fit; then raw values, of as large a
    share of the positions as fits; then all digits of them.

    Args:
        capture: what is asked for, with a budget or without.
        work: what is computed.

    Raises:
        PlanError: if the budget is too small for what must fit.
    """
    if capture.budget_gb is None:
        return capture
    budget = capture.budget_gb * 1e9
    asked = capture.values
    chosen = capture.model_copy(update={"top": 0, "values": None})
    least = _most_bytes(chosen, work)
    if least > budget:
        raise PlanError(
            f"capture.budget_gb must hold inputs, statistics and whatever else is asked for by "
            f"name, which take up to {least / 1e9:,.3g} GB, found {capture.budget_gb:g}: raise it "
            "or capture.shard_tokens, or lower capture.tokens or the number of layers."
        )
    for top in range(capture.top, 0, -1):
        with_top = chosen.model_copy(update={"top": top})
        if _most_bytes(with_top, work) <= budget:
            chosen = with_top
            break
    values = _largest_share(asked or ValuesSettings(), chosen, work, budget)
    if values is not None and values.share == 1 and asked is None:
        exact = chosen.model_copy(update={"values": ValuesSettings(encoding="float32")})
        if _most_bytes(exact, work) <= budget:
            return exact
    return chosen.model_copy(update={"values": values})


def _largest_share(
    asked: ValuesSettings, chosen: CaptureSettings, work: Work, budget: float
) -> ValuesSettings | None:
    """The values asked for, of no larger share of the positions than fits; None if hardly any."""
    everything = _values(asked, work)
    left = budget - _most_bytes(chosen, work)
    if everything.most_bytes <= left:
        return asked
    positions = asked.share * sum(
        shard.num_counted for shard in work.shards if asked.keeps_task(shard.task)
    )
    fixed = _values(asked.model_copy(update={"share": 1e-12}), work).most_bytes
    fit = positions * (left - fixed) / (everything.most_bytes - fixed)
    share = asked.share * (fit - _SPREADS * sqrt(max(fit, 0))) / positions
    if share < _LEAST_SHARE:
        return None
    step = 10 ** (floor(log10(share)) - 2)
    return asked.model_copy(update={"share": floor(share / step) * step})


def _most_bytes(capture: CaptureSettings, work: Work) -> int:
    return sum(thing.most_bytes for thing in kept_things(capture, work))
