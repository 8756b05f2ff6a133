"""A store as an object: its runs, its commit records and its SQL."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from storage import layout
from storage.errors import StoreError
from storage.files import FileRecord, StoreFiles

if TYPE_CHECKING:
    # Capture workers and drivers never query: they need not load DuckDB.
    import duckdb

    from storage.following import Following
    from storage.matrix import MatrixBlock

__all__ = ["Store", "create_store", "open_store"]


class Store:
    """A folder of runs and analyses; made by `open_store` or `create_store`."""

    def __init__(self, files: StoreFiles) -> None:
        self.files = files
        self._following: Following | None = None

    def sql(self, query: str, params: dict[str, Any] | None = None) -> "duckdb.DuckDBPyRelation":
        """Run one SQL query over the views of this store.

        Args:
            query: DuckDB SQL; `VIEWS` in storage.views names the views.
            params: values of ``$name`` parameters.

        Returns:
            A lazy relation: ``.df()`` gives pandas, ``.pl()`` Polars, ``.to_arrow_table()`` Arrow.

        Raises:
            QueryError: with DuckDB's message, if the query is wrong.
        """
        from storage.catalog import run_query

        return run_query(self.connection, query, params)

    def table(self, query: str, params: dict[str, Any] | None = None) -> pa.Table:
        """All rows of one query as an Arrow table; arguments and errors as `sql`."""
        from storage import catalog

        return catalog.fetch(self.connection, query, params)

    def render(self, query: str, *, max_width: int, max_rows: int) -> str:
        """A query's result as a text table; see `storage.catalog.render`."""
        from storage import catalog

        return catalog.render(self.connection, query, max_width=max_width, max_rows=max_rows)

    def export(self, query: str, path: Path, file_format: str) -> None:
        """Write a query's result as csv, json or parquet; see `storage.catalog.export`."""
        from storage import catalog

        catalog.export(self.connection, query, path, file_format)

    def matrix(
        self,
        site: str,
        layer: int,
        task: str,
        *,
        run: str | None = None,
        neurons: Sequence[int] | np.ndarray | None = None,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        """Raw values of one site and layer over one task, as one array.

            >>> store.matrix("mlp", 7, "python")  # doctest: +SKIP

        Args:
            site: 'attn' or 'mlp'.
            layer: index of the layer.
            task: name of the task.
            run: id of the run; may be left out if there is one only.
            neurons: indices of neurons, in any order; all if not given.
            dtype: NumPy's type of the array.

        Returns:
            (positions, neurons): the positions that were kept, in the order of computation.
            ``torch.from_numpy`` takes it as it is.

        Raises:
            StoreError: if the run has no such neurons or task, or kept no values of them.
            DamagedFileError: if a file cannot be read.
        """
        from storage.matrix import read_matrix, select_values

        chosen = select_values(self, site, layer, task, run=run, neurons=neurons)
        return read_matrix(self, chosen, dtype=dtype)

    def matrix_blocks(
        self,
        site: str,
        layer: int,
        task: str,
        *,
        run: str | None = None,
        neurons: Sequence[int] | np.ndarray | None = None,
        dtype: Any = np.float32,
        max_bytes: int = 256 << 20,
    ) -> "Iterator[MatrixBlock]":
        """The rows of `matrix` in blocks, in order, each with its samples and positions.

        Args:
            site: as of `matrix`, like all but the last.
            layer: index of the layer.
            task: name of the task.
            run: id of the run.
            neurons: indices of neurons.
            dtype: NumPy's type of the values.
            max_bytes: most bytes of the values of a block. A file that has more is turned in a
                temporary file.

        Raises:
            StoreError, DamagedFileError: as `matrix`, the first before any block is asked for.
        """
        from storage.matrix import read_blocks, select_values

        chosen = select_values(self, site, layer, task, run=run, neurons=neurons)
        return read_blocks(self, chosen, dtype=dtype, max_bytes=max_bytes)

    @property
    def connection(self) -> "duckdb.DuckDBPyConnection":
        """The connection behind `sql`, made on first use; its views follow the store.

        It is for one thread, and its cursors cannot read tables: `connect` gives others.
        """
        from storage.following import Following

        if self._following is None:
            self._following = Following(self.files)
        self._following.refresh()
        return self._following.connection

    def connect(
        self, *, threads: int | None = None, memory_limit: str | None = None
    ) -> "duckdb.DuckDBPyConnection":
        """A connection of one's own, with the views; see `storage.catalog.connect`."""
        from storage import catalog

        return catalog.connect(self.files, threads=threads, memory_limit=memory_limit)

    def views_sql(self) -> str:
        """SQL that defines all views, for any DuckDB client."""
        from storage.views import views_script

        return views_script(self.files)

    def runs(self) -> list[str]:
        """Ids of the runs, sorted."""
        return [
            path.split("/")[1].removeprefix("run=") for path in self.files.list("runs/*/run.json")
        ]

    def run_record(self, run: str) -> dict[str, Any]:
        """The run's record, as it was written when the run began.

        Raises:
            StoreError: if the store has no such run.
        """
        if not self.files.exists(layout.run_path(run)):
            known = ", ".join(self.runs()) or "none"
            raise StoreError(f"no run {run!r} in {self.files.root}: the runs there are: {known}.")
        record: dict[str, Any] = self.files.get_json(layout.run_path(run))
        return record

    def resolve_run(self, run: str | None) -> str:
        """The id of the run that is meant: the given one, or the only one there is."""
        if run is not None:
            self.run_record(run)
            return run
        runs = self.runs()
        if not runs:
            raise StoreError(f"{self.files.root} has no run yet: capture first.")
        if len(runs) != 1:
            found = ", ".join(runs)
            raise StoreError(
                f"which run is meant must be said when a store does not have exactly one; the runs "
                f"in {self.files.root} are: {found}. Pass --run."
            )
        return runs[0]

    def committed(self, run: str) -> set[tuple[str, int]]:
        """(task, shard) of every committed shard of a run."""
        paths = self.files.list(f"{layout.run_folder(run)}/commits/*/*.json")
        keys = set()
        for path in paths:
            task, shard = path.split("/")[-2:]
            keys.add((task.removeprefix("task="), int(shard[len("shard-") : -len(".json")])))
        return keys

    def record_paths(self) -> list[str]:
        """Every record that names files: commits, compactions, analyses."""
        patterns = ("runs/*/commits/*/*.json", "runs/*/compactions/*/*.json")
        return [
            path
            for pattern in (*patterns, "analyses/*/analysis.json")
            for path in self.files.list(pattern)
        ]

    def replaced_files(self) -> dict[str, float]:
        """Files that compactions replaced, and when each one stops being read (Unix time)."""
        found: dict[str, float] = {}
        for path in self.files.list("runs/*/compactions/*/*.json"):
            record = self.files.get_json(path)
            found |= dict.fromkeys(record["replaces"], record["effective_ms"] / 1000)
        return found

    def commit(
        self,
        *,
        run: str,
        task: str,
        shard: int,
        counts: dict[str, int],
        files: Iterable[FileRecord],
    ) -> None:
        """Make one shard visible: its files are on disk, and this record names them.

        Args:
            run: id of the run.
            task: name of the task.
            shard: index of the shard.
            counts: num_samples, num_tokens and num_counted of the shard.
            files: every file of the shard.
        """
        record = {
            "run": run,
            "task": task,
            "shard": shard,
            **counts,
            "files": [file.to_dict() for file in sorted(files, key=lambda file: file.path)],
        }
        self.files.put_json(layout.commit_path(run, task, shard), record)


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for reading: a folder, or a URL such as ``s3://bucket/prefix``.

        >>> from storage import open_store
        >>> open_store("demo-store").sql("select * from runs").df()  # doctest: +SKIP

    Raises:
        StoreError: if there is no store at `path`.
    """
    files = StoreFiles(path)
    if not (files.exists("runs") or files.exists("analyses")):
        raise StoreError(
            f"no store at {files.root}: a store has a folder 'runs' or 'analyses', found neither. "
            "Give the folder or URL that was passed to `actlake capture --store`."
        )
    return Store(files)


def create_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for writing, making its folder if need be.

    Raises:
        StoreError: if the folder cannot be written, or the bucket cannot be reached.
    """
    files = StoreFiles(path)
    files.prepare()
    return Store(files)
