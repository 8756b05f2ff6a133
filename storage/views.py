"""The views of a store, as SQL text.

`view_statements` makes plain DuckDB SQL for any client: the views read Parquet and JSON through
globs and show only files that a commit record or an analysis manifest names, so they stay right
while a capture goes on. Behind `Store.sql` and in the service `storage.following.Following` looks
up beforehand which files are committed, so that no query has to.
"""

import json
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from storage.files import StoreFiles
from storage.schema import TABLES, Table
from storage.sqlfiles import load_query, quote

__all__ = [
    "VIEWS",
    "committed_lists",
    "files_variable",
    "view_statements",
    "views_script",
    "watched_records",
]

VIEWS = (
    "committed_files", "commits", *TABLES, "runs", "tasks", "neuron_stats", "class_accuracy",
    "pooled_activations", "top_activations", "activations", "neuron_pairs", "analyses",
)  # fmt: skip
"""Names of all views, each after those it reads."""

Shape = str | list[Any] | dict[str, Any]
"""A DuckDB type: its name, a list with the shape of the elements, or a dict of fields."""

_FILE: Shape = {
    "path": "varchar",
    "table": "varchar",
    "rows": "bigint",
    "bytes": "bigint",
    "sha256": "varchar",
}

# Fields of the JSON records that views read; those not named here are left to Python.
_RECORDS: dict[str, tuple[str, dict[str, Shape]]] = {
    "commit_records": (
        "runs/*/commits/*/*.json",
        {
            "run": "varchar",
            "task": "varchar",
            "shard": "integer",
            "num_samples": "bigint",
            "num_tokens": "bigint",
            "num_counted": "bigint",
            "num_quarantined": "bigint",
            "files": [_FILE],
        },
    ),
    "compaction_records": (
        "runs/*/compactions/*/*.json",
        {"effective_ms": "bigint", "files": [_FILE], "replaces": ["varchar"]},
    ),
    "analysis_manifests": (
        "analyses/*/analysis.json",
        {
            "analysis": "varchar",
            "run": "varchar",
            "created": "timestamp",
            "parameters": "json",
            "files": [_FILE],
        },
    ),
    "run_records": (
        "runs/*/run.json",
        {
            "run": "varchar",
            "study": "varchar",
            "created": "timestamp",
            "reference": "varchar",
            "capture": {
                "top": "integer",
                "pooled": ["varchar"],
                "values": {"encoding": "varchar", "share": "double"},
            },
            "model": {
                "source": "varchar",
                "init": "varchar",
                "dtype": "varchar",
                "quantization": "varchar",
                "architecture": "varchar",
                "num_layers": "integer",
                "num_neurons": "bigint",
            },
            "tasks": [
                {
                    "task": "varchar",
                    "source": "varchar",
                    "num_documents": "bigint",
                    "num_empty": "bigint",
                    "num_samples": "bigint",
                    "num_tokens": "bigint",
                    "num_counted": "bigint",
                    "num_shards": "bigint",
                }
            ],
            "shards": [{"task": "varchar", "shard": "integer"}],
        },
    ),
}

_REMOTE_CLIENT = """\
-- The store is in an object store: a client must be able to read its URL and list below it. For S3,
-- run these once in each session (the extensions are downloaded), then the statements below:
--     install httpfs; load httpfs; install aws; load aws;
--     create secret (type s3, provider credential_chain);
-- A server other than Amazon's also needs endpoint 'host:port', url_style 'path' and, without TLS,
-- use_ssl false in that secret. Python clients can pass an fsspec filesystem to
-- connection.register_filesystem instead and need no extension.
"""

_DUCKDB_TYPES = {
    pa.bool_(): "boolean",
    pa.int16(): "smallint",
    pa.int8(): "tinyint",
    pa.int32(): "integer",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.float64(): "double",
    pa.string(): "varchar",
    pa.binary(): "blob",
    pa.list_(pa.int32()): "integer[]",
    pa.list_(pa.float32()): "float[]",
    pa.list_(pa.float64()): "double[]",
    pa.list_(pa.string()): "varchar[]",
    pa.list_(pa.bool_()): "boolean[]",
}


def views_script(files: StoreFiles) -> str:
    """A SQL script that defines all views, with a header that says what a client needs for it."""
    header = f"-- DuckDB views of the store {files.root}\n"
    if files.is_remote:
        header += _REMOTE_CLIENT
    return "\n".join([header, *view_statements(files)])


