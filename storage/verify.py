"""Checking a store against its own records: every byte, and counts that must agree."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import DamagedFileError
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
        on_file: called with the path of each file before it is read.
    """
    report = VerifyReport()
    for record_path, record in _records(store, report):
        report.num_shards += "shard" in record
        for file in record["files"]:
            on_file(file["path"])
            report.num_files += 1
            report.num_bytes += file["bytes"]
            problem = _file_problem(store, file)
            if problem is not None:
                report.problems.append(f"{file['path']}: {problem} (recorded in {record_path}).")
    if not report.problems:
        report.problems.extend(_count_problems(store))
    return report


def _records(store: Store, report: VerifyReport) -> Iterator[tuple[str, dict[str, Any]]]:
    paths = store.files.list("runs/*/commits/*/*.json") + store.files.list(
        "analyses/*/analysis.json"
    )
    for path in paths:
        try:
            yield path, store.files.get_json(path)
        except DamagedFileError as error:
            report.problems.append(f"{path}: {error}")


def _file_problem(store: Store, file: dict[str, Any]) -> str | None:
    local = store.files.local(file["path"])
    if not local.exists():
        return "the file is missing"
    size = local.stat().st_size
    if size != file["bytes"]:
        return f"the file has {size:,} bytes where {file['bytes']:,} were committed"
    if store.files.sha256(file["path"]) != file["sha256"]:
        return "the content was altered: its SHA-256 differs from the committed one"
    try:
        rows = pq.ParquetFile(local).metadata.num_rows
    except (OSError, pa.ArrowException) as error:
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
