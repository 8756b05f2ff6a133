"""Checking a store against its own records: every byte, and counts that must agree."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from storage.errors import DamagedFileError
from storage.files import StoreFiles
from storage.sqlfiles import load_query
from storage.store import Store

__all__ = ["VerifyReport", "verify_store"]


@dataclass(slots=True)
class VerifyReport:
    """What `verify_store` found."""

    num_files: int = 0
    """Files whose size, checksum and rows were checked."""
    num_bytes: int = 0
    """Bytes read for it."""
    num_shards: int = 0
    """Committed shards."""
    problems: list[str] = field(default_factory=list)
    """One sentence for each thing that is wrong; empty if all is well."""


def verify_store(
    store: Store, *, on_file: Callable[[str], None] = lambda path: None
) -> VerifyReport:
    """Check all committed files of a store, then that their contents agree.

    Each file must exist with the size, SHA-256 and row count of its record; then for each shard
    samples, tokens and statistics must count the same tokens and neurons.

    Args:
        store: the store.
        on_file: called with the path of each file before it is read; on an object store from
            several threads.
    """
    report = VerifyReport()
    for files, is_shard, problems in store.files.map(
        lambda path: _check_record(store, path, on_file), _record_paths(store)
    ):
        report.num_shards += is_shard
        report.num_files += len(files)
        report.num_bytes += sum(file["bytes"] for file in files)
        report.problems.extend(problems)
    if not report.problems:
        report.problems.extend(_count_problems(store))
    return report


def _record_paths(store: Store) -> list[str]:
    return store.files.list("runs/*/commits/*/*.json") + store.files.list(
        "analyses/*/analysis.json"
    )


def _check_record(
    store: Store, path: str, on_file: Callable[[str], None]
) -> tuple[list[dict[str, Any]], bool, list[str]]:
    """Files that a record names, whether it is a shard's, and what is wrong with them."""
    try:
        record = store.files.get_json(path)
    except DamagedFileError as error:
        return [], False, [f"{path}: {error}"]
    problems = []
    for file in record["files"]:
        on_file(file["path"])
        problem = _file_problem(store.files, file)
        if problem is not None:
            problems.append(f"{file['path']}: {problem} (recorded in {path}).")
    return record["files"], "shard" in record, problems


def _file_problem(files: StoreFiles, file: dict[str, Any]) -> str | None:
    path = file["path"]
    try:
        size = files.size(path)
    except FileNotFoundError:
        return "the file is missing"
    if size != file["bytes"]:
        return f"the file has {size:,} bytes where {file['bytes']:,} were committed"
    if files.sha256(path) != file["sha256"]:
        return "the content was altered: its SHA-256 differs from the committed one"
    try:
        rows = files.num_rows(path)
    except DamagedFileError as error:
        return f"the file is not readable Parquet: {error}"
    if rows != file["rows"]:
        return f"the file has {rows:,} rows where {file['rows']:,} were committed"
    return None


def _count_problems(store: Store) -> Iterator[str]:
    rows = store.sql(load_query("storage", "reconcile").text).to_arrow_table().to_pylist()
    for row in rows:
        key = f"run {row.pop('run')}, task {row.pop('task')}, shard {row.pop('shard')}"
        found = ", ".join(f"{name} {value}" for name, value in row.items())
        yield f"{key}: samples, tokens and statistics do not agree: {found}."
