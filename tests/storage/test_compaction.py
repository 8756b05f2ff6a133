"""Compaction changes which files there are and no answer, whatever is killed and whoever reads."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest

from storage import (
    QueryError,
    Store,
    StoreError,
    collect_garbage,
    compact_run,
    open_store,
    verify_store,
)

ORDERS = {
    "stats": "task, site, layer, neuron, shard",
    "tokens": "task, sample, position",
    "samples": "task, sample",
    "neuron_stats": "task, site, layer, neuron",
}


def answers(store: Store) -> dict[str, pa.Table]:
    return {
        name: store.table(f"from {name} order by {order}").combine_chunks()
        for name, order in ORDERS.items()
    }


def parquet(store: Store) -> set[str]:
    return set(store.files.list("runs/*/*/**/*.parquet"))


def compact(store: Store, **options: Any) -> list[str]:
    """Paths of the new files, which replace the old ones at once."""
    made = compact_run(store, "run-1", seconds_to_effect=0, **options)
    return [compacted.file.path for compacted in made]


@pytest.fixture
def filled(
    store_root: str, new_builder: Callable[..., Any], activations: Callable[..., Any]
) -> Any:
    """A builder of a run of two tasks, in each kind of store."""
    builder = new_builder(store_root)
    for shard in range(3):
        builder.add_shard("code", shard, activations(shard))
    for shard in range(2):
        builder.add_shard("mixed", shard, activations(10 + shard, positions=15))
    builder.finish()
    return builder


def test_answers_are_the_same_before_and_after(filled: Any) -> None:
    root = filled.store.files.root
    before = answers(filled.store)
    made = compact(filled.store)
    assert sorted(path.split("/")[2:4] for path in made) == [
        [table, f"task={task}"] for table in ("stats", "tokens") for task in ("code", "mixed")
    ]
    # Readers of object stores take listings that are ten seconds old: each here is a new one.
    store = open_store(root)
    inputs = store.files.list("runs/*/samples/*/*")
    read = {row[0] for row in store.sql("select filename from committed_files").fetchall()}
    assert read == {f"{root}/{path}" for path in (*made, *inputs)}
    assert answers(store) == before
    assert len(collect_garbage(store, seconds=0).paths) == 2 * 5
    store = open_store(root)
    assert parquet(store) == {*made, *inputs}
    assert answers(store) == before
    assert verify_store(store).problems == []
    assert compact(store) == []


def test_shards_that_are_committed_later_join_the_others(
    store: Store, builder: Any, activations: Callable[..., Any]
) -> None:
    compact(store)
    builder.add_shard("code", 3, activations(3))
    grown = answers(builder.finish())
    made = compact(store)
    assert [path.split("/")[-1][:18] for path in made] == ["shards-00000-00003"] * 2
    assert answers(store) == grown
    assert len(collect_garbage(store, seconds=0).paths) == 2 * 5 + 2 * 2
    assert answers(store) == grown
    assert verify_store(store).problems == []


def test_rows_of_a_neuron_lie_together(store: Store) -> None:
    compact(store)
    (path,) = store.files.list("runs/*/stats/task=code/compacted/*.parquet")
    rows = store.files.get_table(path).select(["site", "layer", "neuron", "shard"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == sorted(tuple(row.values()) for row in rows)
    assert len(rows) == 3 * 20


def test_files_that_are_large_enough_stay(store: Store) -> None:
    stats = [store.files.size(path) for path in store.files.list("runs/*/stats/*/*/*")]
    two_of_three = compact(store, file_bytes=int(2.5 * max(stats)))
    (made,) = [path for path in two_of_three if "/stats/task=code/" in path]
    assert made.split("/")[-1].startswith("shards-00000-00001-")
    assert compact(store, file_bytes=min(stats)) == []


def test_old_files_are_read_until_the_record_takes_effect(store: Store) -> None:
    before = answers(store)
    old = parquet(store)
    for made in compact_run(store, "run-1", seconds_to_effect=60):
        # As if readers' listings were older than the record.
        store.files.local(made.file.path).rename(store.files.local("new"))
        assert answers(store) == before
        store.files.local("new").rename(store.files.local(made.file.path))
    assert collect_garbage(store, seconds=30).paths == []
    assert parquet(store) > old
    assert verify_store(store).problems == []


def test_a_connection_reads_the_new_files_from_when_the_record_takes_effect(store: Store) -> None:
    before = answers(store)
    made = [made.file.path for made in compact_run(store, "run-1", seconds_to_effect=1)]
    assert answers(store) == before
    for path in made:
        store.files.local(path).unlink()
    time.sleep(1)
    with pytest.raises(QueryError, match=r"compacted/shards-00000"):
        answers(store)


def test_killed_between_file_and_record_nothing_changed_and_garbage_is_found(
    store: Store,
) -> None:
    before, old = answers(store), parquet(store)
    with (
        patch.object(type(store.files), "put_json", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        compact(store)
    (orphan,) = parquet(store) - old
    assert answers(store) == before
    young = collect_garbage(store, seconds=60)
    assert (young.paths, young.num_kept) == ([], 1)
    hour_ago = time.time() - 3600
    os.utime(store.files.local(orphan), (hour_ago, hour_ago))
    assert collect_garbage(store, seconds=60, dry_run=True).paths == [orphan]
    assert orphan in parquet(store)
    found = collect_garbage(store, seconds=60)
    assert (found.paths, found.num_bytes > 0) == ([orphan], True)
    assert parquet(store) == old
    assert len(compact(store)) == 4
    assert answers(store) == before


def test_what_killed_processes_leave_is_garbage_and_files_of_others_are_not(
    tmp_path: Path, store: Store
) -> None:
    root = tmp_path / "store"
    left = [
        root / "planning-7-abc/samples/task=code/shard-00000.parquet",
        root / "runs/run=run-1/stats/task=code/stage-00/.shard-00009.parquet.ff.tmp",
        root / "runs/run=run-1/stats/task=code/stage-01/shard-00009.parquet",
        root / "analyses/analysis=overlap-1/scores.parquet",
    ]
    notes = root / "notes.txt"
    for path in (*left, notes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    named = set(store.files.list("runs/*/*/**/shard-*.parquet")) - {
        path.relative_to(root).as_posix() for path in left
    }
    found = collect_garbage(store, seconds=0)
    assert {root / path for path in found.paths} == set(left)
    assert parquet(store) == named
    assert notes.exists()
    assert not left[0].parents[2].exists()
    assert store.files.exists("runs/run=run-1/run.json")
    assert verify_store(store).problems == []


def test_of_two_compactions_at_a_time_one_gives_up(store: Store) -> None:
    before = answers(store)
    first, second = (compact_run(store, "run-1", seconds_to_effect=0) for _ in range(2))
    next(first)
    next(second)  # It has listed what there is after the first one's file, and takes the next.
    with pytest.raises(StoreError, match=r"was put together with other files by somebody else"):
        list(first)
    list(second)
    assert answers(store) == before
    assert verify_store(store).problems == []


def test_a_shard_that_is_not_committed_yet_finds_its_place(
    builder: Any, activations: Callable[..., Any]
) -> None:
    for shard in (0, 1, 3, 4):
        builder.add_shard("code", shard, activations(shard))
    made = compact(builder.finish())
    assert sorted(path.split("/")[-1][:18] for path in made) == [
        "shards-00000-00001", "shards-00000-00001", "shards-00003-00004", "shards-00003-00004"
    ]  # fmt: skip


def test_readers_go_on_and_every_answer_is_right(store: Store) -> None:
    query = "select count(*), sum(n), sum(pos_count) from stats"
    expected = store.sql(query).fetchall()
    stop, wrong, asked = threading.Event(), [], 0

    def ask() -> None:
        nonlocal asked
        reader = open_store(store.files.root)
        while not stop.is_set():
            asked += 1
            if (found := reader.sql(query).fetchall()) != expected:
                wrong.append(found)

    readers = [threading.Thread(target=ask) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in compact_run(store, "run-1", seconds_to_effect=0.5):
            time.sleep(0.1)
        deadline = time.monotonic() + 30
        while len(collect_garbage(store, seconds=1).paths) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.3)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    assert asked > 10


def test_a_damaged_file_is_named_and_never_becomes_part_of_another(store: Store) -> None:
    path = store.files.list("runs/*/stats/task=code/stage-00/*.parquet")[1]
    content = bytearray(store.files.local(path).read_bytes())
    content[100] ^= 1
    store.files.local(path).write_bytes(content)
    with pytest.raises(
        StoreError, match=rf"^{path}: the content was altered: .* Restore it from a copy before"
    ):
        compact(store)
    with pytest.raises(StoreError, match="no run 'other' in"):
        list(compact_run(store, "other"))


def test_a_damaged_compaction_record_is_named(store: Store) -> None:
    compact(store)
    path = store.files.list("runs/*/compactions/task=code/*.json")[0]
    store.files.put_json(path, store.files.get_json(path) | {"replaces": None, "run": "r"})
    store.files.local(path).write_text("{", encoding="utf-8")
    (problem,) = [p for p in verify_store(store).problems if path in p]
    assert problem.startswith(f"{path}: cannot read")
