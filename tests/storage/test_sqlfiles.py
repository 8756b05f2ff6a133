"""SQL files state what they are, are refused if they do not, and bind on an empty store."""

import re
from importlib.resources import files

import duckdb
import pytest

from storage import open_store
from storage.catalog import VIEWS
from storage.sqlfiles import Query, load_query, parse_query, quote

PACKAGES = ("storage", "analysis", "ray_app")


def sql_files() -> list[tuple[str, str]]:
    """(package, name) of every SQL file."""
    return [
        (package, file.name.removesuffix(".sql"))
        for package in PACKAGES
        if (folder := files(package) / "sql").is_dir()
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
    ]


# Queries of analysis read tables that its steps make; running those, as its tests do, binds them.
BOUND_ON_VIEWS = [key for key in sql_files() if key[0] != "analysis"]


def is_template(query: Query) -> bool:
    """Whether the catalog fills in where the files are; such text becomes the views."""
    return re.search(r"\{[a-z_]+\}", query.text) is not None


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    """A connection with the views of an empty store."""
    root = tmp_path_factory.mktemp("empty")
    (root / "runs").mkdir()
    return open_store(root).connect()


def bind(connection: duckdb.DuckDBPyConnection, query: Query) -> None:
    connection.execute(f"explain {query.text}", dict.fromkeys(query.params))


@pytest.mark.parametrize(("package", "name"), sql_files())
def test_every_file_states_what_it_is(package: str, name: str) -> None:
    query = load_query(package, name)
    assert query.name == name
    assert query.purpose.endswith(".")
    assert all(query.params.values()), "every parameter needs an explanation"


@pytest.mark.parametrize(
    ("package", "name"), [key for key in BOUND_ON_VIEWS if not is_template(load_query(*key))]
)
def test_every_query_binds_on_an_empty_store(
    connection: duckdb.DuckDBPyConnection, package: str, name: str
) -> None:
    bind(connection, load_query(package, name))


def test_every_template_is_a_view() -> None:
    # Views are bound when the connection is made, so binding covers all files.
    templates = {key for key in BOUND_ON_VIEWS if is_template(load_query(*key))}
    used = {("storage", name) for name in (*VIEWS, "committed_table", "json_records")}
    assert templates - used == set()
    assert templates


def test_a_query_with_a_renamed_column_does_not_bind(connection: duckdb.DuckDBPyConnection) -> None:
    source = (
        "-- name: broken\n-- purpose: Fail.\n-- param: task - a task\n-- grain: one row\n"
        "select neurone from stats where task = $task"
    )
    with pytest.raises(duckdb.BinderException, match="neurone"):
        bind(connection, parse_query(source, file="broken.sql"))


HEADER = "-- name: one\n-- purpose: One.\n-- grain: one row\n"


def test_a_file_is_parsed_into_its_parts() -> None:
    source = (
        "-- name: one\n-- purpose: One row.\n-- param: task - name of the task\n"
        "-- param: top_k - how many\n-- grain: one row\n"
        "-- A comment may name $nothing.\nselect $task, $top_k\n"
    )
    query = parse_query(source, file="p/sql/one.sql")
    assert (query.name, query.purpose, query.grain) == ("one", "One row.", "one row")
    assert query.params == {"task": "name of the task", "top_k": "how many"}
    assert query.text == "-- A comment may name $nothing.\nselect $task, $top_k"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("select 1", "f.sql: the header lacks name, purpose, grain."),
        ("-- name: one\n-- grain: one row\nselect 1", "f.sql: the header lacks purpose."),
        ("-- name:\n-- purpose: P.\n-- grain: g\nselect 1", "f.sql: the header lacks name."),
        (
            f"{HEADER}select $task",
            "f.sql: declared parameters [] differ from those used, ['task'].",
        ),
        (
            f"{HEADER}-- param: task - a task\nselect 1",
            "f.sql: declared parameters ['task'] differ from those used, [].",
        ),
    ],
)
def test_a_file_with_a_wrong_header_is_refused(source: str, error: str) -> None:
    with pytest.raises(ValueError, match=r"^f\.sql: ") as caught:
        parse_query(source, file="f.sql")
    assert str(caught.value) == error


@pytest.mark.parametrize("text", ["plain", "it's", "''", "a\\b", "new\nline", "$x {y}", ""])
def test_quoted_text_comes_back_as_it_was(text: str) -> None:
    assert duckdb.sql(f"select {quote(text)}").fetchall() == [(text,)]
