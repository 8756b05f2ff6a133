"""Checking a store against its own records: every byte, and counts that must agree."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import mode
from typing import Any

from storage import layout
from storage.errors import DamagedFileError, QueryError
from storage.files import FileRecord, StoreFiles
from storage.sqlfiles import load_query
from storage.store import Store

__all__ = ["VerifyReport", "file_problem", "verify_store"]

_RUN_KEYS = {"run", "study", "model", "capture", "sites", "tasks", "shards"}
_COMMIT_KEYS = {"run", "task", "shard", "num_samples", "num_tokens", "num_counted"}
_COMPACTION_KEYS = {"run", "task", "table", "shards", "effective_ms", "replaces"}
_DAMAGED = "the record is damaged: it does not hold what a record must"


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

    Each record must be whole and in its place; each file must exist with the size, SHA-256 and row
    count of its record, the inputs of shards still to be computed among them; then for each shard
    samples, tokens and statistics must count the same tokens and neurons, and there must be raw
    values of as many positions for all neurons of which the run keeps them. Compacted files must
    have the rows of those that they replaced.

    Args:
        store: the store.
        on_file: called with the path of each file before it is read; on an object store from
            several threads.
    """
    compactions = _compactions(store)
    report = VerifyReport(problems=[*_run_problems(store), *_replaced_twice(compactions)])
    for path, file in _waiting_inputs(store):
        on_file(file["path"])
        report.num_files += 1
        report.num_bytes += file["bytes"]
        problem = file_problem(store.files, file)
        if problem is not None:
            report.problems.append(f"{file['path']}: {problem} (recorded in {path}).")
    replaced = _replaced(compactions)
    num_rows: dict[str, int] = {}
    shards = []
    for found in store.files.map(
        lambda path: _check_record(store, path, replaced, on_file), store.record_paths()
    ):
        report.num_files += len(found.files)
        report.num_bytes += sum(file["bytes"] for file in found.files)
        report.problems.extend(found.problems)
        if found.record is not None:
            num_rows |= {file["path"]: file["rows"] for file in found.record["files"]}
            if "shard" in found.record:
                shards.append({key: found.record[key] for key in _COMMIT_KEYS})
    report.num_shards = len(shards)
    if not report.problems:
        report.problems.extend(_compaction_problems(compactions, num_rows))
        report.problems.extend(_value_problems(store, shards, num_rows))
        report.problems.extend(_count_problems(store))
    return report


def _run_problems(store: Store) -> Iterator[str]:
    """Runs with committed shards whose own record, which says what was planned, is not whole."""
    commits = store.files.list("runs/*/commits/*/*.json")
    for folder in sorted({path.split("/commits/")[0] for path in commits}):
        path = f"{folder}/run.json"
        if not store.files.exists(path):
            yield f"{path}: the file is missing, and the run has committed shards."
            continue
        try:
            record = store.files.get_json(path)
        except DamagedFileError as error:
            yield f"{path}: {error}"
            continue
        if not isinstance(record, dict) or not record.keys() >= _RUN_KEYS:
            yield f"{path}: {_DAMAGED}."


def _waiting_inputs(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """(record, file) of the inputs of shards that no commit record vouches for yet."""
    for run in store.runs():
        try:
            record = store.run_record(run)
        except DamagedFileError:
            continue  # `_run_problems` names it if it matters to what is committed.
        if not isinstance(record, dict) or not record.keys() >= _RUN_KEYS:
            continue
        committed = store.committed(run)
        for shard in record["shards"]:
            if (shard["task"], shard["shard"]) not in committed and "samples" in shard:
                yield layout.run_path(run), shard["samples"]


def _record_problem(path: str, record: Any) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("files"), list):
        return _DAMAGED
    if not all(_is_file_record(file) for file in record["files"]):
        return _DAMAGED
    if "/compactions/" in path:
        return None if record.keys() >= _COMPACTION_KEYS else _DAMAGED
    if "/commits/" not in path:
        return None
    if not record.keys() >= _COMMIT_KEYS:
        return _DAMAGED
    expected = layout.commit_path(record["run"], record["task"], record["shard"])
    return None if path == expected else f"the record speaks of another shard, {expected}"


def _is_file_record(file: Any) -> bool:
    return isinstance(file, dict) and {key: type(value) for key, value in file.items()} == (
        FileRecord.__annotations__
    )


def _compactions(store: Store) -> dict[str, dict[str, Any]]:
    """Records of compactions that are whole, by their paths."""
    found = {}
    for path in store.files.list("runs/*/compactions/*/*.json"):
        try:
            record = store.files.get_json(path)
        except DamagedFileError:
            continue  # `_check_record` names it.
        if _record_problem(path, record) is None:
            found[path] = record
    return found


