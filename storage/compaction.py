"""Fewer, larger files: compaction, and removing what no reader needs any more.

A compaction writes the rows of several committed files into one, sorted for queries, and then a
record that names the new file and the files it replaces. Nothing is changed in place. A query sees
either the old files or the new one: views take a record into account when the query began after
the record's effective time, which lies in the future when the record is written by more than
clocks and listings may be off, so whoever heeds the record finds the new file in his listing. The
old files stay until `collect_garbage` removes them, long after the last query that began before.
"""

import hashlib
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from storage import layout
from storage.errors import StoreError
from storage.files import FileRecord
from storage.schema import TABLES, Table
from storage.store import Store
from storage.values import join_blocks
from storage.verify import file_problem

__all__ = [
    "DEFAULT_FILE_BYTES",
    "GARBAGE_SECONDS",
    "Compacted",
    "Garbage",
    "collect_garbage",
    "compact_run",
]

DEFAULT_FILE_BYTES = 1 << 30
"""Size up to which files are put together."""

GARBAGE_SECONDS = 24 * 3600.0
"""Age from which on a file that nothing names is taken for left behind; no shard takes so long from
its first file to its commit record, and no query from its beginning to its last file."""

_SECONDS_TO_EFFECT = 60.0
"""Far more than clocks of one cluster differ, and than listings of object stores are old."""

_BATCH_ROWS = 2048, 1 << 17
"""Least and most rows that are held at once."""

_OURS = "runs", "analyses", "planning-*"
"""Folders of a store whose every file is actlake's own."""

