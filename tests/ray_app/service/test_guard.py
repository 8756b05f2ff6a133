"""What people ask passes the guard; the attacks are in test_attacks.py."""

import re
from pathlib import Path

import duckdb
import pytest

from ray_app.service.guard import QueryRefusedError, allowed_functions, check_tree
from storage import open_store
from storage.catalog import syntax_tree

ROOT = Path(__file__).parents[3]
DOCUMENTED = [
    block
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in re.findall(
        r"^```sql\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    root = tmp_path_factory.mktemp("guard")
    (root / "runs").mkdir()
    return open_store(root).connect(threads=1)


def test_documented_queries_pass(connection: duckdb.DuckDBPyConnection) -> None:
    assert len(DOCUMENTED) > 20
    refused = []
    for query in DOCUMENTED:
        try:
            check_tree(syntax_tree(connection, query))
        except QueryRefusedError as error:
            refused.append((query, str(error)))
    # Pivots over values that only the data know are the one kind that is refused.
    assert all(query.startswith("pivot") and "PIVOT" in told for query, told in refused)
    assert len(refused) <= 3


@pytest.mark.parametrize(
    ("query", "views"),
    [
        ("from runs", {"runs"}),
        ("select * from main.overlap", {"overlap"}),
        ("SELECT COUNT(*) FROM Tokens", {"tokens"}),
        ("with a as (select 1), b as (from a) from b", set()),
        ("with runs as (select 1) from runs", set()),
        ("with recursive r as (select 1 a union select a + 1 from r where a < 5) from r", set()),
        ("select (with x as (from runs) select count(*) from x)", {"runs"}),
        ("select * from (pivot overlap on task_a in ('code') using sum(shared))", {"overlap"}),
        ("unpivot overlap on shared, size_a", {"overlap"}),
        ("describe tokens", {"tokens"}),
        ("summarize tokens", {"tokens"}),
        ("show tables", set()),
        ("select * from information_schema.columns", set()),
        ("select list_transform([1], x -> x + 1), [x for x in [1] if x > 0]", set()),
        ("select row_number() over (partition by layer order by score) from scores", {"scores"}),
        ("select * from range(3) a, unnest([1]) b, generate_series(1, 2) c", set()),
        ("select * exclude (run) from runs tablesample 3", {"runs"}),
        ("select columns('s.*') from overlap order by all limit 10%", {"overlap"}),
        ("select " + " + ".join(["1"] * 300), set()),
    ],
)
def test_the_guard_knows_what_is_read(
    connection: duckdb.DuckDBPyConnection, query: str, views: set[str]
) -> None:
    assert check_tree(syntax_tree(connection, query)) == views


def test_every_listed_function_is_one_of_duckdb(connection: duckdb.DuckDBPyConnection) -> None:
    names = connection.execute("select lower(function_name) from duckdb_functions()").fetchall()
    assert allowed_functions() - {name for (name,) in names} == set()
    assert len(allowed_functions()) > 500
    assert not allowed_functions() & {"getenv", "read_text", "query", "sleep_ms", "nextval"}
