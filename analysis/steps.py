"""Running the steps of an analysis: SQL files whose results are tables for the next step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from analysis.hypergeometric import hypergeometric_tail
from storage.catalog import add_function, execute, export, fetch, run_query
from storage.sqlfiles import load_query, quote

if TYPE_CHECKING:
    import duckdb

__all__ = ["Steps"]

_ROWS_PER_BATCH = 1 << 17


class Steps:
    """A connection on which steps run; each leaves the table ``computed_<name>`` behind."""

    def __init__(
        self, connection: "duckdb.DuckDBPyConnection", on_step: Callable[[str], None]
    ) -> None:
        """Prepare a connection.

        Args:
            connection: DuckDB; with the views of a store if steps read them.
            on_step: called with the name of each step before it runs.
        """
        self._connection = connection
        self._on_step = on_step
        self._names: set[str] = set()
        add_function(
            connection, "hypergeometric_tail", _hypergeometric_tail, ["BIGINT"] * 4, "DOUBLE"
        )

    def intern(
        self,
        names: Iterable[str],
        query: str = "",
        params: dict[str, Any] | None = None,
        **parts: str,
    ) -> None:
        """Add to the texts that SQL can cast to the type ``name``, which keeps them as numbers.

        Millions of rows repeat a few names of runs, tasks, metrics and sites: as numbers they are
        copied, joined and grouped in half of the time. They sort as the texts do, and leave the
        steps as texts.

        Args:
            names: such texts.
            query: name of a file that gives one row with more of them, the list ``names``.
            params: values of its parameters.
            parts: as for `run`.

        Raises:
            QueryError: with DuckDB's message.
        """
        if query:
            row = fetch(self._connection, _text(query, parts), params).to_pylist()[0]
            names = [*names, *(row["names"] or ())]
        if not self._names.issuperset(names):
            self._names.update(names)
            listed = ", ".join(map(quote, sorted(self._names)))
            execute(self._connection, f"create or replace temp type name as enum ({listed})")

    def run(
        self, name: str, params: dict[str, Any] | None = None, *, into: str = "", **parts: str
    ) -> None:
        """Run ``analysis/sql/<name>.sql`` into the table ``computed_<into or name>``.

        Args:
            name: name of the file.
            params: values of its parameters.
            into: name of the result, if it is not the file's.
            parts: trusted SQL that takes the place of ``{key}`` in the file.

        Raises:
            QueryError: with DuckDB's message, such as which file is damaged.
        """
        self._on_step(name)
        made = f"create temp table computed_{into or name} as {_text(name, parts)}"
        execute(self._connection, made, params)

    def take(self, other: "Steps", name: str, *, into: str) -> None:
        """Copy ``computed_<name>`` of steps on another connection into ``computed_<into>`` here."""
        self.give(into, pa.RecordBatchReader.from_batches(other.schema(name), other.batches(name)))

    def rename(self, name: str, into: str) -> None:
        """Call ``computed_<name>`` ``computed_<into>`` from now on."""
        execute(self._connection, f"alter table computed_{name} rename to computed_{into}")

    def forget(self, *names: str) -> None:
        """Drop ``computed_<name>`` of each name."""
        for name in names:
            execute(self._connection, f"drop table computed_{name}")

    def give(self, name: str, rows: pa.Table | pa.RecordBatchReader) -> None:
        """Make ``computed_<name>`` of rows that were computed elsewhere."""
        self._connection.register("given", rows)
        execute(self._connection, f"create temp table computed_{name} as from given")
        self._connection.unregister("given")

    def schema(self, name: str) -> pa.Schema:
        """Columns of ``computed_<name>``."""
        kept = fetch(self._connection, f"from computed_{name} limit 0").schema
        return pa.schema([field.with_type(_without_numbers(field.type)) for field in kept])

    def first(self, name: str) -> dict[str, Any] | None:
        """The first row of a check, or None if it found nothing."""
        rows = fetch(self._connection, load_query("analysis", name).text).to_pylist()
        return rows[0] if rows else None

    def table(self, name: str) -> pa.Table:
        """Rows of ``computed_<name>``, in order."""
        return pa.Table.from_batches(self.batches(name), self.schema(name))

    def batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """Rows of ``computed_<name>``, in order."""
        rows, schema = run_query(self._connection, f"from computed_{name}"), self.schema(name)
        for batch in rows.to_arrow_reader(_ROWS_PER_BATCH):
            yield batch.cast(schema)

    def write_csv(self, name: str, path: Path) -> None:
        """Write the rows of ``computed_<name>``, in order, as a CSV file with a header."""
        # DuckDB formats on all cores: millions of selections take a third of pyarrow's time.
        export(self._connection, f"from computed_{name}", path, "csv")


def _text(name: str, parts: Mapping[str, str]) -> str:
    text = load_query("analysis", name).text
    return text.format(**parts) if parts else text


def _without_numbers(kept: pa.DataType) -> pa.DataType:
    """The type of a column's values, also where each different one is kept once."""
    return kept.value_type if pa.types.is_dictionary(kept) else kept


def _hypergeometric_tail(
    shared: pa.Array, population: pa.Array, size_a: pa.Array, size_b: pa.Array
) -> pa.Array:
    """P(X >= shared) when size_b of `population` neurons are drawn and size_a are marked."""
    columns = (column.to_numpy() for column in (shared, population, size_a, size_b))
    return pa.array(hypergeometric_tail(*columns))