def _replaced_twice(compactions: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Files whose rows two compactions hold."""
    seen: set[str] = set()
    for path, record in compactions.items():
        for twice in sorted(seen & set(record["replaces"])):
            yield f"{path}: the rows of {twice} are in another compacted file too."
        seen.update(record["replaces"])


def _replaced(compactions: Mapping[str, dict[str, Any]]) -> set[str]:
    """Files that nobody reads any more, because their rows are in another one."""
    now = 1000 * time.time()
    effective = (record for record in compactions.values() if record["effective_ms"] <= now)
    return {path for record in effective for path in record["replaces"]}


def _compaction_problems(
    compactions: Mapping[str, dict[str, Any]], num_rows: Mapping[str, int]
) -> Iterator[str]:
    """Compacted files that have other rows than what they replaced, by all records' counts."""
    for path, record in compactions.items():
        unknown = sorted(record["replaces"] - num_rows.keys())
        if unknown:
            yield f"{path}: no record names {unknown[0]}, which it replaces."
            continue
        found = sum(file["rows"] for file in record["files"])
        expected = sum(num_rows[replaced] for replaced in record["replaces"])
        if found != expected:
            yield (
                f"{path}: it has {found:,} rows where the files that it replaces have {expected:,}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _CheckedRecord:
    """What was found of a record and its files."""

    record: dict[str, Any] | None = None
    """The record; None if it is damaged."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """The files that were checked."""
    problems: list[str] = field(default_factory=list)
    """One sentence for each thing that is wrong."""


def _check_record(
    store: Store, path: str, replaced: Collection[str], on_file: Callable[[str], None]
) -> _CheckedRecord:
    try:
        record = store.files.get_json(path)
    except DamagedFileError as error:
        return _CheckedRecord(problems=[f"{path}: {error}"])
    damage = _record_problem(path, record)
    if damage is not None:
        return _CheckedRecord(problems=[f"{path}: {damage}."])
    problems = []
    files = [file for file in record["files"] if file["path"] not in replaced]
    for file in files:
        on_file(file["path"])
        problem = file_problem(store.files, file)
        if problem is not None:
            problems.append(f"{file['path']}: {problem} (recorded in {path}).")
    return _CheckedRecord(record=record, files=files, problems=problems)


def _value_problems(
    store: Store, shards: Collection[dict[str, Any]], num_rows: Mapping[str, int]
) -> Iterator[str]:
    """Shards that lack raw values which their run keeps, or have too many.

    Nothing is read: a commit record names the files that were written with it, with their rows,
    also after they were compacted.

    Args:
        store: the store.
        shards: the counts of the commit records.
        num_rows: rows of every file that a record names.
    """
    records = {run: store.run_record(run) for run in sorted({shard["run"] for shard in shards})}
    for shard in shards:
        record = records[shard["run"]]
        values = record["capture"].get("values")
        if values is None or not _is_kept(values, "tasks", shard["task"]):
            continue
        place = shard["run"], shard["task"]
        widths = {
            layout.values_path(*place, site["site"], site["layer"], shard["shard"]): site["width"]
            for site in record["sites"]
            if _is_kept(values, "sites", site["site"]) and _is_kept(values, "layers", site["layer"])
        }
        name = f"run {shard['run']}, task {shard['task']}, shard {shard['shard']}"
        if missing := sorted(widths.keys() - num_rows.keys()):
            yield f"{name}: its commit record names no {missing[0]}, and the run keeps raw values."
            continue
        # All neurons have values of the same positions, and of all of them if none are drawn.
        found = [num_rows[path] // width for path, width in widths.items()]
        counted = shard["num_counted"]
        positions = counted if values["share"] == 1 else min(counted, mode(found))
        for path, width in widths.items():
            if num_rows[path] != width * positions:
                yield (
                    f"{name}: {path} has {num_rows[path]:,} rows where {width:,} neurons have "
                    f"raw values of {positions:,} positions."
                )


def _is_kept(values: dict[str, Any], kind: str, name: str | int) -> bool:
    """Whether raw values of a site, layer or task are kept: of all, unless some were chosen."""
    return values[kind] is None or name in values[kind]


def file_problem(files: StoreFiles, file: dict[str, Any]) -> str | None:
    """What is wrong with a file, compared with what a record says of it; None if nothing is."""
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
    # DuckDB only loads where stores are queried.
    from storage.catalog import fetch

    try:
        # By the views that other clients use: what keeps those from reading is a problem too.
        rows = fetch(store.connect(), load_query("storage", "reconcile").text).to_pylist()
    except QueryError as error:
        yield f"the tables cannot be read: {error}"
        return
    for row in rows:
        key = f"run {row.pop('run')}, task {row.pop('task')}, shard {row.pop('shard')}"
        found = ", ".join(f"{name} {value}" for name, value in row.items())
        yield f"{key}: samples, tokens and statistics do not agree: {found}."
