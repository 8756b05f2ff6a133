"""Files of raw values hold the rows that lists were unnested to, for every reader."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from storage.pages import EncodedColumns, UnnestingWriter

SCHEMA = TABLES["values"].schema
BOUNDS = ("block", "neuron")
ELEMENTS = {"int8": pa.int8(), "float16": pa.float16(), "float32": pa.float32()}


def batch(
    lists: pa.Array, *, first: int = 0, heads: list[int | None] | None = None, sample: int = 3
) -> pa.RecordBatch:
    """Lists of table values, each of another neuron."""
    rows = len(lists)
    is_code = lists.type == pa.list_(pa.int8())
    lengths = lists.value_lengths().to_pylist()
    return pa.record_batch(
        {
            "error_bound": pa.array(np.linspace(0, 1, rows, dtype=np.float32)),
            "block": pa.array(np.full(rows, 7, np.int32)),
            "neuron": pa.array(np.arange(first, first + rows, dtype=np.int32)),
            "head": pa.array([None] * rows if heads is None else heads, pa.int16()),
            "sample": pa.array([[sample] * n for n in lengths], pa.list_(pa.int32())),
            "position": pa.array([list(range(n)) for n in lengths], pa.list_(pa.int32())),
            "value": pa.nulls(rows, pa.float32()) if is_code else lists,
            "code": lists if is_code else pa.nulls(rows, pa.int8()),
            "scale": pa.array([2.5] * rows if is_code else [None] * rows, pa.float32()),
        }
    )


def unnested(rows: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows that a batch becomes, one by one."""
    return [
        {name: row[name][at] if isinstance(row[name], list) else row[name] for name in SCHEMA.names}
        for row in rows.to_pylist()
        for at in range(len(row["sample"]))
    ]


def written(batches: list[pa.RecordBatch], encoded: EncodedColumns | None = None) -> bytes:
    file = io.BytesIO()
    with UnnestingWriter(file, SCHEMA, bounds=BOUNDS, encoded=encoded) as writer:
        for rows in batches:
            writer.write_batch(rows)
    return file.getvalue()


def read(data: bytes) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)


@st.composite
def list_columns(draw: st.DrawFn) -> list[pa.Array]:
    """Lists of one type for each of some row groups: of one length, or of any."""
    name = draw(st.sampled_from(sorted(ELEMENTS)))
    element = st.integers(-128, 127) if name == "int8" else st.floats(width=16, allow_nan=False)
    one = st.lists(element, max_size=40)
    uneven = st.lists(one, min_size=1, max_size=12)
    even = st.tuples(one, st.integers(1, 12)).map(lambda drawn: [drawn[0]] * drawn[1])
    groups = draw(st.lists(uneven | even, min_size=1, max_size=4).map(lambda drawn: drawn * 2))
    return [pa.array(group, pa.list_(ELEMENTS[name])) for group in groups]


@settings(max_examples=200, deadline=None)
@given(columns=list_columns(), heads=st.booleans())
def test_what_is_written_is_read(columns: list[pa.Array], heads: bool) -> None:
    batches = [
        batch(
            lists,
            first=100 * index,
            heads=([None, 3, 4] * 4)[: len(lists)] if heads else None,
            # The same as before, and another: what is encoded once must not be used for both.
            sample=index // 2,
        )
        for index, lists in enumerate(columns)
    ]
    file = read(written(batches))
    expected = [unnested(rows) for rows in batches]
    filled = [rows for rows in expected if rows]
    assert file.num_row_groups == len(filled)
    assert file.read().to_pylist() == [row for rows in expected for row in rows]
    for index, rows in enumerate(filled):
        bounds = file.metadata.row_group(index).column(1).statistics
        assert (bounds.min, bounds.max) == (rows[0]["neuron"], rows[-1]["neuron"])


