"""The SQL face of a store: connections with its views. The only module that imports DuckDB."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import duckdb.func
import pyarrow as pa

from storage.errors import (
    QueryError,
    QueryInterruptedError,
    QueryMemoryError,
    QueryReadError,
)
from storage.files import StoreFiles
from storage.schema import Table
from storage.sqlfiles import load_query, quote
from storage.views import view_statements

__all__ = [
    "EXPORT_FORMATS",
    "RowStream",
    "add_function",
    "connect",
    "define_views",
    "execute",
    "export",
    "fetch",
    "interrupt",
    "lock",
    "open_connection",
    "open_reader",
    "render",
    "run_query",
    "sorted_rows",
    "stream",
    "syntax_tree",
]

_READING = (
    duckdb.StatementType.SELECT,
    duckdb.StatementType.EXPLAIN,
    duckdb.StatementType.MULTI,  # What DuckDB makes of a pivot.
)
"""Kinds of statements that a query may be."""

_READING_ERRORS = (duckdb.Error, pa.ArrowException, OSError, MemoryError)
"""What reading the rows of a query can raise: DuckDB's errors, some in the coat of Arrow's."""

_OUT_OF_MEMORY = ("Out of Memory", "memory allocation failed", "bad_alloc")
"""What DuckDB's and Arrow's errors say, of whatever kind, if there is no memory left."""

EXPORT_FORMATS = {
    "csv": "format csv, header",
    "json": "format json, array true",
    "parquet": "format parquet, compression zstd",
}
"""Options of DuckDB's COPY for each format that `export` writes."""