def view_statements(
    files: StoreFiles,
    *,
    listed: Collection[str] | None = None,
    encodings: Collection[str | None] = (),
) -> list[str]:
    """``create view`` statements for every view, in an order in which they can be run.

    Args:
        files: the store's files.
        listed: names of the tables that have committed files, if the views are to read those that
            the variable `files_variable` of each table lists; if not, views look for them.
        encodings: those of all raw values that there are, if it is known.
    """
    sources = _sources(files) | {"decoded": _decoded(encodings)}
    statements = []
    for name in VIEWS:
        if name in TABLES:
            body = _table_view(files, TABLES[name], listed)
            purpose, grain = TABLES[name].purpose, TABLES[name].grain
        else:
            query = load_query("storage", name)
            body, purpose, grain = query.text.format(**sources), query.purpose, query.grain
        statements.append(f"-- {purpose}\n-- {grain}\ncreate or replace view {name} as\n{body};\n")
    return statements


def watched_records(files: StoreFiles) -> list[tuple[str, float]]:
    """All records that decide what views show, and when those of runs were written (Unix time).

    Records are never changed, but a run that was deleted can be captured again under its id.
    """
    return [
        (path, files.modified(path) if name == "run_records" else 0.0)
        for name, (pattern, _) in _RECORDS.items()
        for path in files.list(pattern)
    ]


def committed_lists(files: StoreFiles) -> str:
    """The query that looks up which files are committed; see storage/sql/committed_lists.sql."""
    sources = _sources(files)
    sources["committed_files"] = load_query("storage", "committed_files").text.format(**sources)
    return load_query("storage", "committed_lists").text.format(**sources)


def _sources(files: StoreFiles) -> dict[str, str]:
    """What takes the places of SQL files that read records."""
    return {"root": quote(files.root)} | {name: _record_source(files, name) for name in _RECORDS}


def _decoded(encodings: Collection[str | None]) -> str:
    """SQL of a raw value.

    Looking at three columns for each of a million values takes a sixth of a query for one neuron.
    """
    if encodings and set(encodings) <= {"float32", "float16"}:
        return "value"
    return "scale * code" if set(encodings) == {"int8"} else "coalesce(value, scale * code)"


def files_variable(table: str) -> str:
    """The variable of a DuckDB connection that lists the committed files of a table."""
    return f"actlake_files_of_{table}"


def _table_view(files: StoreFiles, table: Table, listed: Collection[str] | None) -> str:
    columns = ", ".join(f't."{name}"' for name in (*table.partitions, *table.schema.names))
    if listed is None:
        source = (
            _empty_table(table)
            if _has_no_file(files, table)
            else _reader(table, quote(f"{files.root}/{_pattern(table)}"))
        )
        query = "committed_table"
    else:
        variable = f"getvariable({quote(files_variable(table.name))})"
        source = _reader(table, variable) if table.name in listed else _empty_table(table)
        query = "listed_table"
    return load_query("storage", query).text.format(columns=columns, files=source)


def _record_source(files: StoreFiles, name: str) -> str:
    pattern, shape = _RECORDS[name]
    if next(files.glob(pattern), None) is None:
        return _empty({column: _type_text(field) for column, field in shape.items()})
    query = load_query("storage", "json_records").text.format(
        structure=quote(json.dumps(shape)), pattern=quote(f"{files.root}/{pattern}")
    )
    return f"({query})"


def _pattern(table: Table) -> str:
    """Which files can be those of a table."""
    if table.owner == "run":
        return f"runs/*/{table.name}/**/*.parquet"
    return f"analyses/*/{table.name}.parquet"


def _has_no_file(files: StoreFiles, table: Table) -> bool:
    """Whether DuckDB would refuse to read the table."""
    return next(files.glob(_pattern(table)), None) is None


def _reader(table: Table, paths: str) -> str:
    """SQL that reads files of a table; `paths` is SQL for a pattern or a list."""
    types = ", ".join(f"{key}: {_partition_type(key)}" for key in table.partitions)
    return f"read_parquet({paths}, hive_partitioning = true, hive_types = {{{types}}})"


def _empty_table(table: Table) -> str:
    columns = {field.name: _DUCKDB_TYPES[field.type] for field in table.schema}
    partitions = {key: _partition_type(key) for key in table.partitions}
    return _empty(columns | partitions | {"filename": "varchar"})


def _partition_type(key: str) -> str:
    return "smallint" if key == "layer" else "varchar"


def _empty(columns: dict[str, str]) -> str:
    typed = ", ".join(f'null::{dtype} as "{column}"' for column, dtype in columns.items())
    return f"(select {typed} where false)"


def _type_text(shape: Shape) -> str:
    if isinstance(shape, str):
        return shape
    if isinstance(shape, list):
        return f"{_type_text(shape[0])}[]"
    fields = ", ".join(f'"{name}" {_type_text(field)}' for name, field in shape.items())
    return f"struct({fields})"