@pytest.mark.parametrize("name", sorted(ELEMENTS))
def test_every_reader_reads_a_file(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(3)
    dtype = ELEMENTS[name].to_pandas_dtype()
    # Long enough for counts of several bytes, and more neurons than a byte tells apart.
    shape = 300, 2_000
    columns = [(40 * rng.standard_normal(shape)).astype(dtype) for _ in range(3)]
    offsets = pa.array(np.arange(shape[0] + 1, dtype=np.int32) * shape[1])
    lists = [pa.ListArray.from_arrays(offsets, pa.array(z.reshape(-1))) for z in columns]
    path = tmp_path / "lists.parquet"
    batches = [batch(rows, first=shape[0] * i) for i, rows in enumerate(lists)]
    path.write_bytes(written(batches))

    column = "code" if name == "int8" else "value"
    expected = {
        column: np.concatenate(columns).reshape(-1),
        "neuron": np.repeat(np.arange(3 * shape[0]), shape[1]),
        "position": np.tile(np.arange(shape[1]), 3 * shape[0]),
        "sample": np.full(3 * shape[0] * shape[1], 3),
    }
    of_duckdb = duckdb.sql(f"select {', '.join(expected)} from '{path}'").fetchnumpy()
    of_polars, of_pandas, of_arrow = (
        pl.read_parquet(path),
        pd.read_parquet(path),
        pq.read_table(path),
    )
    for key, values in expected.items():
        np.testing.assert_array_equal(of_duckdb[key], values)
        np.testing.assert_array_equal(of_polars[key].to_numpy(), values)
        np.testing.assert_array_equal(of_pandas[key].to_numpy(), values)
        np.testing.assert_array_equal(of_arrow[key].to_numpy(), values)
    kept = duckdb.sql(f"select {column} from '{path}' where neuron = 707 order by position")
    np.testing.assert_array_equal(kept.fetchnumpy()[column], columns[2][107])


def test_the_same_rows_give_the_same_bytes_however_they_lie_in_memory() -> None:
    rows = batch(pa.array([[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]], pa.list_(pa.float16())))
    apart = [rows.slice(0, 1), rows.slice(1, 1), rows.slice(2, 1)]
    copied = [pa.RecordBatch.from_pylist(part.to_pylist(), rows.schema) for part in apart]
    assert written(apart) == written(copied)


def test_files_that_share_what_is_encoded_have_the_same_bytes() -> None:
    """Of threads that write at once, with places that lie where those of other files lay."""
    encoded = EncodedColumns()

    def both(seed: int) -> bool:
        random = np.random.default_rng(seed)
        sizes = [(4, 30), (4, 30), (3, 30), (4, 30), (4, 20 + seed % 3)]
        values = [random.normal(size=size).astype(np.float16) for size in sizes]
        groups = [
            batch(pa.array(list(rows), pa.list_(pa.float16())), first=seed, sample=seed % 4)
            for rows in values
        ]
        return written(groups, encoded) == written(groups)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(both, range(200)))


def test_lists_of_one_array_that_begin_elsewhere_are_others() -> None:
    flat = pa.array(np.arange(20, dtype=np.float32))
    offsets = pa.array([0, 5, 10], pa.int32())
    halves = [pa.ListArray.from_arrays(offsets, flat.slice(start, 10)) for start in (0, 10)]
    found = read(written([batch(half) for half in halves])).read()
    assert found["value"].to_pylist() == flat.to_pylist()


def test_the_footer_tells_where_pages_of_values_begin_behind_dictionaries() -> None:
    """Readers that skip to them are not among those that are tested."""
    group = read(written([batch(pa.array([[1, 2], [3, 4]], pa.list_(pa.int8())))])).metadata
    columns = [group.row_group(0).column(index) for index in range(len(SCHEMA))]
    with_dictionary = [column for column in columns if column.has_dictionary_page]
    assert len(with_dictionary) > 3
    for column in with_dictionary:
        end = column.dictionary_page_offset + column.total_compressed_size
        assert column.dictionary_page_offset < column.data_page_offset < end


@pytest.mark.parametrize(
    ("name", "column", "encoding"),
    [
        ("float16", "value", "PLAIN"),
        ("float32", "value", "BYTE_STREAM_SPLIT"),
        ("int8", "code", "RLE_DICTIONARY"),
    ],
)
def test_the_footer_tells_how_pages_are_encoded(name: str, column: str, encoding: str) -> None:
    group = read(written([batch(pa.array([[1, 2], [3, 4]], pa.list_(ELEMENTS[name])))])).metadata
    found = group.row_group(0).column(SCHEMA.names.index(column))
    assert set(found.encodings) == {"PLAIN", "RLE", encoding}


