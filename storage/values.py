"""Raw activations: how lists of values are encoded, laid out in row groups, and put together."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.schema import TABLES

__all__ = ["Encoding", "HalfOverflowError", "encode_rows", "join_blocks", "rows_in_group"]

Encoding = Literal["float32", "float16", "int8"]

_GROUP_VALUES = 1 << 18
"""Values of a row group. Measured: larger ones make a query for one neuron read more of others,
smaller ones make it read a longer footer."""
_GROUP_ROWS = 4
"""Rows of a row group at least: DuckDB takes 25 ms for the footer of 1,536 groups of one row."""

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
    with np.errstate(over="ignore"):  # Found below.
        values = z.astype(np.float16, copy=False) if encoding == "float16" else z
    values = values.astype(np.float32, copy=False)
    peak = np.maximum(values.max(1, initial=0), -values.min(1, initial=0))
    schema = TABLES["values"].schema
    columns = {name: pa.nulls(rows, schema.field(name).type) for name in ("value", "code", "scale")}
    if encoding == "int8":
        scale = np.maximum(peak / np.float32(_STEPS), _SMALLEST)
        codes = np.rint(values / scale[:, None]).astype(np.int8)
        columns |= {"code": _lists(codes), "scale": pa.array(scale)}
        error = scale * _ROUNDING
    else:
        columns["value"] = _lists(values)
        error = np.zeros(rows)
    if encoding == "float16":
        if np.isinf(peak).any():
            raise HalfOverflowError(int(np.isinf(peak).argmax()))
        # Ten binary digits after the first; below 2^-14 numbers are 2^-24 apart everywhere.
        error = np.maximum(peak * 2.0**-11, 2.0**-25)
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


def join_blocks(blocks: Sequence[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Row groups of one file that has the rows of several: what compaction writes.

    Rows stay as they are, one for each neuron and block, so that every value, scale and bound
    keeps its bits; those of a neuron come together, which makes them few row groups.

    Args:
        blocks: table ``values`` of one site and layer over consecutive blocks, in order.
    """
    table = pa.concat_tables(blocks).sort_by([("neuron", "ascending"), ("block", "ascending")])
    longest = pc.max(table["n"]).as_py() or 0
    step = rows_in_group(longest)
    for start in range(0, table.num_rows, step):
        (batch,) = table.slice(start, step).combine_chunks().to_batches()
        yield batch
