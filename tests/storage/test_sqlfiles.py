"""SQL files are parsed into what they state, and refused if they do not state it."""

import duckdb
import pytest

from storage.sqlfiles import parse_query, quote

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
