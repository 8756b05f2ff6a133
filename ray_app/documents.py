"""The documents of a task, in the order in which a seed draws them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_app.places import find_files, resolve_path
from ray_app.study import Condition, StudyError, TaskSettings

__all__ = ["Document", "open_documents"]

_SHUFFLE_BUFFER = 10_000
"""Rows that a stream is shuffled over; a stream cannot be drawn from at random as a whole."""

_LOCAL_BUILDERS = ("json", "csv", "parquet", "text", "arrow", "xml")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a task."""

    source: str
    text: str
    label: str | None = None


def open_documents(name: str, task: TaskSettings, seed: int) -> Iterator[Document]:
    """Documents of one task (not a mixture), drawn in the order that the seed gives.

    Args:
        name: name of the task, for errors and for its own stream of random numbers.
        task: where the documents are.
        seed: the study's seed.

    Raises:
        StudyError: if files, dataset, split or column are not there.
    """
    documents = _files(name, task, seed) if task.files is not None else _rows(name, task, seed)
    for index, document in enumerate(documents):
        if task.limit is not None and index >= task.limit:
            return
        yield document


def task_seed(name: str, seed: int) -> int:
    """A seed of a task's own, so that adding a task does not change the samples of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _files(name: str, task: TaskSettings, seed: int) -> Iterator[Document]:
    patterns = [task.files] if isinstance(task.files, str) else list(task.files or ())
    paths = find_files(patterns)
    if not paths:
        raise StudyError(
            f"tasks.{name}.files: no file matches {', '.join(patterns)}; "
            "correct the pattern or install the package it looks in."
        )
    order = np.random.default_rng(task_seed(name, seed)).permutation(len(paths))
    for index in order:
        path = paths[index]
        yield Document(source=path.name, text=path.read_text(encoding="utf-8", errors="replace"))


def _rows(name: str, task: TaskSettings, seed: int) -> Iterator[Document]:
    rows = _load(name, task)
    columns = rows.column_names
    if columns is None:  # A stream may not know its columns before its first row.
        columns = list(next(iter(rows), {}))
    render = _renderer(name, task, columns)
    for column in [*task.filter, *([task.label_column] if task.label_column else [])]:
        _require_column(name, column, columns)
    for index, row in _in_drawn_order(rows, task_seed(name, seed)):
        if all(_matches(row[column], test) for column, test in task.filter.items()):
            label = None if task.label_column is None else str(row[task.label_column])
            yield Document(source=f"{task.dataset}#{index}", text=render(row), label=label)


def _load(name: str, task: TaskSettings) -> Any:
    # Importing it takes a third of a second, which studies of plain files need not wait.
    import datasets

    data_files = task.data_files
    if data_files is not None:
        patterns = [data_files] if isinstance(data_files, str) else list(data_files)
        data_files = [resolve_path(pattern) for pattern in patterns]
    try:
        return datasets.load_dataset(
            task.dataset,
            task.subset,
            split=task.split,
            data_files=data_files,
            revision=task.revision,
            streaming=task.streaming,
        )
    except Exception as error:
        # datasets raises whatever its builders, fsspec, the hub client or the network raise.
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = (
            "check data_files and split"
            if task.dataset in _LOCAL_BUILDERS
            else "the hub may not be reachable from here: check the name and the network, or load "
            "local files with dataset: json, parquet or text"
        )
        raise StudyError(
            f"tasks.{name}: dataset {task.dataset!r} cannot be loaded ({reason[:300]}); {hint}."
        ) from error


def _in_drawn_order(rows: Any, seed: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from datasets import IterableDataset

    if isinstance(rows, IterableDataset):
        yield from enumerate(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
    else:
        for index in np.random.default_rng(seed).permutation(len(rows)):
            yield int(index), rows[int(index)]


def _renderer(
    name: str, task: TaskSettings, columns: list[str]
) -> Callable[[Mapping[str, Any]], str]:
    if task.template is None:
        _require_column(name, task.column, columns)
        return lambda row: _text(row[task.column])
    template = task.template
    try:
        template.format(**dict.fromkeys(columns, ""))
    except (KeyError, IndexError, ValueError) as error:
        raise StudyError(
            f"tasks.{name}.template: {template!r} asks for {error}, which is no column; "
            f"the columns are: {', '.join(columns)}."
        ) from error
    return lambda row: template.format(**row)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _require_column(name: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise StudyError(
            f"tasks.{name}: there is no column {column!r} in the dataset; "
            f"the columns are: {', '.join(columns)}."
        )


def _matches(value: Any, test: Any) -> bool:
    if isinstance(test, Condition):
        dropped = test.not_ if isinstance(test.not_, list) else [test.not_]
        return (
            (test.min is None or (value is not None and value >= test.min))
            and (test.max is None or (value is not None and value <= test.max))
            and (test.not_ is None or value not in dropped)
        )
    return value in test if isinstance(test, list) else bool(value == test)
