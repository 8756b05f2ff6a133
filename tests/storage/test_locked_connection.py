"""A locked connection reads its store, wherever that is, and nothing else."""

import threading
from pathlib import Path

import pytest

from storage import QueryError, QueryInterruptedError, create_store
from storage.catalog import execute, fetch, interrupt, lock, stream, syntax_tree
from written_runs import importances, write_run


def test_a_locked_connection_reads_its_store_alone(store_root: str, tmp_path: Path) -> None:
    store = create_store(store_root)
    write_run(store, "small-1", importances(1))
    secret = tmp_path / "outside" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("secret")
    connection = store.connect(threads=1)
    lock(connection, store.files)
    assert fetch(connection, "select count(*) as n from neuron_stats").to_pylist() == [{"n": 168}]
    with pytest.raises(QueryError, match="file system operations are disabled"):
        fetch(connection, f"select * from read_text('{secret}')")
    with pytest.raises(QueryError, match="locked"):
        execute(connection, "set threads = 8")
    with pytest.raises(QueryError, match="disabled"):
        execute(connection, "load httpfs")


def test_rows_are_streamed_and_can_be_left(store_root: str) -> None:
    store = create_store(store_root)
    write_run(store, "small-1", importances(1))
    connection = store.connect(threads=1)
    query = "select i, $x::double as x from range(1000000000) t(i)"
    for _ in range(2):
        with stream(connection, query, {"x": 0.5}, batch_rows=10) as rows:
            assert rows.columns == [("i", "BIGINT"), ("x", "DOUBLE")]
            assert next(rows.batches).to_pylist()[3] == {"i": 3, "x": 0.5}
    threading.Timer(0.3, interrupt, [connection]).start()
    slow = "select count(*) from range(1000000000000) t(i) where i % 1000003 = 7"
    with pytest.raises(QueryInterruptedError), stream(connection, slow, batch_rows=10) as rows:
        list(rows.batches)
    assert fetch(connection, "select 1 as a").to_pylist() == [{"a": 1}]


def test_only_queries_have_a_syntax_tree(store_root: str) -> None:
    store = create_store(store_root)
    write_run(store, "small-1", importances(1))
    connection = store.connect(threads=1)
    assert len(syntax_tree(connection, "select 1; select 2")["statements"]) == 2
    assert syntax_tree(connection, "drop view runs")["error_type"] == "not implemented"
    assert syntax_tree(connection, "selec")["error_type"] == "parser"
