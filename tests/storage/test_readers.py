"""Every table is read with the same values by DuckDB, pyarrow, pandas and Polars."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from storage import TABLES, Store, StoreFiles, Table

ROWS = 50


def some_rows(table: Table) -> pa.Table:
    """Rows of every type of the schema, extremes among them, null where a column may be."""
    random = np.random.default_rng(0)
    return pa.table([_values(field, random) for field in table.schema], schema=table.schema)


def _values(field: pa.Field, random: np.random.Generator) -> pa.Array:
    mask = (random.random(ROWS) < 0.3) if field.nullable else None
    if pa.types.is_list(field.type):
        flat = _values(pa.field("item", field.type.value_type, nullable=False), random)
        lengths = [0, *random.multinomial(ROWS, np.ones(ROWS - 1) / (ROWS - 1))]
        offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
        nulls = None if mask is None else pa.array(mask)
        return pa.ListArray.from_arrays(offsets, flat, mask=nulls).cast(field.type)
    if pa.types.is_string(field.type):
        words = ["", "a", " ü\n\t", 'it\'s "quoted"', "\x00", "漢字", "\N{GRINNING FACE}"]
        values: Any = random.choice(np.array(words, dtype=object), ROWS)
    elif pa.types.is_binary(field.type):
        values = np.array([random.bytes(size) for size in range(ROWS)], dtype=object)
    elif pa.types.is_boolean(field.type):
        values = random.random(ROWS) < 0.5
    elif pa.types.is_floating(field.type):
        values = random.normal(size=ROWS) * 10.0 ** random.integers(-30, 30, ROWS)
        values[:2] = [0.0, -0.0]
    else:
        limits = np.iinfo(field.type.to_pandas_dtype())
        values = random.integers(limits.min, limits.max, ROWS, endpoint=True)
        values[:2] = [limits.min, limits.max]
    return pa.array(values, field.type, mask=mask)


def by_duckdb(path: Path) -> list[dict[str, Any]]:
    return (
        duckdb.sql(f"from read_parquet('{path}', hive_partitioning = false)")
        .to_arrow_table()
        .to_pylist()
    )


def by_pyarrow(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path, partitioning=None).to_pylist()


def by_pandas(path: Path) -> list[dict[str, Any]]:
    frame = pd.read_parquet(path, partitioning=None, dtype_backend="pyarrow")
    return pa.Table.from_pandas(frame, preserve_index=False).to_pylist()


def by_polars(path: Path) -> list[dict[str, Any]]:
    return pl.read_parquet(path, hive_partitioning=False).to_dicts()


@pytest.mark.parametrize("read", [by_duckdb, by_pyarrow, by_pandas, by_polars])
@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_read_with_the_values_that_were_written(
    tmp_path: Path, name: str, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    rows = some_rows(TABLES[name])
    record = StoreFiles(tmp_path).put_table("file.parquet", name, rows)
    assert record.rows == ROWS
    assert read(tmp_path / "file.parquet") == rows.to_pylist()


def test_all_readers_add_the_keys_in_the_path_as_columns(store: Store) -> None:
    stats = f"{store.files.root}/runs/run=run-1/stats"
    expected = {("code", 60), ("mixed", 40)}
    duck = duckdb.sql(f"from read_parquet('{stats}/**/*.parquet', hive_partitioning = true)")
    assert set(duck.aggregate("task, count(*)").fetchall()) == expected
    frame = pd.read_parquet(stats)
    assert set(frame.groupby("task", observed=True).size().items()) == expected
    lazy = pl.scan_parquet(f"{stats}/**/*.parquet", hive_partitioning=True)
    assert set(lazy.group_by("task").len().collect().rows()) == expected
    arrow = ds.dataset(stats, partitioning="hive").to_table()
    assert (
        set(
            zip(
                *arrow.group_by("task").aggregate([("n", "count")]).to_pydict().values(),
                strict=True,
            )
        )
        == expected
    )


def test_a_filter_on_layer_skips_row_groups(tmp_path: Path) -> None:
    neurons = np.arange(400_000)
    columns: dict[str, Any] = {
        field.name: pa.array(np.zeros(len(neurons)), field.type)
        for field in TABLES["stats"].schema
        if field.name not in {"site", "head"}
    }
    columns["site"] = pa.array(["mlp"] * len(neurons))
    columns["head"] = pa.nulls(len(neurons), pa.int16())
    columns["layer"] = pa.array(neurons // 10_000, pa.int16())
    rows = pa.table(columns).select(TABLES["stats"].schema.names)
    StoreFiles(tmp_path).put_table("stats.parquet", "stats", rows)
    metadata = pq.read_metadata(tmp_path / "stats.parquet")
    layer = TABLES["stats"].schema.get_field_index("layer")
    bounds = [
        metadata.row_group(g).column(layer).statistics for g in range(metadata.num_row_groups)
    ]
    assert len([b for b in bounds if b.min <= 30 <= b.max]) == 1 < metadata.num_row_groups
