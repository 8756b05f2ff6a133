"""Raw activations: how they are encoded, laid out in row groups, and put together."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import DamagedFileError
from storage.schema import TABLES

if TYPE_CHECKING:
    from storage.files import StoreFiles

__all__ = [
    "Encoding",
    "HalfOverflowError",
    "encode_rows",
    "join_blocks",
    "neurons_in_group",
    "place_lists",
]

Encoding = Literal["float32", "float16", "int8"]

_GROUP_VALUES = 1 << 19
"""Rows of a row group. Measured: larger ones make a query for one neuron read more of others,
smaller ones make it look at more of them."""
_GROUP_NEURONS = 4
"""Neurons of a row group at least: DuckDB takes some 15 us of processor time to skip one."""

_LISTS = ("sample", "position", "value", "code")
"""Columns that differ between the rows of a neuron and block."""

_STEPS = 127
_SMALLEST = np.finfo(np.float32).tiny
_ROUNDING = 0.5 + 2.0**-15
"""Of a step of int8: half of it, and what float32 loses in dividing and multiplying by it."""


class HalfOverflowError(ValueError):
    """A value is too large for half precision; the argument is the index of its neuron."""


def neurons_in_group(num_values: int) -> int:
    """Neurons of a row group that have so many values each."""
    return max(_GROUP_NEURONS, _GROUP_VALUES // max(1, num_values))


def place_lists(sample: np.ndarray, position: np.ndarray, num_neurons: int) -> dict[str, pa.Array]:
    """Columns sample and position of neurons whose values are of the same positions.

    Args:
        sample: (values,) int32.
        position: (values,) int32.
        num_neurons: how many there are.

    Returns:
        One list for each neuron.
    """
    shape = num_neurons, len(sample)
    places = {"sample": sample, "position": position}
    return {name: _lists(np.broadcast_to(place, shape)) for name, place in places.items()}


def encode_rows(z: np.ndarray, encoding: Encoding) -> dict[str, pa.Array]:
    """Columns value, code, scale and error_bound of table ``values``: lists, and one for each list.

    Args:
        z: (neurons, values) float32, or float16 if they are rounded to it already; finite but for
            values that float16 cannot hold.
        encoding: how they are kept.

    Raises:
        HalfOverflowError: if they are infinite in float16.
    """
    rows = len(z)
    schema = TABLES["values"].schema
    columns = {name: pa.nulls(rows, schema.field(name).type) for name in ("value", "code", "scale")}
    if encoding == "float16":
        with np.errstate(over="ignore"):  # Found below.
            half = z.astype(np.float16, copy=False)
        columns["value"] = _lists(half)
        # Without their signs, the bits of numbers are in the order of the numbers. Of numbers with
        # two's complement, positive ones are the greatest; without, negative ones are.
        highest = half.view(np.int16).max(1, initial=0).view(np.uint16)
        lowest = half.view(np.uint16).max(1, initial=1 << 15) & np.uint16(0x7FFF)
        peak = np.maximum(highest, lowest).view(np.float16)
        if np.isinf(peak).any():
            raise HalfOverflowError(int(np.isinf(peak).argmax()))
        # Ten binary digits after the first; below 2^-14 numbers are 2^-24 apart everywhere.
        error = np.maximum(peak.astype(np.float32) * 2.0**-11, 2.0**-25)
    elif encoding == "int8":
        peak = np.maximum(z.max(1, initial=0), -z.min(1, initial=0))
        scale = np.maximum(peak / np.float32(_STEPS), _SMALLEST)
        steps = z / scale[:, None]
        codes = np.rint(steps, out=steps).astype(np.int8)
        columns |= {"code": _lists(codes), "scale": pa.array(scale)}
        error = scale * _ROUNDING
    else:
        columns["value"] = _lists(z)
        error = np.zeros(rows)
    return columns | {"error_bound": pa.array(error.astype(np.float32))}


def _lists(values: np.ndarray) -> pa.Array:
    """(rows, values) as one list for each row."""
    return pa.ListArray.from_arrays(_offsets(*values.shape), pa.array(values.reshape(-1)))


@lru_cache(16)
def _offsets(rows: int, length: int) -> pa.Array:
    """Where lists of one length begin and end: one array, which shows that they are as long."""
    return pa.array(np.arange(rows + 1, dtype=np.int32) * length)


def join_blocks(files: "StoreFiles", paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """What `storage.pages` makes one file of that has the rows of several: for compaction.

    Every value, scale and bound keeps its bits; rows of a neuron come together, which makes them
    few row groups. One row group of each file is held at once, and what is waiting to be written.

    Args:
        files: the store's files.
        paths: files of table ``values`` of one site and layer, each ordered by neuron, then block.

    Raises:
        DamagedFileError: if a file cannot be read, or lacks neurons.
    """
    # Shards of which no position was drawn have files without rows.
    held = [path for path in paths if files.num_rows(path)]
    waiting: list[pa.Table] = []
    num_waiting = longest = 0
    for neuron in zip_longest(*(_by_neuron(files, path) for path in held)):
        for path, lists in zip(held, neuron, strict=True):
            if lists is None:
                raise DamagedFileError(
                    f"{files.root}/{path} lacks neurons that other files of its site and layer "
                    "have: `actlake verify` names what is damaged."
                )
        waiting += neuron
        for lists in neuron:
            num_waiting += lists.num_rows
            longest = max(longest, pc.max(pc.list_value_length(lists["sample"])).as_py())
        step = neurons_in_group(longest)
        if num_waiting >= step:
            table = _in_order(waiting)
            whole = num_waiting - num_waiting % step
            for start in range(0, whole, step):
                yield _batch(table.slice(start, step))
            waiting, num_waiting = [table.slice(whole)], num_waiting - whole
    if num_waiting:
        yield _batch(_in_order(waiting))


def _in_order(lists: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(lists).sort_by([("neuron", "ascending"), ("block", "ascending")])


def _batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]


def _as_lists(rows: pa.Table) -> pa.Table:
    """Rows as one row with lists for each neuron and block."""
    starts = np.append(_changes(rows["neuron"], rows["block"]), rows.num_rows)
    offsets = pa.array(starts.astype(np.int32))
    columns = {}
    for name in rows.column_names:
        column = rows[name].combine_chunks()
        if name in _LISTS and column.null_count == 0:
            columns[name] = pa.ListArray.from_arrays(offsets, column)
        else:
            columns[name] = column.take(pa.array(starts[:-1]))
    return pa.table(columns)


def _changes(*columns: pa.ChunkedArray) -> np.ndarray:
    """Where columns begin, and where one of them differs from the row before."""
    arrays = [column.to_numpy() for column in columns]
    changed = [np.diff(values, prepend=values[:1] - 1) != 0 for values in arrays]
    return np.flatnonzero(np.logical_or.reduce(changed))


def _by_neuron(files: "StoreFiles", path: str) -> Iterator[pa.Table]:
    """The lists of each neuron of a file, neuron by neuron."""
    num_groups = files.parquet(path, lambda file: file.num_row_groups)
    left: pa.Table | None = None
    for group in range(num_groups):
        lists = _as_lists(files.parquet(path, lambda file: file.read_row_group(group)))  # noqa: B023
        if left is not None:
            lists = pa.concat_tables([left, lists])
        starts = _changes(lists["neuron"])
        # More rows of the last neuron may follow.
        for first, stop in pairwise(starts.tolist()):
            yield lists.slice(first, stop - first)
        left = lists.slice(int(starts[-1]))
    if left is not None:
        yield left
