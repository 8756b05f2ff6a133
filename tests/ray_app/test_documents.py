"""Documents come from files and datasets of every kind, filtered, drawn by seed, or refused."""

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from huggingface_hub import constants

from ray_app.documents import Document, open_documents, task_seed
from ray_app.hub import OutOfReachError, why_unreachable
from ray_app.study import StudyError, TaskSettings

ROWS = [
    {
        "question": f"q{n}",
        "answer": None if n == 3 else f"a{n}",
        "number": n,
        "score": n / 2,
        "even": n % 2 == 0,
        "kind": "abc"[n % 3],
    }
    for n in range(12)
]


# datasets sleeps that long after streaming Parquet, whenever the stream is let go.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what datasets converts out of the user's own cache."""
    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the rows as json, csv, parquet and text."""
    frame = pd.DataFrame(ROWS)
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.text").write_text("\n".join(str(row["question"]) for row in ROWS))
    return tmp_path


def draw(seed: int = 0, name: str = "a", **settings: Any) -> list[Document]:
    return list(open_documents(name, TaskSettings.model_validate(settings), seed))


def refusal(**settings: Any) -> str:
    with pytest.raises((StudyError, OutOfReachError)) as caught:
        draw(**settings)
    return str(caught.value)


def numbers(documents: list[Document]) -> set[int]:
    return {int(re.sub(r"\D", "", document.text)) for document in documents}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "text"])
def test_a_dataset_of_any_kind_gives_all_its_rows_once(
    data: Path, kind: str, streaming: bool
) -> None:
    column = "text" if kind == "text" else "question"
    documents = draw(
        dataset=kind, data_files=f"{data}/rows.{kind}", column=column, streaming=streaming
    )
    assert sorted(document.text for document in documents) == sorted(f"q{n}" for n in range(12))
    mark = "@" if streaming else "#"
    assert {document.source for document in documents} == {f"{kind}{mark}{n}" for n in range(12)}


def test_a_row_is_named_by_its_place_in_the_dataset(data: Path) -> None:
    for document in draw(dataset="json", data_files=f"{data}/rows.json", column="question"):
        assert document.source.removeprefix("json#") == document.text.removeprefix("q")


def test_local_files_need_no_network(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **options: asked.append(host))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    draw(dataset="json", data_files=f"{data}/rows.json", column="question")
    assert asked == []


def test_several_data_files_are_one_dataset(data: Path) -> None:
    files = [f"{data}/rows.json", f"{data}/rows.json"]
    assert len(draw(dataset="json", data_files=files, column="question")) == 24


def test_the_seed_alone_decides_the_order(data: Path) -> None:
    settings: dict[str, Any] = {
        "dataset": "json", "data_files": f"{data}/rows.json", "column": "question",
    }  # fmt: skip
    first = draw(0, **settings)
    assert draw(0, **settings) == first
    assert draw(1, **settings) != first
    assert draw(0, name="b", **settings) != first
    assert draw(0, streaming=True, **settings) == draw(0, streaming=True, **settings)


def test_files_are_drawn_by_seed_and_named_from_the_folder_they_share(tmp_path: Path) -> None:
    for name in ("x/one.txt", "x/deep/one.txt", "y/two.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    documents = draw(files=[f"{tmp_path}/x/**/*.txt", f"{tmp_path}/y/*.txt"])
    assert sorted(document.source for document in documents) == [
        "x/deep/one.txt",
        "x/one.txt",
        "y/two.txt",
    ]
    assert all(document.text == f"text of {document.source}" for document in documents)
    orders = {str(draw(seed, files=f"{tmp_path}/**/*.txt")) for seed in range(20)}
    assert len(orders) > 1
    assert [document.source for document in draw(files=f"{tmp_path}/y/*.txt")] == ["two.txt"]


def test_bytes_that_are_no_text_do_not_stop_a_task(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert [document.text for document in draw(files=f"{tmp_path}/*.txt")] == [
        "caf\N{REPLACEMENT CHARACTER}"
    ]


def test_a_template_is_filled_with_columns(data: Path) -> None:
    documents = draw(
        dataset="json",
        data_files=f"{data}/rows.json",
        template="{{{question}}} {answer} {score:.1f}",
    )
    assert {document.text for document in documents} >= {"{q4} a4 2.0", "{q3}  1.5"}


def test_labels_are_text_and_may_be_missing(data: Path) -> None:
    settings: dict[str, Any] = {
        "dataset": "json", "data_files": f"{data}/rows.json", "column": "question",
    }  # fmt: skip
    by_text = {
        document.text: document.label for document in draw(label_column="answer", **settings)
    }
    assert (by_text["q3"], by_text["q4"]) == (None, "a4")
    assert {document.label for document in draw(label_column="number", **settings)} >= {"0", "11"}
    assert {document.label for document in draw(**settings)} == {None}


@pytest.mark.parametrize(
    ("test", "kept"),
    [
        ({"kind": "a"}, {0, 3, 6, 9}),
        ({"number": 4}, {4}),
        ({"even": True}, {0, 2, 4, 6, 8, 10}),
        ({"kind": ["a", "c"]}, {0, 2, 3, 5, 6, 8, 9, 11}),
        ({"number": []}, set()),
        ({"number": {"min": 9}}, {9, 10, 11}),
        ({"number": {"max": 1}}, {0, 1}),
        ({"number": {"min": 2, "max": 3}}, {2, 3}),
        ({"score": {"min": 4.75, "max": 5}}, {10}),
        ({"kind": {"not": "a"}}, {1, 2, 4, 5, 7, 8, 10, 11}),
        ({"kind": {"not": ["a", "b"]}}, {2, 5, 8, 11}),
        ({"number": {"min": 2, "max": 4, "not": 3}}, {2, 4}),
        ({"answer": {"not": "a4"}, "number": {"max": 4}}, {0, 1, 2, 3}),
        ({"kind": "a", "even": False}, {3, 9}),
        ({"number": 99}, set()),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_filter_keeps_the_rows_it_describes(
    data: Path, test: dict[str, Any], kept: set[int], streaming: bool
) -> None:
    documents = draw(
        dataset="json", data_files=f"{data}/rows.json", column="question", filter=test,
        streaming=streaming,
    )  # fmt: skip
    assert numbers(documents) == kept


def test_a_row_without_the_value_does_not_lie_between_bounds(tmp_path: Path) -> None:
    rows = [{"text": "q1", "number": 1}, {"text": "q2", "number": None}]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    documents = draw(
        dataset="json", data_files=f"{tmp_path}/rows.json", filter={"number": {"min": 0}}
    )
    assert numbers(documents) == {1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_filter_reaches_into_structures(tmp_path: Path, streaming: bool) -> None:
    rows = [
        {"text": f"q{n}", "meta": {"pile_set_name": ("Github", "ArXiv")[n % 2], "n": n}}
        for n in range(4)
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    settings: dict[str, Any] = {
        "dataset": "json", "data_files": f"{tmp_path}/rows.json", "streaming": streaming
    }  # fmt: skip
    assert numbers(draw(**settings, filter={"meta.pile_set_name": "Github"})) == {0, 2}
    assert numbers(draw(**settings, filter={"meta.n": {"min": 2}})) == {2, 3}
    assert refusal(**settings, filter={"meta.set": "Github"}) == (
        "tasks.a.filter: 'meta.set' asks for the field 'set' of 'meta', which holds "
        "pile_set_name, n."
    )


def test_the_limit_counts_documents_that_pass_the_filter(data: Path) -> None:
    settings: dict[str, Any] = {
        "dataset": "json", "data_files": f"{data}/rows.json", "column": "question",
        "filter": {"number": {"min": 6}},
    }  # fmt: skip
    everything = draw(**settings)
    assert len(everything) == 6
    assert draw(limit=4, **settings) == everything[:4]
    assert draw(limit=100, **settings) == everything


COLUMNS = "question, answer, number, score, even, kind"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({}, "text"),
        ({"column": "query"}, "query"),
        ({"column": "question", "label_column": "topic"}, "topic"),
        ({"column": "question", "filter": {"stars": 5}}, "stars"),
    ],
)
def test_a_missing_column_is_refused_with_those_there_are(
    data: Path, settings: dict[str, Any], column: str, streaming: bool
) -> None:
    error = refusal(dataset="json", data_files=f"{data}/rows.json", streaming=streaming, **settings)
    assert error == (
        f"tasks.a: there is no column {column!r} in the dataset; the columns are: {COLUMNS}."
    )


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (
            "{x}",
            f"'{{x}}' asks for 'x', which is no column; the columns are: {COLUMNS}.",
        ),
        ("{}", f"'{{}}' asks for '', which is no column; the columns are: {COLUMNS}."),
        ("{0}", f"'{{0}}' asks for '0', which is no column; the columns are: {COLUMNS}."),
        (
            "{question",
            (
                "'{question' is no template: expected '}' before end of string; write {column}, "
                "and {{ or }} for a brace."
            ),
        ),
        (
            "}",
            (
                "'}' is no template: Single '}' encountered in format string; write {column}, and "
                "{{ or }} for a brace."
            ),
        ),
        (
            "{question.size}",
            "'{question.size}' cannot be filled from a row: 'str' object has no attribute 'size'.",
        ),
        (
            "{question:d}",
            (
                "'{question:d}' cannot be filled from a row: Unknown format code 'd' for object of "
                "type 'str'."
            ),
        ),
    ],
)
def test_a_bad_template_is_refused(data: Path, template: str, error: str) -> None:
    found = refusal(dataset="json", data_files=f"{data}/rows.json", template=template)
    assert found == f"tasks.a.template: {error}"


def test_a_column_that_holds_no_text_is_refused(data: Path) -> None:
    assert refusal(dataset="json", data_files=f"{data}/rows.json", column="even") == (
        "tasks.a.column: 'even' must hold text, found bool 'False'; choose another column, or "
        "write tasks.a.template: '{even}'."
    )


def test_bounds_on_a_column_of_text_are_refused(data: Path) -> None:
    settings = {"column": "question", "filter": {"kind": {"min": 1}}}
    assert refusal(dataset="json", data_files=f"{data}/rows.json", **settings) == (
        "tasks.a.filter.kind: min and max compare numbers, found str 'b'; keep or drop values by "
        "name instead."
    )


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert refusal(files=[f"{tmp_path}/*.md", "none/*"]) == (
        f"tasks.a.files: no file matches {tmp_path}/*.md, none/*; correct the pattern or install "
        "the package it looks in."
    )
    assert refusal(dataset="json", data_files=f"{tmp_path}/none.json") == (
        f"tasks.a: dataset 'json' cannot be loaded: Unable to find '{tmp_path}/none.json'; check "
        "the name, data_files and split."
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a.txt").touch()

    def refuse(path: Path, **options: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert refusal(files=f"{tmp_path}/*.txt") == (
        f"tasks.a.files: cannot read {tmp_path}/a.txt: Permission denied."
    )


def test_a_reader_of_files_without_files_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "stray.json").write_text('{"text": "by chance in the current folder"}')
    monkeypatch.chdir(tmp_path)
    assert refusal(dataset="json") == (
        "tasks.a: dataset 'json' reads files: name them in tasks.a.data_files."
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{nope", r"JSON parse error: Missing a name for object member\. in row 0"),
        ("", "it has no rows"),
    ],
)
def test_a_damaged_or_empty_dataset_is_refused_with_the_cause(
    tmp_path: Path, content: str, reason: str, streaming: bool
) -> None:
    (tmp_path / "rows.json").write_text(content)
    error = refusal(dataset="json", data_files=f"{tmp_path}/rows.json", streaming=streaming)
    expected = rf"tasks\.a: dataset 'json' cannot be loaded: {reason}; check the name, data_files"
    assert re.match(expected, error), error


def test_a_stream_that_breaks_off_is_refused_not_cut_short(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "word\n" * 20_000 + '"open quote, no end\n')
    error = refusal(dataset="csv", data_files=f"{tmp_path}/rows.csv", streaming=True)
    assert error.startswith("tasks.a: dataset 'csv' cannot be loaded: "), error


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_not_there_is_refused(data: Path, streaming: bool) -> None:
    error = refusal(
        dataset="json", data_files=f"{data}/rows.json", split="test", streaming=streaming
    )
    assert re.match(r"tasks\.a: dataset 'json' cannot be loaded: .*test.*\['train'\]; check", error)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_a_hub_out_of_reach_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    why_unreachable.cache_clear()
    error = refusal(dataset="nobody/nothing", streaming=streaming)
    why_unreachable.cache_clear()
    assert error == (
        "tasks.a: dataset 'nobody/nothing' is no folder here and not in the local cache, and the "
        "hub cannot be asked for it (http://127.0.0.1:1 does not answer: Connection refused): "
        "check the name and the network, or load local files with dataset: json, parquet or text."
    )


def test_seeds_of_tasks_differ_and_stay() -> None:
    assert task_seed("python", 0) == 3885675508
    assert len({task_seed(name, seed) for name in ("a", "b", "c") for seed in range(5)}) == 15


def test_documents_are_read_only_as_they_are_drawn(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    read: Callable[..., str] = Path.read_text

    def count(path: Path, **options: str) -> str:
        opened.append(path)
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", count)
    documents = open_documents("a", TaskSettings(files=f"{data}/rows.*"), 0)
    assert opened == []
    next(documents)
    assert len(opened) == 1