def connect(
    files: StoreFiles, *, threads: int | None = None, memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """A new in-memory DuckDB connection with the views of a store.

    Args:
        files: the store's files.
        threads: most threads that a query may use; all cores if not given.
        memory_limit: most memory, such as ``"4GB"``; DuckDB's own default if not given.

    Raises:
        QueryError: if a file that a view needs is damaged.
    """
    connection = open_reader(files.reader(), threads=threads, memory_limit=memory_limit)
    define_views(connection, view_statements(files))
    return connection


def open_reader(
    reader: Any | None, *, threads: int | None = None, memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """A new in-memory DuckDB connection that can read the files of a store, without views.

    Args:
        reader: that of the store, see `StoreFiles.reader`.
        threads: as for `connect`.
        memory_limit: as for `connect`.
    """
    connection = open_connection(threads=threads, memory_limit=memory_limit)
    # Files never change under their name, and footers of large ones take longer than their rows.
    connection.execute("set parquet_metadata_cache = true")
    # DuckDB would look for the rows of a top N first, and read them again with their other columns:
    # 40 ms instead of 25 for the top 20 of a neuron at a million positions. Wide rows gain by it,
    # for a top 5 of 4,000 images it reads a quarter of the bytes; but the large tables are narrow.
    connection.execute("set disabled_optimizers = 'late_materialization'")
    if reader is not None:
        # DuckDB's own reader of object stores is an extension that has to be downloaded.
        connection.register_filesystem(reader)
    return connection


def define_views(connection: duckdb.DuckDBPyConnection, statements: Sequence[str]) -> None:
    """Make or replace the views of a connection.

    Raises:
        QueryReadError: with DuckDB's message, if a file that a view needs is damaged.
    """
    try:
        for statement in statements:
            connection.execute(statement)
    except duckdb.Error as error:
        raise QueryReadError(
            f"the store cannot be queried, `actlake verify` names what is damaged: {error}"
        ) from error


def open_connection(
    *, threads: int | None = None, memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """A new in-memory DuckDB connection without a store; arguments as for `connect`."""
    connection = duckdb.connect()
    if threads is not None:
        connection.execute(f"set threads = {int(threads)}")
    if memory_limit is not None:
        connection.execute(f"set memory_limit = {quote(memory_limit)}")
    connection.execute("set enable_progress_bar = false")
    return connection


def lock(connection: duckdb.DuckDBPyConnection, files: StoreFiles) -> None:
    """Let a connection read the store alone: no other file, no network, no extension, no setting.

    Views can still be defined. Statements that write are not refused: `syntax_tree` and
    `run_query` take queries only. What one value may take is not bounded by DuckDB's memory limit,
    so the process needs a limit of its own (RLIMIT_DATA).

    Args:
        connection: a connection of `connect`.
        files: the store's files.
    """
    for setting in (
        "python_enable_replacements = false",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "allow_community_extensions = false",
        "temp_directory = ''",
        "TimeZone = 'UTC'",
        f"allowed_directories = [{quote(files.root.rstrip('/') + '/')}]",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"set {setting}")


def syntax_tree(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    """What DuckDB's parser makes of a text, without carrying anything out.

    Returns:
        The JSON of DuckDB's ``json_serialize_sql``: a dict of ``error`` and either ``statements``,
        if all of them are of the SELECT kind, or ``error_type`` and ``error_message``.

    Raises:
        QueryError: if the text is nested too deeply.
    """
    try:
        (found,) = connection.execute(
            "select json_serialize_sql($query::varchar)", {"query": query}
        ).fetchall()
        return json.loads(found[0])
    except (duckdb.Error, RecursionError) as error:
        raise QueryError(f"the query cannot be parsed: {error}") from error


@dataclass(frozen=True, slots=True)
class RowStream:
    """The rows of one query as they are made; made by `stream`."""

    columns: list[tuple[str, str]]
    """Name and DuckDB type of each column."""
    schema: pa.Schema
    """Schema of the batches."""
    batches: Iterator[pa.RecordBatch]
    """The rows. Reading them raises what `stream` raises."""


@contextlib.contextmanager
def stream(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    params: dict[str, Any] | None = None,
    *,
    batch_rows: int,
) -> Iterator[RowStream]:
    """Run one query that only reads; its rows can be read, as far as is wanted, inside the block.

    Args:
        connection: the connection.
        query: DuckDB SQL.
        params: values of ``$name`` parameters.
        batch_rows: most rows of a batch.

    Raises:
        QueryError: with DuckDB's message.
        QueryInterruptedError: if `interrupt` was called meanwhile.
        QueryMemoryError: if it needs more memory than it may take.
    """
    relation = run_query(connection, query, params)
    types = [str(dtype).strip('"') for dtype in relation.types]
    try:
        reader = relation.to_arrow_reader(batch_rows)
    except _READING_ERRORS as error:
        raise _failed(error) from error

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from reader
        except _READING_ERRORS as error:
            raise _failed(error) from error

    try:
        columns = list(zip(relation.columns, types, strict=True))
        yield RowStream(columns, reader.schema, batches())
    finally:
        reader.close()  # A connection runs nothing else while rows are left.


def interrupt(connection: duckdb.DuckDBPyConnection) -> None:
    """Stop the query that another thread runs on a connection; nothing happens if none runs."""
    connection.interrupt()


def sorted_rows(
    files: StoreFiles,
    paths: Sequence[str],
    table: Table,
    *,
    batch_rows: int,
    spill: str,
    memory_limit: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """The rows of several files of one table, in the order of `Table.sorted_by`.

    Args:
        files: the store's files.
        paths: the files.
        table: their table.
        batch_rows: most rows of a batch.
        spill: folder of this machine for what does not fit into memory.
        memory_limit: see `connect`.

    Raises:
        QueryError: with DuckDB's message, if a file cannot be read.
    """
    connection = open_connection(memory_limit=memory_limit)
    connection.execute(f"set temp_directory = {quote(spill)}")
    if (reader := files.reader()) is not None:
        connection.register_filesystem(reader)
    query = load_query("storage", "sorted_rows").text.format(
        columns=", ".join(f'"{name}"' for name in table.schema.names),
        files=", ".join(quote(f"{files.root}/{path}") for path in paths),
        keys=", ".join(f'"{name}"' for name in table.sorted_by),
    )
    try:
        yield from connection.sql(query).to_arrow_reader(batch_rows)
    except duckdb.Error as error:
        raise QueryError(str(error)) from error


def add_function(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    function: Callable[..., pa.Array],
    parameters: Sequence[str],
    result: str,
) -> None:
    """Make a Python function of Arrow columns callable from SQL on one connection.

    Args:
        connection: the connection.
        name: its name in SQL.
        function: takes one array per parameter and returns one of the same length.
        parameters: DuckDB types of the parameters.
        result: DuckDB type of the result.
    """
    connection.create_function(
        name,
        function,
        list(parameters),
        result,
        type=duckdb.func.ARROW,
    )


def run_query(
    connection: duckdb.DuckDBPyConnection, query: str, params: dict[str, Any] | None = None
) -> duckdb.DuckDBPyRelation:
    """Run one query that only reads; a lazy relation.

    Raises:
        QueryError: with DuckDB's message if the query is wrong; if it is not one statement that
            reads.
    """
    try:
        kinds = [statement.type for statement in connection.extract_statements(query)]
        if len(kinds) != 1:
            raise QueryError(f"a query must be one statement, found {len(kinds)}: ask one by one.")
        if kinds[0] not in _READING:
            raise QueryError(
                f"a query must only read, found a statement of type {kinds[0].name}: ask "
                "with one that gives rows and changes nothing."
            )
        relation: duckdb.DuckDBPyRelation = connection.sql(query, params=params)
    except (duckdb.InterruptException, duckdb.OutOfMemoryException, MemoryError) as error:
        raise _failed(error) from error
    except duckdb.Error as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise _failed(error) from error
        raise QueryError(str(error)) from error
    return relation


def execute(
    connection: duckdb.DuckDBPyConnection, statement: str, params: dict[str, Any] | None = None
) -> None:
    """Run one statement for what it does.

    Raises:
        QueryError: with DuckDB's message.
    """
    try:
        connection.execute(statement, params)
    except duckdb.Error as error:
        raise QueryError(str(error)) from error


def fetch(
    connection: duckdb.DuckDBPyConnection, query: str, params: dict[str, Any] | None = None
) -> pa.Table:
    """Run one query to its end; `run_query` alone meets damaged files only when rows are read.

    Raises:
        QueryError: with DuckDB's message.
    """
    relation = run_query(connection, query, params)
    try:
        return relation.to_arrow_table()
    except duckdb.Error as error:
        raise _failed(error) from error


def render(
    connection: duckdb.DuckDBPyConnection, query: str, *, max_width: int, max_rows: int
) -> str:
    """A query's result as a text table of at most `max_width` characters.

    Raises:
        QueryError: with DuckDB's message.
    """
    relation = run_query(connection, query)
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            relation.show(max_width=max_width, max_rows=max_rows)
    except duckdb.Error as error:
        raise _failed(error) from error
    return text.getvalue().rstrip("\n")


def export(connection: duckdb.DuckDBPyConnection, query: str, path: Path, file_format: str) -> None:
    """Write a query's result to a file in one of `EXPORT_FORMATS`.

    Raises:
        QueryError: with DuckDB's message, also if the file cannot be written.
    """
    result = run_query(connection, query)
    try:
        try:
            result.create_view("actlake_export", replace=True)
        except duckdb.InvalidInputException:
            # Plans, descriptions and pivots are rows that this process holds, and few.
            connection.register("actlake_export", result.to_arrow_table())
        connection.execute(
            f"copy actlake_export to {quote(str(path))} ({EXPORT_FORMATS[file_format]})"
        )
    except duckdb.Error as error:
        raise _failed(error) from error


def _failed(error: Exception) -> QueryError:
    """What a query that was right failed with."""
    text = str(error)
    # Arrow's readers give an OSError with the text of DuckDB's error.
    if isinstance(error, duckdb.InterruptException) or "INTERRUPT Error" in text:
        return QueryInterruptedError("the query was stopped.")
    if isinstance(error, duckdb.OutOfMemoryException | MemoryError) or any(
        words in text for words in _OUT_OF_MEMORY
    ):
        return QueryMemoryError("the query needs more memory than a query may take.")
    # Its own kinds of errors say enough; what a Parquet page made it stumble over has no kind.
    if type(error) in (duckdb.Error, duckdb.IOException):
        return QueryReadError(
            f"the store cannot be read, `actlake verify` names what is damaged: {error}"
        )
    return QueryError(str(error))
