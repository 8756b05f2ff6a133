"""The views show committed files only, on stores that are empty, growing, finished or damaged."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from storage import TABLES, QueryError, Store, StoreError, following, open_store
from storage.views import VIEWS, committed_lists, view_statements


@pytest.fixture
def empty_store(tmp_path: Path) -> Store:
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    return open_store(tmp_path / "empty")


def test_every_view_of_an_empty_store_has_its_columns_and_no_rows(empty_store: Store) -> None:
    for view in VIEWS:
        relation = empty_store.sql(f"from {view}")
        assert relation.fetchall() == [], view
        if view in TABLES:
            assert relation.columns == [*TABLES[view].partitions, *TABLES[view].schema.names]


def test_views_have_the_same_columns_and_types_with_and_without_rows(
    empty_store: Store, store: Store
) -> None:
    for view in VIEWS:
        assert describe(empty_store, view) == describe(store, view), view


def describe(store: Store, view: str) -> list[Any]:
    return store.sql(f"select column_name, column_type from (describe {view})").fetchall()


def test_views_count_what_was_committed(store: Store) -> None:
    assert store.sql("select * from commits order by task, shard").fetchall() == [
        ("run-1", "code", 0, 1, 21, 20, 0, 3, commit_bytes(store, "code", 0)),
        ("run-1", "code", 1, 1, 21, 20, 0, 3, commit_bytes(store, "code", 1)),
        ("run-1", "code", 2, 1, 21, 20, 0, 3, commit_bytes(store, "code", 2)),
        ("run-1", "mixed", 0, 1, 16, 15, 0, 3, commit_bytes(store, "mixed", 0)),
        ("run-1", "mixed", 1, 1, 16, 15, 0, 3, commit_bytes(store, "mixed", 1)),
    ]
    assert store.sql("select task, count(*) from tokens group by all order by all").fetchall() == [
        ("code", 63),
        ("mixed", 32),
    ]
    assert store.sql(
        "select run, num_shards, num_committed, num_tokens, is_complete from runs"
    ).fetchall() == [("run-1", 5, 5, 95, True)]
    assert store.sql(
        "select task, is_reference, num_tokens, committed_counted from tasks order by task"
    ).fetchall() == [("code", False, 63, 60), ("mixed", True, 32, 30)]


def commit_bytes(store: Store, task: str, shard: int) -> int:
    paths = store.files.list(f"runs/run=run-1/*/task={task}/**/shard-{shard:05d}.parquet")
    assert len(paths) == 3
    return sum(store.files.size(path) for path in paths)


def test_files_of_a_shard_without_a_commit_record_are_not_seen(
    builder: Any, activations: Callable[..., Any]
) -> None:
    builder.add_shard("code", 0, activations(0))
    files = builder.add_shard("code", 1, activations(1), commit=False)
    store = builder.finish()
    for view in ("samples", "tokens", "stats"):
        assert store.sql(f"select distinct shard from {view}").fetchall() == [(0,)], view
    assert store.sql("select max(n) from neuron_stats").fetchall() == [(20,)]
    assert store.sql("select num_committed, is_complete from runs").fetchall() == [(1, False)]
    builder.commit("code", 1, files)
    assert store.sql("select max(n) from neuron_stats").fetchall() == [(40,)]
    assert store.sql("select num_committed, is_complete from runs").fetchall() == [(2, True)]


def test_a_file_that_no_record_names_is_not_seen(store: Store) -> None:
    before = store.sql("select count(*), sum(n) from stats").fetchall()
    orphan = store.files.get_table("runs/run=run-1/stats/task=code/stage-00/shard-00000.parquet")
    store.files.put_table(
        "runs/run=run-1/stats/task=code/stage-01/shard-00000.parquet", "stats", orphan
    )
    store.files.put_table(
        "runs/run=run-1/stats/task=stray/stage-00/shard-00000.parquet", "stats", orphan
    )
    assert store.sql("select count(*), sum(n) from stats").fetchall() == before


def test_a_store_that_was_opened_before_its_first_commit_sees_it(
    builder: Any, activations: Callable[..., Any]
) -> None:
    builder.store.files.put_json("runs/run=run-1/run.json", {})
    store = open_store(builder.root)
    assert store.sql("select count(*) from stats").fetchall() == [(0,)]
    assert store.sql("from commits").fetchall() == []
    builder.add_shard("code", 0, activations(0))
    builder.finish()
    assert store.sql("select count(*) from stats").fetchall() == [(20,)]
    assert store.sql("select task, shard from commits").fetchall() == [("code", 0)]
    assert store.render("select study from runs", max_width=80, max_rows=5).count("hand-made") == 1


def test_a_committed_file_that_is_gone_is_named_and_not_left_out(store: Store) -> None:
    path = "runs/run=run-1/stats/task=code/stage-00/shard-00000.parquet"
    store.files.local(path).unlink()
    with pytest.raises(QueryError, match=path):
        store.sql("select count(*) from stats").fetchall()


def test_a_run_that_is_deleted_and_captured_again_is_read_anew(
    builder: Any, activations: Callable[..., Any]
) -> None:
    builder.add_shard("code", 0, activations(0))
    store = builder.finish()
    path = store.files.local("runs/run=run-1/run.json")
    assert store.sql("select sum(n) from stats").fetchall() == [(400,)]
    stats = store.files.local("runs/run=run-1/stats/task=code")
    (stats / "stage-00").rename(stats / "stage-07")
    commit = store.files.local("runs/run=run-1/commits/task=code/shard-00000.json")
    commit.write_text(commit.read_text().replace("stage-00", "stage-07"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    assert store.sql("select sum(n) from stats").fetchall() == [(400,)]


def test_records_are_read_again_only_when_there_is_another(
    builder: Any, activations: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder.add_shard("code", 0, activations(0))
    store = builder.finish()
    looked_up = []
    monkeypatch.setattr(
        following, "committed_lists", lambda files: looked_up.append(1) or committed_lists(files)
    )
    for _ in range(3):
        assert store.sql("select sum(n) from stats").fetchall() == [(400,)]
    assert len(looked_up) == 1
    builder.add_shard("code", 1, activations(1))
    for _ in range(3):
        assert store.sql("select sum(n) from stats").fetchall() == [(800,)]
    assert len(looked_up) == 2


def test_a_damaged_run_record_stops_what_reads_it_alone(store: Store) -> None:
    store.files.put("runs/run=broken/run.json", b"{")
    for reader in (store, open_store(store.files.root)):
        assert reader.sql("select count(*) from tokens").fetchall() == [(95,)]
        with pytest.raises(QueryError, match="run=broken"):
            reader.table("select * from runs")


def test_rows_of_an_analysis_are_seen_once_its_manifest_is_written(store: Store) -> None:
    row = {
        "run": "run-1", "task": "code", "metric": "abs", "site": "mlp", "layer": 0, "neuron": 1,
        "head": None, "importance": 0.5,
    }  # fmt: skip
    schema = TABLES["importance"].schema
    file = store.files.put_table(
        "analyses/analysis=a/importance.parquet", "importance", schema.empty_table()
    )
    assert store.sql("from importance").fetchall() == []
    file = store.files.put_table(file.path, "importance", pa.Table.from_pylist([row], schema))
    manifest = {"analysis": "a", "run": "run-1", "parameters": {"eps": 0.1}}
    store.files.put_json(
        "analyses/analysis=a/analysis.json", manifest | {"files": [file.to_dict()]}
    )
    assert store.sql("select analysis, task, importance from importance").fetchall() == [
        ("a", "code", 0.5)
    ]
    assert store.sql("select analysis, run, tables, num_rows from analyses").fetchall() == [
        ("a", "run-1", ["importance"], 1)
    ]


def test_the_views_that_are_printed_work_in_a_connection_of_anyone(store: Store) -> None:
    connection = duckdb.connect()
    connection.execute(store.views_sql())
    for view in VIEWS:
        query = f"select * from {view} order by all"
        assert connection.sql(query).fetchall() == store.sql(query).fetchall(), view
    assert connection.sql("select count(*) from neuron_stats").fetchall() == [(40,)]


def test_printed_views_say_what_they_are(store: Store) -> None:
    for statement in view_statements(store.files):
        purpose, grain, create, *_ = statement.splitlines()
        assert purpose.startswith("-- "), statement
        assert grain.startswith("-- one row per "), statement
        assert create.startswith("create or replace view "), statement


def test_a_wrong_query_gets_the_message_of_duckdb(store: Store) -> None:
    with pytest.raises(QueryError, match="Table with name nothing does not exist"):
        store.sql("select * from nothing")
    with pytest.raises(QueryError, match='Referenced column "neurone" not found'):
        store.sql("select neurone from stats")
    with pytest.raises(QueryError, match="Conversion Error"):
        store.render("select cast(task as integer) from tasks", max_width=80, max_rows=5)
    with pytest.raises(QueryError) as caught:
        store.sql("-- a comment alone")
    assert str(caught.value) == "a query must be one statement, found 0: ask one by one."


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("copy tasks to '{folder}/out.csv'", "found a statement of type COPY"),
        ("attach '{folder}/out.db' as other", "found a statement of type ATTACH"),
        ("create table kept as from tasks", "found a statement of type CREATE"),
        ("set threads = 1", "found a statement of type SET"),
        ("select 1; copy tasks to '{folder}/out.csv'", "must be one statement, found 2"),
    ],
)
def test_a_query_that_does_more_than_read_is_refused_and_does_nothing(
    store: Store, tmp_path: Path, query: str, message: str
) -> None:
    query = query.format(folder=tmp_path)
    before = sorted(tmp_path.iterdir())
    for ask in (
        lambda: store.sql(query),
        lambda: store.render(query, max_width=80, max_rows=5),
        lambda: store.export(query, tmp_path / "result.csv", "csv"),
    ):
        with pytest.raises(QueryError, match=message):
            ask()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "query",
    ["describe stats", "explain select 1", "summarize tasks", "pivot tasks on task using count(*)"],
)
def test_whatever_reads_can_be_shown_and_exported(store: Store, tmp_path: Path, query: str) -> None:
    assert store.render(query, max_width=80, max_rows=5)
    for file_format in ("csv", "json", "parquet"):
        store.export(query, tmp_path / file_format, file_format)
        assert (tmp_path / file_format).stat().st_size > 0


@pytest.mark.parametrize(
    "path",
    [
        "runs/run=run-1/commits/task=code/shard-00000.json",
        "runs/run=run-1/run.json",
        "runs/run=run-1/stats/task=code/stage-00/shard-00000.parquet",
        "runs/run=run-1/stats/task=code/stage-00/shard-00001.parquet",
    ],
)
def test_a_damaged_file_is_named_when_it_is_read(store: Store, path: str) -> None:
    store.files.put(path, b"no more than this, which is neither")
    with pytest.raises(QueryError, match=path.split("/")[-1]):
        open_store(store.files.root).table("select * from runs cross join stats")


def test_parameters_are_bound_not_pasted(store: Store) -> None:
    query = "select count(*) from tokens where task = $task"
    assert store.sql(query, {"task": "code"}).fetchall() == [(63,)]
    assert store.sql(query, {"task": "code' or '1' = '1"}).fetchall() == [(0,)]


@pytest.mark.parametrize(
    ("file_format", "expected"),
    [
        ("csv", "task,shards\ncode,3\nmixed,2\n"),
        ("json", '[\n\t{"task":"code","shards":3},\n\t{"task":"mixed","shards":2}\n]\n'),
    ],
)
def test_results_are_exported(
    store: Store, tmp_path: Path, file_format: str, expected: str
) -> None:
    query = "select task, count(*) as shards from commits group by task order by task"
    store.export(query, tmp_path / "out's", file_format)
    assert (tmp_path / "out's").read_text() == expected


def test_an_export_that_cannot_be_written_says_so(store: Store, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"IO Error: .*/nowhere/out"):
        store.export("select 1", tmp_path / "nowhere" / "out", "csv")


def test_runs_are_found_by_id_or_alone(builder: Any, activations: Callable[..., Any]) -> None:
    builder.add_shard("code", 0, activations(0))
    store = builder.finish()
    assert store.resolve_run(None) == "run-1"
    with pytest.raises(StoreError) as caught:
        store.resolve_run("x")
    assert str(caught.value) == f"no run 'x' in {store.files.root}: the runs there are: run-1."
    store.files.put_json("runs/run=run-2/run.json", {})
    with pytest.raises(StoreError) as caught:
        store.resolve_run(None)
    assert str(caught.value) == (
        "which run is meant must be said when a store does not have exactly one; the runs in "
        f"{store.files.root} are: run-1, run-2. Pass --run."
    )


def test_a_run_record_larger_than_any_usual_json_is_read(
    builder: Any, activations: Callable[..., Any]
) -> None:
    builder.add_shard("code", 0, activations(0))
    store = builder.finish()
    record = store.run_record("run-1")
    record["shards"] += [{"task": "code", "shard": n, "note": "x" * 2000} for n in range(1, 20_000)]
    store.files.put_json("runs/run=run-1/run.json", record)
    assert open_store(builder.root).sql("select num_shards from runs").fetchall() == [(20_000,)]


def test_files_and_views_name_the_store_alike(store: Store) -> None:
    names = store.sql("select filename from committed_files order by all").fetchall()
    paths = store.files.list("runs/**/*.parquet")
    assert [name for (name,) in names] == [f"{store.files.root}/{path}" for path in paths]
    assert len(paths) == 15