_PART = re.compile(r"/(stage-\d+|compacted)$")
"""What a file's folder is called inside the folder of its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _LiveFile:
    """A file that readers see."""

    record: FileRecord
    task: str
    shards: tuple[int, int]
    """Its first and last shard."""

    @property
    def folder(self) -> str:
        """The table's folder that it lies in; stages of one cut do not count."""
        return _PART.sub("", self.record.path.rpartition("/")[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Compacted:
    """One file that took the place of several."""

    file: FileRecord
    """The new file."""
    num_replaced: int
    """Files whose rows it holds."""
    bytes_replaced: int
    """Their size."""


@dataclass(slots=True)
class Garbage:
    """What `collect_garbage` found."""

    paths: list[str] = field(default_factory=list)
    """Files that were removed, or would be."""
    num_bytes: int = 0
    """Their size."""
    num_kept: int = 0
    """Files that nothing names and that are too young to be removed."""


def compact_run(
    store: Store,
    run: str,
    *,
    file_bytes: int = DEFAULT_FILE_BYTES,
    seconds_to_effect: float = _SECONDS_TO_EFFECT,
    memory_limit: str | None = None,
) -> Iterator[Compacted]:
    """Put the committed files of a run together, table by table and task by task.

    May run beside readers and beside the capture, and may be killed at any time: what is done is
    done, and the same call goes on. Each file that is read is first checked against its record.

    Args:
        store: the store.
        run: id of the run.
        file_bytes: size up to which files are put together.
        seconds_to_effect: how long after its record a new file replaces the old ones.
        memory_limit: most memory for sorting, such as ``"4GB"``; DuckDB's own default if not given.

    Yields:
        Each new file, once it is there.

    Raises:
        StoreError: if a committed file is damaged, the run is unknown, or the store cannot be
            written.
    """
    store.run_record(run)
    files = sorted(_live_files(store, run), key=lambda f: (f.folder, f.shards, f.record.path))
    for _, group in groupby(files, key=lambda file: file.folder):
        for pack in _packs(list(group), file_bytes):
            yield _compact(store, run, pack, seconds_to_effect, memory_limit)


def collect_garbage(
    store: Store, *, seconds: float = GARBAGE_SECONDS, dry_run: bool = False
) -> Garbage:
    """Remove files that no record names: replaced ones, and what killed processes left behind.

    Args:
        store: the store.
        seconds: age from which on such a file is removed; that of a replaced file counts from the
            moment at which it was replaced.
        dry_run: whether to remove nothing.

    Raises:
        StoreError: if a file cannot be removed.
        DamagedFileError: if a record cannot be read: what it names must not be taken for garbage.
    """
    # What is written from here on is not in the listing; what was recorded before is in the names.
    listing = [path for pattern in _OURS for path in _below(store, pattern)]
    named, replaced = _named_files(store)
    found, now = Garbage(), time.time()
    newest: dict[str, float] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for path in sorted(set(listing) - named):
        try:
            sizes[path] = store.files.size(path), store.files.modified(path)
        except FileNotFoundError:
            continue  # A temporary file that got its name, or was removed, meanwhile.
        folder = path.partition("/")[0]
        newest[folder] = max(newest.get(folder, 0.0), sizes[path][1])
    for path, (num_bytes, modified) in sizes.items():
        if path.startswith("planning-"):  # In use as long as anything is written into it.
            modified = newest[path.partition("/")[0]]
        if now - max(modified, replaced.get(path, 0.0)) < seconds:
            found.num_kept += 1
            continue
        if not dry_run:
            store.files.remove(path)
        found.paths.append(path)
        found.num_bytes += num_bytes
    return found


def _below(store: Store, pattern: str) -> Iterator[str]:
    for folder in store.files.list(pattern):
        yield from store.files.everything(folder)


def _live_files(store: Store, run: str) -> Iterator[_LiveFile]:
    """Files of the tables that can be compacted, without those that a compaction replaced."""
    folder = layout.run_folder(run)
    records = [
        store.files.get_json(path)
        for pattern in ("commits/*/*.json", "compactions/*/*.json")
        for path in store.files.list(f"{folder}/{pattern}")
    ]
    replaced = {path for record in records for path in record.get("replaces", ())}
    for record in records:
        for file in record["files"]:
            if file["path"] not in replaced and TABLES[file["table"]].sorted_by:
                shards = record["shards"] if "shards" in record else [record["shard"]] * 2
                yield _LiveFile(
                    record=FileRecord(**file), task=record["task"], shards=(shards[0], shards[1])
                )


def _packs(files: list[_LiveFile], file_bytes: int) -> Iterator[list[_LiveFile]]:
    """Neighbours that are small enough together, of which there are at least two."""
    pack: list[_LiveFile] = []
    for file in files:
        # A shard that is not committed yet must find its place between its neighbours.
        follows = not pack or file.shards[0] <= pack[-1].shards[1] + 1
        if not follows or (pack and sum(f.record.bytes for f in (*pack, file)) > file_bytes):
            if len(pack) > 1:
                yield pack
            pack = []
        pack.append(file)
    if len(pack) > 1:
        yield pack


def _compact(
    store: Store,
    run: str,
    pack: list[_LiveFile],
    seconds_to_effect: float,
    memory_limit: str | None,
) -> Compacted:
    for file in pack:
        problem = file_problem(store.files, file.record.to_dict())
        if problem is not None:
            raise StoreError(
                f"{file.record.path}: {problem}. Restore it from a copy before compacting."
            )
    table, task = TABLES[pack[0].record.table], pack[0].task
    paths = [file.record.path for file in pack]
    digest = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:12]
    first, last = min(f.shards[0] for f in pack), max(f.shards[1] for f in pack)
    # In a folder of their own: s3fs remembers that a folder of folders holds no files.
    target = f"{pack[0].folder}/compacted/shards-{first:05d}-{last:05d}-{digest}.parquet"
    written = _write_together(store, target, paths, table, memory_limit)
    expected = sum(file.record.rows for file in pack)
    if written.rows != expected:
        raise StoreError(
            f"{target} has {written.rows:,} rows, and the files it is made of have {expected:,}: "
            "it was not put to use; run `actlake verify`, which names what is damaged."
        )
    replaced = store.replaced_files()
    if taken := replaced.keys() & set(paths):
        raise StoreError(
            f"{min(taken)} was put together with other files by somebody else meanwhile: let one "
            "process at a time compact a run, and run the same command again."
        )
    # Never before what it builds on.
    effective = max(
        time.time() + seconds_to_effect,
        *(record["effective_ms"] / 1000 for record in _records_of(store, run, paths)),
        0.0,
    )
    store.files.put_json(
        layout.compaction_path(run, task, f"{table.name}-{digest}"),
        {
            "run": run,
            "task": task,
            "table": table.name,
            "shards": [first, last],
            "effective_ms": int(1000 * effective),
            "files": [written.to_dict()],
            "replaces": paths,
        },
    )
    return Compacted(
        file=written,
        num_replaced=len(pack),
        bytes_replaced=sum(file.record.bytes for file in pack),
    )


def _write_together(
    store: Store, target: str, paths: list[str], table: Table, memory_limit: str | None
) -> FileRecord:
    from storage.catalog import sorted_rows  # Capture workers load no DuckDB.

    with tempfile.TemporaryDirectory(prefix="actlake-") as spill:
        if table.name == "values":  # One row for each value: too many to be sorted.
            rows = join_blocks(store.files, paths)
        else:
            rows = sorted_rows(
                store.files,
                paths,
                table,
                batch_rows=min(max(table.row_group_rows, _BATCH_ROWS[0]), _BATCH_ROWS[1]),
                spill=spill,
                memory_limit=memory_limit,
            )
        return store.files.put_batches(target, table.name, rows)


def _records_of(store: Store, run: str, paths: list[str]) -> Iterator[dict[str, Any]]:
    """The records of compactions that made some of these files."""
    for path in store.files.list(f"{layout.run_folder(run)}/compactions/*/*.json"):
        record = store.files.get_json(path)
        if any(file["path"] in paths for file in record["files"]):
            yield record


def _named_files(store: Store) -> tuple[set[str], dict[str, float]]:
    """Files that must stay, and when those that were replaced were."""
    named: set[str] = set()
    replaced = store.replaced_files()
    for path in store.record_paths():
        named.add(path)
        named.update(file["path"] for file in store.files.get_json(path)["files"])
    for run in store.runs():
        record = store.run_record(run)
        named.add(layout.run_path(run))
        named.update(layout.driver_path(run, role) for role in ("driver", "compactor"))
        named.update(shard["samples"]["path"] for shard in record["shards"] if "samples" in shard)
    return named - replaced.keys(), replaced
