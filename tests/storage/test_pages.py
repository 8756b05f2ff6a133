"""Files of long lists hold what was written, for every reader, and are of one type."""

import io
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import TABLES
from storage.pages import ListFileWriter

SCHEMA = TABLES["values"].schema
BOUNDS = ("block", "neuron")
ELEMENTS = {"int8": pa.int8(), "float16": pa.float16(), "float32": pa.float32()}


def batch(lists: pa.Array, *, first: int = 0, heads: list[int | None] | None = None):
    """Rows of table values with these lists."""
    rows = len(lists)
    is_code = lists.type == pa.list_(pa.int8())
    return pa.record_batch(
        {
            "error_bound": pa.array(np.linspace(0, 1, rows, dtype=np.float32)),
            "block": pa.array(np.full(rows, 7, np.int32)),
            "neuron": pa.array(np.arange(first, first + rows, dtype=np.int32)),
            "head": pa.nulls(rows, pa.int16()) if heads is None else pa.array(heads, pa.int16()),
            "n": pa.array(np.full(rows, 1 << 40)),
            "value": pa.nulls(rows, pa.list_(pa.float32())) if is_code else lists,
            "code": lists if is_code else pa.nulls(rows, pa.list_(pa.int8())),
            "scale": pa.array([2.5] * rows if is_code else [None] * rows, pa.float32()),
        }
    )


def written(batches: list[pa.RecordBatch]) -> bytes:
    file = io.BytesIO()
    with ListFileWriter(file, SCHEMA, bounds=BOUNDS) as writer:
        for rows in batches:
            writer.write_batch(rows)
    return file.getvalue()


def read(data: bytes) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)


@st.composite
def list_columns(draw: st.DrawFn) -> list[pa.Array]:
    """Lists of one type for each of some row groups: of one length, or of any, or none at all."""
    name = draw(st.sampled_from(sorted(ELEMENTS)))
    element = st.integers(-128, 127) if name == "int8" else st.floats(width=16, allow_nan=False)
    one = st.lists(element, max_size=40)
    uneven = st.lists(st.none() | one, min_size=1, max_size=12)
    even = st.tuples(one, st.integers(1, 12)).map(lambda drawn: [drawn[0]] * drawn[1])
    groups = draw(st.lists(uneven | even, min_size=1, max_size=4))
    # A group without a list at all says nothing of its type.
    kept = [group for group in groups if any(rows is not None for rows in group)]
    return [pa.array(group, pa.list_(ELEMENTS[name])) for group in kept]


@settings(max_examples=150, deadline=None)
@given(columns=list_columns(), heads=st.booleans())
def test_what_is_written_is_read(columns: list[pa.Array], heads: bool) -> None:
    batches = [
        batch(
            lists, first=100 * index, heads=(3 * [None, 3, 4, 4])[: len(lists)] if heads else None
        )
        for index, lists in enumerate(columns)
    ]
    file = read(written(batches))
    assert file.num_row_groups == len(batches)
    expected = [row for rows in batches for row in rows.select(SCHEMA.names).to_pylist()]
    assert file.read().to_pylist() == expected
    for index, rows in enumerate(batches):
        bounds = file.metadata.row_group(index).column(1).statistics
        assert (bounds.min, bounds.max) == (100 * index, 100 * index + rows.num_rows - 1)


@pytest.mark.parametrize("name", sorted(ELEMENTS))
def test_every_reader_reads_a_file(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(3)
    dtype = ELEMENTS[name].to_pandas_dtype()
    # Long enough for counts of several bytes.
    columns = [(40 * rng.standard_normal((5, 20_000))).astype(dtype) for _ in range(3)]
    offsets = np.arange(6, dtype=np.int32) * 20_000
    lists = [pa.ListArray.from_arrays(offsets, pa.array(z.reshape(-1))) for z in columns]
    path = tmp_path / "lists.parquet"
    path.write_bytes(written([batch(rows, first=5 * i) for i, rows in enumerate(lists)]))

    column = "code" if name == "int8" else "value"
    expected = np.concatenate(columns)
    of_duckdb = duckdb.sql(f"select {column} from '{path}' where neuron >= 0 order by neuron")
    found = {
        "duckdb": of_duckdb.fetchnumpy()[column],
        "polars": pl.read_parquet(path)[column].to_list(),
        "pandas": pd.read_parquet(path)[column],
        "pyarrow": pq.read_table(path)[column].to_pylist(),
    }
    for reader, values in found.items():
        np.testing.assert_array_equal(np.stack(list(values)), expected, reader)
    (kept,) = duckdb.sql(f"select {column} from '{path}' where neuron = 7").fetchall()[0]
    np.testing.assert_array_equal(kept, columns[1][2])


def test_the_same_rows_give_the_same_bytes() -> None:
    rows = batch(pa.array([[1.5, 2.5], [3.5, 4.5]], pa.list_(pa.float16())))
    assert written([rows]) == written([rows])


def test_a_file_without_rows_is_read() -> None:
    assert read(written([])).read().num_rows == 0


@pytest.mark.parametrize("name", sorted(ELEMENTS))
def test_a_flipped_bit_of_any_page_is_found(name: str) -> None:
    rng = np.random.default_rng(1)
    values = pa.array((30 * rng.standard_normal(400)).astype(ELEMENTS[name].to_pandas_dtype()))
    data = written([batch(pa.ListArray.from_arrays(pa.array([0, 200, 400], pa.int32()), values))])
    group = read(data).metadata.row_group(0)
    for index in range(len(SCHEMA)):
        chunk = group.column(index)
        start = chunk.data_page_offset
        end = (chunk.dictionary_page_offset or start) + chunk.total_compressed_size
        damaged = bytearray(data)
        damaged[end - 1] ^= 1
        with pytest.raises(OSError, match="CRC checksum"):
            read(bytes(damaged)).read(columns=[SCHEMA.names[index]])


def test_lists_with_nulls_inside_are_refused() -> None:
    rows = batch(pa.array([[1.0, None]], pa.list_(pa.float32())))
    with pytest.raises(ValueError, match="lists of 'value' must have no nulls, found some"):
        written([rows])


def test_a_null_where_none_may_be_is_refused() -> None:
    rows = batch(pa.array([[1.0]], pa.list_(pa.float32())))
    index = rows.schema.get_field_index("error_bound")
    rows = rows.set_column(index, "error_bound", pa.nulls(1, pa.float32()))
    with pytest.raises(ValueError, match="column 'error_bound' may not be null, found 1"):
        written([rows])


def test_a_file_has_one_type() -> None:
    batches = [batch(pa.array([[1.0]], pa.list_(dtype()))) for dtype in (pa.float16, pa.float32)]
    with pytest.raises(ValueError, match="all batches of a file must have one type"):
        written(batches)
