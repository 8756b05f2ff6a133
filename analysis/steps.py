"""Running the steps of an analysis: SQL files whose results are tables for the next step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import hypergeom

from storage.catalog import add_function, execute, export, fetch, run_query
from storage.sqlfiles import load_query

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
        add_function(
            connection, "hypergeometric_tail", _hypergeometric_tail, ["BIGINT"] * 4, "DOUBLE"
        )

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
        text = load_query("analysis", name).text
        if parts:
            text = text.format(**parts)
        execute(self._connection, f"create temp table computed_{into or name} as {text}", params)

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
        return fetch(self._connection, f"from computed_{name} limit 0").schema

    def first(self, name: str) -> dict[str, Any] | None:
        """The first row of a check, or None if it found nothing."""
        rows = fetch(self._connection, load_query("analysis", name).text).to_pylist()
        return rows[0] if rows else None

    def table(self, name: str) -> pa.Table:
        """Rows of ``computed_<name>``, in order."""
        return fetch(self._connection, f"from computed_{name}")

    def batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """Rows of ``computed_<name>``, in order."""
        rows = run_query(self._connection, f"from computed_{name}")
        yield from rows.to_arrow_reader(_ROWS_PER_BATCH)

    def write_csv(self, name: str, path: Path) -> None:
        """Write the rows of ``computed_<name>``, in order, as a CSV file with a header."""
        # DuckDB formats on all cores: millions of selections take a third of pyarrow's time.
        export(self._connection, f"from computed_{name}", path, "csv")


def _hypergeometric_tail(
    shared: pa.Array, population: pa.Array, size_a: pa.Array, size_b: pa.Array
) -> pa.Array:
    """P(X >= shared) when size_b of `population` neurons are drawn and size_a are marked."""
    drawn = [column.to_numpy() for column in (population, size_a, size_b)]
    return pa.array(hypergeom.sf(pc.subtract(shared, 1).to_numpy(), *drawn), pa.float64())
