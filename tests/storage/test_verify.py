"""verify names every file that is not what was committed, and counts that do not agree."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage import TABLES, Store, compact_run, layout, open_store, verify_store
from storage.values import encode_rows, place_lists

STATS = "runs/run=run-1/stats/task=code/stage-00/shard-00001.parquet"
TOKENS = "runs/run=run-1/tokens/task=code/shard-00001.parquet"
COMMIT = "runs/run=run-1/commits/task=code/shard-00001.json"


def problems(store: Store) -> list[str]:
    return verify_store(open_store(store.files.root)).problems


def test_a_whole_store_has_no_problems(store: Store) -> None:
    seen: list[str] = []
    report = verify_store(store, on_file=seen.append)
    assert report.problems == []
    assert report.num_shards == 5
    assert report.num_files == len(seen) == 15
    assert report.num_bytes == sum(store.files.size(path) for path in seen)


def test_a_truncated_file_is_named(store: Store) -> None:
    path = store.files.local(STATS)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    [problem] = problems(store)
    assert problem == (
        f"{STATS}: the file has {size - 100:,} bytes where {size:,} were committed "
        f"(recorded in {COMMIT})."
    )


def test_an_altered_byte_is_named(store: Store) -> None:
    path = store.files.local(TOKENS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    [problem] = problems(store)
    assert problem == (
        f"{TOKENS}: the content was altered: its SHA-256 differs from the committed one "
        f"(recorded in {COMMIT})."
    )


def test_a_missing_file_is_named(store: Store) -> None:
    store.files.local(TOKENS).unlink()
    store.files.local(STATS).unlink()
    assert sorted(problems(store)) == [
        f"{STATS}: the file is missing (recorded in {COMMIT}).",
        f"{TOKENS}: the file is missing (recorded in {COMMIT}).",
    ]


def test_a_file_that_was_committed_with_other_rows_is_named(store: Store) -> None:
    edit(store, COMMIT, lambda record: record["files"][1].update(rows=7))
    assert problems(store) == [
        f"{STATS}: the file has 20 rows where 7 were committed (recorded in {COMMIT})."
    ]


def test_a_committed_file_that_is_no_parquet_is_named(store: Store) -> None:
    local = store.files.local(TOKENS)
    local.write_bytes(b"x" * 50)
    digest = store.files.sha256(TOKENS)
    edit(store, COMMIT, lambda record: record["files"][2].update(bytes=50, sha256=digest))
    [problem] = problems(store)
    assert problem.startswith(f"{TOKENS}: the file is not readable Parquet: ")


def edit(store: Store, path: str, change: Callable[[Any], Any]) -> None:
    record = store.files.get_json(path)
    change(record)
    store.files.put_json(path, record)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", '{"run": "run-1"}'])
def test_a_damaged_commit_record_is_named(store: Store, content: str) -> None:
    store.files.put(COMMIT, content.encode())
    [problem] = problems(store)
    assert problem.startswith(f"{COMMIT}: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("files"),
        lambda record: record.pop("num_tokens"),
        lambda record: record.update(files="none"),
        lambda record: record["files"].append("a path"),
        lambda record: record["files"][0].pop("sha256"),
        lambda record: record["files"][0].update(bytes="many"),
    ],
)
def test_a_commit_record_that_lacks_what_it_must_say_is_named(
    store: Store, change: Callable[[Any], Any]
) -> None:
    edit(store, COMMIT, change)
    assert problems(store) == [
        f"{COMMIT}: the record is damaged: it does not hold what a record must."
    ]


def test_a_commit_record_in_the_place_of_another_is_named(store: Store) -> None:
    other = layout.commit_path("run-1", "code", 9)
    store.files.put_json(other, store.files.get_json(COMMIT))
    assert problems(store) == [f"{other}: the record speaks of another shard, {COMMIT}."]


@pytest.mark.parametrize(
    ("count", "wrong"), [("num_samples", 2), ("num_tokens", 23), ("num_counted", 19)]
)
def test_a_commit_record_with_other_counts_is_named(store: Store, count: str, wrong: int) -> None:
    edit(store, COMMIT, lambda record: record.update({count: wrong}))
    [problem] = problems(store)
    assert problem.startswith(
        "run run-1, task code, shard 1: samples, tokens and statistics do not agree: "
    )
    assert f"{count} {wrong}, " in problem


def test_a_shard_that_lacks_statistics_of_some_neurons_is_named(
    builder: Any, activations: Callable[..., Any]
) -> None:
    builder.add_shard("code", 0, activations(0))
    few = activations(1)
    builder.add_shard("code", 1, {("mlp", 0): few["mlp", 0]})
    builder.add_shard("code", 2, activations(2))
    [problem] = problems(builder.finish())
    assert problem.startswith("run run-1, task code, shard 1: ")
    assert problem.endswith("num_neurons 20, neuron_rows 6.")


def test_a_neuron_that_is_there_twice_is_noticed(
    builder: Any, activations: Callable[..., Any]
) -> None:
    files = builder.add_shard("code", 0, activations(0), commit=False)
    table = builder.store.files.get_table(files[2].path)
    twice = table.take([0, 0, *range(2, table.num_rows)])
    stats = builder.store.files.put_table(files[2].path, "stats", twice)
    builder.commit("code", 0, [*files[:2], stats])
    [problem] = problems(builder.finish())
    assert problem.startswith("run run-1, task code, shard 0: ")


def test_a_run_without_its_record_is_named(store: Store) -> None:
    store.files.local("runs/run=run-1/run.json").unlink()
    assert problems(store) == [
        "runs/run=run-1/run.json: the file is missing, and the run has committed shards."
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": "run-1"}'])
def test_a_damaged_run_record_is_named(store: Store, content: str) -> None:
    store.files.put("runs/run=run-1/run.json", content.encode())
    [problem] = problems(store)
    assert problem.startswith("runs/run=run-1/run.json: ")


def test_files_of_analyses_are_checked_too(store: Store) -> None:
    manifest = "analyses/analysis=a/analysis.json"
    file = store.files.put_table(
        "analyses/analysis=a/scores.parquet", "scores", TABLES["scores"].schema.empty_table()
    )
    store.files.put_json(manifest, {"analysis": "a", "files": [file.to_dict()]})
    report = verify_store(open_store(store.files.root))
    assert (report.problems, report.num_files, report.num_shards) == ([], 16, 5)
    store.files.local(file.path).unlink()
    assert problems(store) == [f"{file.path}: the file is missing (recorded in {manifest})."]


def test_all_problems_of_a_store_are_told_at_once(store: Store) -> None:
    store.files.local(STATS).unlink()
    store.files.put("runs/run=run-1/commits/task=mixed/shard-00000.json", b"{")
    assert len(problems(store)) == 2


def test_parts_of_shards_that_are_not_committed_are_no_problem(
    builder: Any, activations: Callable[..., Any]
) -> None:
    builder.add_shard("code", 0, activations(0))
    tokens = builder.add_shard("code", 1, activations(1), commit=False)[1]
    store = builder.finish()
    store.files.put_table(tokens.path, "tokens", store.files.get_table(tokens.path).slice(3))
    assert problems(store) == []


def test_tables_that_cannot_be_read_are_a_problem_too(
    builder: Any, activations: Callable[..., Any]
) -> None:
    # DuckDB takes the columns of a table from its first file, committed or not.
    tokens = builder.add_shard("code", 0, activations(0), commit=False)[1]
    builder.add_shard("code", 1, activations(1))
    store = builder.finish()
    store.files.put(tokens.path, b"half of a copy")
    [problem] = problems(store)
    assert problem.startswith("the tables cannot be read: the store cannot be queried, ")
    assert tokens.path in problem
    # Questions to the store itself go to committed files alone.
    assert store.sql("select distinct shard from tokens").fetchall() == [(1,)]


WIDTHS = {("attn", 0): 4, ("mlp", 0): 6, ("attn", 1): 4, ("mlp", 1): 6}
LACKING = "runs/run=run-1/values/task=code/site=mlp/layer=00/shard-00001.parquet"


@pytest.fixture
def store_of_values(builder: Any, activations: Callable[..., Any]) -> Callable[..., Store]:
    """Makes a store of raw values of both sites of layers 0 and 1, of some positions of two
    shards of 20 positions; of the second, `num_neurons` of site mlp in layer 0 have values."""

    def make(share: float, num_kept: int, num_neurons: int = 6) -> Store:
        for shard in range(2):
            files = builder.add_shard("code", shard, activations(shard), commit=False)
            for (site, layer), width in WIDTHS.items():
                path = layout.values_path("run-1", "code", site, layer, shard)
                size = num_neurons if path == LACKING else width
                places = np.full(num_kept, shard, np.int32), np.arange(num_kept, dtype=np.int32)
                rows = pa.record_batch(
                    {
                        "block": pa.array([shard] * size, pa.int32()),
                        "neuron": np.arange(size, dtype=np.int32),
                        "head": pa.nulls(size, pa.int16()),
                        **place_lists(*places, size),
                        **encode_rows(np.ones((size, num_kept), np.float32), "float16"),
                    }
                )
                files.append(builder.store.files.put_batches(path, "values", [rows]))
            builder.commit("code", shard, files)
        store: Store = builder.finish()
        kept = {"sites": None, "layers": [0, 1], "tasks": ["code"], "encoding": "float16"}
        values = {"values": kept | {"share": share}}
        edit(store, layout.run_path("run-1"), lambda record: record["capture"].update(values))
        return store

    return make


@pytest.mark.parametrize(("share", "num_kept"), [(1.0, 20), (0.3, 7), (0.3, 0)])
def test_whole_values_are_no_problem_before_and_after_compaction(
    store_of_values: Callable[..., Store], share: float, num_kept: int
) -> None:
    store = store_of_values(share, num_kept)
    assert problems(store) == []
    assert list(compact_run(store, "run-1", seconds_to_effect=0))
    assert problems(store) == []


def test_a_shard_without_a_file_of_values_is_named(store_of_values: Callable[..., Store]) -> None:
    store = store_of_values(0.3, 7)

    def drop(record: Any) -> None:
        record["files"] = [file for file in record["files"] if file["path"] != LACKING]

    edit(store, COMMIT, drop)
    [problem] = problems(store)
    assert problem == (
        f"run run-1, task code, shard 1: its commit record names no {LACKING}, and the run keeps "
        "raw values."
    )


@pytest.mark.parametrize(("share", "num_kept"), [(1.0, 20), (0.3, 7), (0.3, 6)])
def test_a_neuron_without_values_is_noticed(
    store_of_values: Callable[..., Store], share: float, num_kept: int
) -> None:
    store = store_of_values(share, num_kept, num_neurons=5)
    [problem] = problems(store)
    assert problem == (
        f"run run-1, task code, shard 1: {LACKING} has {5 * num_kept} rows where 6 neurons "
        f"have raw values of {num_kept} positions."
    )


def test_fewer_positions_than_count_are_noticed_if_all_are_kept(
    store_of_values: Callable[..., Store],
) -> None:
    found = problems(store_of_values(1.0, 19))
    assert len(found) == 2 * len(WIDTHS)
    assert found[0].startswith("run run-1, task code, shard 0: ")
    assert found[0].endswith("rows where 4 neurons have raw values of 20 positions.")


def test_a_compacted_file_that_lacks_rows_is_named(store_of_values: Callable[..., Store]) -> None:
    store = store_of_values(1.0, 20)
    made = next(m for m in compact_run(store, "run-1", seconds_to_effect=0)
                if "/site=mlp/layer=01/" in m.file.path)  # fmt: skip
    [path] = [
        path for path in store.files.list("runs/*/compactions/*/*.json")
        if store.files.get_json(path)["files"][0]["path"] == made.file.path
    ]  # fmt: skip
    file = store.files.put_table(
        made.file.path, "values", store.files.get_table(made.file.path).slice(3)
    )
    edit(store, path, lambda record: record.update(files=[file.to_dict()]))
    assert problems(store) == [
        f"{path}: it has 237 rows where the files that it replaces have 240."
    ]