def test_lists_of_one_array_of_offsets_may_differ_in_length() -> None:
    offsets = pa.array([0, 2, 5, 6], pa.int32())
    even = batch(pa.array([[1.0, 2.0], [3.0, 4.0, 5.0]], pa.list_(pa.float32())))
    three = pa.ListArray.from_arrays(offsets, pa.array(np.arange(6, dtype=np.float32)))
    numbers = pa.ListArray.from_arrays(offsets, pa.array(np.arange(6, dtype=np.int32)))
    alike = changed(changed(even, "value", three.slice(0, 2)), "position", numbers.slice(0, 2))
    assert read(written([alike])).read()["value"].to_pylist() == [0, 1, 2, 3, 4]
    apart = changed(alike, "position", numbers.slice(1, 2))
    with pytest.raises(ValueError, match="lists of a row must be of one length"):
        written([apart])


def test_one_bound_of_many_lists_is_kept_once() -> None:
    rows = batch(pa.array([[1.0]] * 300, pa.list_(pa.float32())))
    same = changed(rows, "error_bound", pa.array([0.5] * 300, pa.float32()))
    sizes = [
        read(written([found])).metadata.row_group(0).column(SCHEMA.names.index("error_bound"))
        for found in (same, rows)
    ]
    assert sizes[0].total_uncompressed_size < 100 < sizes[1].total_uncompressed_size


def test_zeros_keep_their_signs() -> None:
    rows = batch(pa.array([[-0.0], [0.0]], pa.list_(pa.float32())))
    rows = changed(rows, "error_bound", pa.array([0.0, -0.0], pa.float32()))
    found = read(written([rows])).read()
    assert np.signbit(found["value"].to_numpy()).tolist() == [True, False]
    assert np.signbit(found["error_bound"].to_numpy()).tolist() == [False, True]


def test_a_file_without_rows_is_read() -> None:
    empty = batch(pa.array([[], []], pa.list_(pa.float16())))
    for batches in ([], [empty], [empty.slice(0, 0)]):
        assert read(written(batches)).read().num_rows == 0


@pytest.mark.parametrize("name", sorted(ELEMENTS))
def test_a_flipped_bit_of_any_page_is_found(name: str) -> None:
    rng = np.random.default_rng(1)
    values = pa.array((30 * rng.standard_normal(400)).astype(ELEMENTS[name].to_pandas_dtype()))
    data = written([batch(pa.ListArray.from_arrays(pa.array([0, 200, 400], pa.int32()), values))])
    group = read(data).metadata.row_group(0)
    for index in range(len(SCHEMA)):
        chunk = group.column(index)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        damaged = bytearray(data)
        damaged[start + chunk.total_compressed_size - 1] ^= 1
        with pytest.raises(OSError, match="CRC checksum"):
            read(bytes(damaged)).read(columns=[SCHEMA.names[index]])


def changed(rows: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return rows.set_column(rows.schema.get_field_index(name), name, column)


def test_what_would_not_be_whole_rows_is_refused() -> None:
    rows = batch(pa.array([[1.0, 2.0]], pa.list_(pa.float32())))
    for wrong, message in [
        (
            changed(rows, "value", pa.array([[1.0, None]], pa.list_(pa.float32()))),
            "lists of 'value' must have no nulls, found some",
        ),
        (
            changed(rows, "value", pa.array([[1.0]], pa.list_(pa.float32()))),
            "lists of a row must be of one length, found others in 'value'",
        ),
        (
            changed(rows, "sample", pa.array([[1, 2]], pa.list_(pa.int64()))),
            "column 'sample' must be of int32, found list<item: int64>",
        ),
        (
            changed(rows, "value", pa.array([[1.0, 2.0]], pa.list_(pa.float64()))),
            "column 'value' must be of float, found list<item: double>",
        ),
        (
            changed(rows, "neuron", pa.array([1], pa.int64())),
            "column 'neuron' must be of int32, found int64",
        ),
        (
            changed(rows, "error_bound", pa.nulls(1, pa.float32())),
            "column 'error_bound' may not be null, found 1",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            written([wrong])


def test_a_file_has_one_type() -> None:
    batches = [batch(pa.array([[1.0]], pa.list_(dtype()))) for dtype in (pa.float16, pa.float32)]
    with pytest.raises(ValueError, match="all batches of a file must have one type"):
        written(batches)
