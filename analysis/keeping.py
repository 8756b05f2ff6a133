"""Keeping an analysis in a store: what it was made of, its id, its tables, and its record, last."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa

from analysis.errors import AnalysisError
from storage import FileRecord, Store, layout
from storage.files import canonical_json

__all__ = ["Analysis", "ComputedTables", "committed_lineage", "keep"]


class Computed(Protocol):
    """Where the rows of computed tables come from."""

    def batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """Rows of a table, in order."""


class ComputedTables(dict[str, pa.Table]):
    """Computed tables by name, for analyses that are not made of SQL steps."""

    def batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """Rows of a table, in order."""
        yield from self[name].to_batches()


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """A finished analysis."""

    id: str
    """Its id: the value of column ``analysis``, and the name of its folder."""
    files: tuple[FileRecord, ...]
    """Its tables."""
    is_new: bool
    """False if the very same analysis was already in the store."""


def keep(
    store: Store,
    kind: str,
    key: dict[str, Any],
    tables: Sequence[str],
    compute: Callable[[], Computed],
) -> Analysis:
    """Compute an analysis and keep it in the store, unless it is there already.

    The id is a digest of `key`, so the same question of the same data is answered once.

    Args:
        store: the store to write to.
        kind: the first part of the id.
        key: all that decides the result, JSON-ready: ``run``, ``parameters`` and ``lineage``. The
            record holds the same.
        tables: names of the tables to keep.
        compute: gives the rows of each of `tables`, such as `Steps` that computed them.

    Raises:
        StoreError: if the store cannot be written.
    """
    analysis = f"{kind}-{hashlib.sha256(canonical_json(key)).hexdigest()[:8]}"
    manifest = layout.analysis_manifest_path(analysis)
    if store.files.exists(manifest):
        files = store.files.get_json(manifest)["files"]
        return Analysis(
            id=analysis, files=tuple(FileRecord(**file) for file in files), is_new=False
        )
    computed = compute()
    folder = layout.analysis_folder(analysis)
    written = tuple(
        store.files.put_batches(f"{folder}/{name}.parquet", name, computed.batches(name))
        for name in tables
    )
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    store.files.put_json(
        manifest,
        {"analysis": analysis, **key, "created": created, "files": [f.to_dict() for f in written]},
    )
    return Analysis(id=analysis, files=written, is_new=True)


def committed_lineage(
    store: Store, record: dict[str, Any], *, partial: bool, advice: str
) -> dict[str, Any]:
    """The committed shards of a run, as the lineage of what is made of them.

    Args:
        store: the store that holds the run.
        record: the run's record.
        partial: whether the run may lack shards.
        advice: what to do if it does and may not; ends the error's sentence.

    Raises:
        AnalysisError: if shards are missing and `partial` is false, or a task has none at all.
    """
    run = record["run"]
    committed = sorted(store.committed(run))
    planned = len(record["shards"])
    if len(committed) < planned and not partial:
        raise AnalysisError(
            f"the capture of run {run!r} is not complete ({len(committed)} of {planned} shards "
            f"are committed): {advice}."
        )
    if missing := {task["task"] for task in record["tasks"]} - {task for task, _ in committed}:
        raise AnalysisError(
            f"task {min(missing)!r} of run {run!r} has no committed shard yet: capture more first."
        )
    return {"num_shards": len(committed), "shards": [list(shard) for shard in committed]}
