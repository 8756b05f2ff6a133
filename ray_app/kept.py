"""What a run keeps, what each thing takes on disk, and what is kept within a budget of bytes."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from ray_app.capture.shards import PlannedShard
from ray_app.facts import ModelFacts
from ray_app.placement import PlanError, num_pairs
from ray_app.study import CaptureSettings, ValuesSettings
from storage.values import neurons_in_group

__all__ = ["Kept", "Work", "kept_things", "within_budget"]

# Bytes on disk after zstd: what to expect, measured on SmolLM2 and rounded up by a fifth, and the
# most, which random numbers reach.
_STATS = 60, 82
_TOP = 7, 12.5
"""Of each activation kept as one of the highest or lowest, with its sample and position."""
_POOLED = 4, 4.2
_PAIR = 12, 12.5
_VALUE = {"float32": (4.0, 4.01), "float16": (2.0, 2.01), "int8": (0.8, 1.01)}
_ROW = 16, 28
"""Of each neuron of a shard in table values: it, its scale and bound, and how often they stand."""
_GROUP = 1_100, 2_500
"""Of each row group of table values: headers of pages, its entry in the footer, codes of int8."""
_PLACE = {"all": 0.2, "drawn": 1.3}
"""Of each position in each row group of table values: sample and position, to expect."""
_CHANGE = 12, 2
"""Of each change of a byte from one position to the next, in the first list of a page of samples
or positions and in each list after it: the most. Bytes that stay take nothing."""
_WINDOW = 400_000
"""Positions up to which lists of a page are compressed as copies of one another: zstd looks back
512 KiB, and one byte of each number of a list lies side by side."""
_TOKEN = 20, 60
"""Of each token: its rows in samples and tokens; the most is that of rare and long tokens."""
_FILE = 5_000, 12_000
"""Of each file: names of columns, bounds of row groups, checksums in the commit record."""

_SHARES = [n / 10**digits for digits in (5, 4, 3) for n in range(100, 1000)]
"""Shares that a budget chooses from, ascending. Fewer positions say nothing of a task."""
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
    neurons = sum(widths)
    positions = sum(shard.num_counted for shard in shards) * values.share
    expected, most = _VALUE[values.encoding]
    share = "" if values.share == 1 else f"{100 * values.share:.3g} % of "
    return _kept(
        f"{share}raw values ({values.encoding})",
        len(shards) * len(widths),
        (len(shards) * neurons, _ROW),
        (positions * neurons, (expected, 0)),
        (_most_drawn(positions, values.share) * neurons, (0, most)),
        *_places(values.share, shards, Counter(widths)),
    )


def _most_drawn(expected: float, share: float) -> float:
    """Positions are drawn one by one: their number spreads around what is expected."""
    return expected if share == 1 else min(expected / share, expected + _SPREADS * sqrt(expected))


def _places(
    share: float, shards: Sequence[PlannedShard], widths: Counter[int]
) -> Iterator[tuple[float, Bytes]]:
    """What the row groups of table values take, with samples and positions: each has all of them.

    Args:
        share: of the counted positions.
        shards: those of which values are kept.
        widths: neurons of a site and layer -> sites and layers of which values are kept.
    """
    samples: Counter[str] = Counter()
    for shard in shards:
        samples[shard.task] += shard.num_samples
    place = _PLACE["all" if share == 1 else "drawn"]
    for shard in shards:
        counted = shard.num_counted * share
        drawn = ceil(_most_drawn(counted, share))
        for width, times in widths.items():
            groups, most_groups = (
                ceil(width / neurons_in_group(count)) for count in (round(counted), drawn)
            )
            lists = groups if counted <= _WINDOW else width
            yield times * groups, (_GROUP[0], 0)
            yield times * most_groups, (0, _GROUP[1])
            yield times * lists * counted, (place, 0)
            yield (
                times * _most_places(shard, samples[shard.task], drawn, most_groups, width),
                (0, 1),
            )


def _most_places(shard: PlannedShard, samples: int, drawn: int, groups: int, width: int) -> float:
    """Bytes of columns sample and position that a file of table values never exceeds.

    The lowest byte of a position may be any. All other bytes change with the sample, and those of a
    position every 256 tokens.

    Args:
        shard: the shard.
        samples: those of its task.
        drawn: positions of each neuron.
        groups: row groups of the file.
        width: neurons of the file.
    """
    of_samples = [shard.num_samples] * _num_bytes(samples)
    of_positions = [shard.num_samples + shard.num_tokens / 256] * (_num_bytes(shard.num_tokens) - 1)
    changes = of_samples + of_positions
    first, after = (sum(min(drawn, size * change) for change in changes) for size in _CHANGE)
    # What cannot be compressed takes a little more than it is.
    whole = 1.01 * (drawn + first)
    return width * whole if drawn > _WINDOW else groups * whole + (width - groups) * after


def _num_bytes(number: int) -> int:
    return max(1, ceil(number.bit_length() / 8))


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
    left = budget - _most_bytes(chosen, work)
    if _values(asked, work).most_bytes <= left:
        return asked
    shares = [share for share in _SHARES if share < asked.share]
    fitting = bisect_right(
        shares,
        left,
        key=lambda share: _values(asked.model_copy(update={"share": share}), work).most_bytes,
    )
    return asked.model_copy(update={"share": shares[fitting - 1]}) if fitting else None


def _most_bytes(capture: CaptureSettings, work: Work) -> int:
    return sum(thing.most_bytes for thing in kept_things(capture, work))
