"""Every SQL file of every package states what it is and binds on an empty store."""

import re
from importlib.resources import files

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.steps import Steps
from storage import open_store
from storage.sqlfiles import Query, load_query, parse_query
from storage.views import VIEWS

PACKAGES = ("storage", "analysis", "ray_app")


def sql_files() -> list[tuple[str, str]]:
    """(package, name) of every SQL file."""
    return [
        (package, file.name.removesuffix(".sql"))
        for package in PACKAGES
        if (folder := files(package) / "sql").is_dir()
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
    ]


EXAMPLES = {
    "sites": ["mlp"], "metrics": ["abs"], "fractions": [0.1], "rest": 0.9, "seed": 0, "count": 3,
    "eps_mlp": 0.001, "eps_attn": 0.0001, "fraction": 0.1, "layer": 0, "neuron": 0, "context": 3,
    "per_sample": False, "experts": ["a"], "runs": ["a"], "analyses": ["a"],
}  # fmt: skip
"""Values of parameters that are not text."""

PARTS = {"site": "'mlp'", "analysis": "'a'", "metrics": "abs", "order": ""}
"""SQL that analysis puts into its files."""


def is_view(key: tuple[str, str]) -> bool:
    """Whether the catalog fills in where the files are; such text becomes the views."""
    return key[0] == "storage" and re.search(r"\{[a-z_]+\}", load_query(*key).text) is not None


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    """A connection with the views of an empty store, and the function that analysis adds."""
    root = tmp_path_factory.mktemp("empty")
    (root / "runs").mkdir()
    connection = open_store(root).connect()
    steps = Steps(connection, lambda step: None)
    steps.intern(["a", "abs", "given", "mlp", "text"])
    # These are made by NumPy, not by SQL.
    keys = {"metric": pa.string(), "site": pa.string(), "layer": pa.int16()}
    mantel = {"fraction": pa.float64(), "correlation": pa.float64(), "p_value": pa.float64()}
    columns = keys | mantel | {"num_permutations": pa.int64()}
    steps.give("mantel", pa.schema(columns).empty_table())
    columns = keys | {"task": pa.string(), "correlation": pa.float64()}
    steps.give("drift_correlations", pa.schema(columns).empty_table())
    return connection


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of scores of one's own."""
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    columns = {"task": ["a"], "layer": [0], "neuron": [0], "score": [0.5]}
    pq.write_table(pa.table(columns), path)
    return str(path)


def bind(connection: duckdb.DuckDBPyConnection, query: Query, **values: object) -> None:
    """Bind a query, and before it those whose results it reads, as the steps of an analysis do."""
    for table in set(re.findall(r"computed_[a-z_]+", query.text)):
        made_by = table.removeprefix("computed_").removesuffix("_b")
        known = connection.sql("select table_name from duckdb_tables()").fetchall()
        if (table,) not in known:
            step = load_query("analysis", made_by)
            bind(connection, step)
            connection.execute(f"create temp table {table} as {_filled(step)}", _params(step))
    connection.execute(f"explain {_filled(query)}", _params(query) | values)


def _filled(query: Query) -> str:
    return query.text.format(**PARTS) if re.search(r"\{[a-z]+\}", query.text) else query.text


def _params(query: Query) -> dict[str, object]:
    return {name: EXAMPLES.get(name, "text") for name in query.params}


@pytest.mark.parametrize(("package", "name"), sql_files())
def test_every_file_states_what_it_is(package: str, name: str) -> None:
    query = load_query(package, name)
    assert query.name == name
    assert query.purpose.endswith(".")
    assert query.grain
    assert all(query.params.values()), "every parameter needs an explanation"
    assert query.params.keys() == set(re.findall(r"\$([a-z_]+)", query.text))


@pytest.mark.parametrize(("package", "name"), [key for key in sql_files() if not is_view(key)])
def test_every_query_binds_on_an_empty_store(
    connection: duckdb.DuckDBPyConnection, scores: str, package: str, name: str
) -> None:
    query = load_query(package, name)
    bind(connection, query, **{"file": scores} if "file" in query.params else {})


def test_every_other_file_is_a_view() -> None:
    # Views are bound when the connection is made, so binding covers all files.
    used = {
        ("storage", name)
        for name in (
            *VIEWS,
            "committed_table",
            "committed_lists",
            "listed_table",
            "json_records",
            "sorted_rows",
        )
    }
    assert {key for key in sql_files() if is_view(key)} - used == set()


def test_a_query_with_a_renamed_column_does_not_bind(connection: duckdb.DuckDBPyConnection) -> None:
    source = (
        "-- name: broken\n-- purpose: Fail.\n-- param: task - a task\n-- grain: one row\n"
        "select neurone from stats where task = $task"
    )
    with pytest.raises(duckdb.BinderException, match="neurone"):
        bind(connection, parse_query(source, file="broken.sql"))
