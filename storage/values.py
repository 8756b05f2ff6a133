"""Raw activations: how lists of values are encoded, laid out in row groups, and put together."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.schema import TABLES

if TYPE_CHECKING:
    from storage.files import StoreFiles

__all__ = ["Encoding", "HalfOverflowError", "encode_rows", "join_blocks", "rows_in_group"]

Encoding = Literal["float32", "float16", "int8"]

_GROUP_VALUES = 1 << 18
"""Values of a row group. Measured: larger ones make a query for one neuron read more of others,
smaller ones make it read a longer footer."""
_GROUP_ROWS = 4
"""Rows of a row group at least: DuckDB takes 25 ms for the footer of 1,536 groups of one row."""

_GROUPS_AT_ONCE = 4
"""Row groups that are read of a file whose rows are put together with those of others."""

_STEPS = 127
_SMALLEST = np.finfo(np.float32).tiny
_ROUNDING = 0.5 + 2.0**-15
"""Of a step of int8: half of it, and what float32 loses in dividing and multiplying by it."""


class HalfOverflowError(ValueError):
    """A value is too large for half precision; the argument is the index of its row."""


def rows_in_group(num_values: int) -> int:
    """Rows of a row group whose lists have so many values."""
    return max(_GROUP_ROWS, _GROUP_VALUES // max(1, num_values))


def encode_rows(z: np.ndarray, encoding: Encoding) -> dict[str, pa.Array]:
    """Columns n, value, code, scale and error_bound of table ``values``.

    Args:
        z: (rows, values) float32, or float16 if they are rounded to it already; finite but for
            values that float16 cannot hold.
        encoding: how they are kept.

    Raises:
        HalfOverflowError: if they are infinite in float16.
    """
    rows, length = z.shape
    schema = TABLES["values"].schema
    columns = {name: pa.nulls(rows, schema.field(name).type) for name in ("value", "code", "scale")}
    if encoding == "float16":
        with np.errstate(over="ignore"):  # Found below.
            half = z.astype(np.float16, copy=False)
        columns["value"] = _lists(half)
        # Without their signs, the bits of numbers are in the order of the numbers.
        peak = (half.view(np.uint16) & np.uint16(0x7FFF)).max(1, initial=0).view(np.float16)
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
    return {
        "n": pa.array(np.full(rows, length, dtype=np.int64)),
        **columns,
        "error_bound": pa.array(error.astype(np.float32)),
    }


def _lists(values: np.ndarray) -> pa.Array:
    """(rows, values) as one list for each row."""
    rows, length = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * length
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def join_blocks(files: "StoreFiles", paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Row groups of one file that has the rows of several: what compaction writes.

    Rows stay as they are, one for each neuron and block, so that every value, scale and bound
    keeps its bits; those of a neuron come together, which makes them few row groups. A few row
    groups of each file are held at once.

    Args:
        files: the store's files.
        paths: files of table ``values`` of one site and layer, each ordered by neuron, then block.

    Raises:
        DamagedFileError: if a file cannot be read.
    """
    waiting: list[pa.Table] = []
    longest = 0
    for neuron in zip(*(_by_neuron(files, path) for path in paths), strict=True):
        rows = pa.concat_tables(neuron).sort_by("block")
        longest = max(longest, pc.max(rows["n"]).as_py())
        waiting.append(rows)
        while sum(table.num_rows for table in waiting) >= (step := rows_in_group(longest)):
            table = pa.concat_tables(waiting).combine_chunks()
            yield table.slice(0, step).combine_chunks().to_batches()[0]
            waiting = [table.slice(step)]
    rest = pa.concat_tables(waiting).combine_chunks()
    yield from rest.to_batches()


def _by_neuron(files: "StoreFiles", path: str) -> Iterator[pa.Table]:
    """The rows of each neuron of a file, neuron by neuron."""
    num_groups = files.parquet(path, lambda file: file.num_row_groups)
    left: pa.Table | None = None
    for start in range(0, num_groups, _GROUPS_AT_ONCE):
        groups = list(range(start, min(start + _GROUPS_AT_ONCE, num_groups)))
        table = files.parquet(path, lambda file: file.read_row_groups(groups))  # noqa: B023
        if left is not None:
            table = pa.concat_tables([left, table])
        table = table.combine_chunks()
        bounds = np.flatnonzero(np.diff(table["neuron"].to_numpy())) + 1
        # More rows of the last neuron may follow.
        for first, stop in zip([0, *bounds], bounds, strict=False):
            yield table.slice(first, stop - first)
        left = table.slice(int(bounds[-1])) if len(bounds) else table
    if left is not None:
        yield left
