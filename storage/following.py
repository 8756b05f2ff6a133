"""A connection to a store that grows: its views show what is committed, without looking it up."""

import math
import threading
import time
from collections.abc import Sequence

from storage import layout
from storage.catalog import define_views, execute, fetch, open_reader
from storage.errors import DamagedFileError
from storage.files import StoreFiles
from storage.views import committed_lists, files_variable, view_statements, watched_records

__all__ = ["Following"]


class Following:
    """A connection whose views are kept on the files that are committed.

    Views that look for committed files themselves do so in every query: for a small answer that is
    most of the time. Here it is done when a record was written since, and tables are read from a
    list of files.
    """

    def __init__(
        self, files: StoreFiles, *, threads: int | None = None, memory_limit: str | None = None
    ) -> None:
        """Open a connection without views; arguments as for `connect`."""
        self._reader = files.reader()
        self.connection = open_reader(self._reader, threads=threads, memory_limit=memory_limit)
        """The connection. Its cursors have views and no lists of files: they cannot read tables."""
        self._files = files
        self._lock = threading.Lock()
        self._records: list[tuple[str, float]] | None = None
        self._until = math.inf
        self._statements: list[str] = []
        self._listed: set[str] = set()
        self._encodings: dict[tuple[str, float], str | None] = {}

    def refresh(self) -> None:
        """Let the views show what is committed now.

        Raises:
            QueryError: if a record is damaged, with its name.
        """
        with self._lock:
            records = watched_records(self._files)
            if records != self._records or 1000 * time.time() >= self._until:
                self._look_up()
                self._records = records

    def _look_up(self) -> None:
        if self._reader is not None:
            # Its listings may be from before the record that was found now.
            self._reader.invalidate_cache()
        rows = fetch(self.connection, committed_lists(self._files)).to_pylist()
        found = {row["table_name"]: row["filenames"] for row in rows}
        for table in self._listed | found.keys():
            # Without files a table has another view.
            params = {"filenames": found.get(table, [])}
            statement = f"set variable {files_variable(table)} = $filenames::varchar[]"
            execute(self.connection, statement, params)
        encodings = self._encodings_of(found.get("values", []))
        statements = view_statements(self._files, listed=found.keys(), encodings=encodings)
        if statements != self._statements:
            define_views(self.connection, statements)
        self._statements, self._listed = statements, set(found)
        self._until = min((row["until_ms"] or math.inf for row in rows), default=math.inf)

    def _encodings_of(self, filenames: Sequence[str]) -> set[str | None]:
        """How runs say that they encode the raw values in files; None of one that does not."""
        found: set[str | None] = set()
        prefix = f"{self._files.root}/runs/run="
        for run in {name.removeprefix(prefix).split("/")[0] for name in filenames}:
            path = layout.run_path(run)
            key = run, self._files.modified(path) if self._files.exists(path) else 0.0
            if key not in self._encodings:
                self._encodings[key] = _encoding_of(self._files, path)
            found.add(self._encodings[key])
        return found


def _encoding_of(files: StoreFiles, run_path: str) -> str | None:
    """The encoding of raw values that the record of a run names, if it can be read."""
    try:
        found = files.get_json(run_path)
    except DamagedFileError:
        return None  # The views of runs say what is wrong with it; other tables can be read.
    for name in ("capture", "values", "encoding"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None
