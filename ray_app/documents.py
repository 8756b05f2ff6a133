"""The documents of a task, in the order in which a seed draws them."""

import hashlib
import itertools
import os
import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_app.hub import why_unreachable
from ray_app.places import find_files, resolve_path
from ray_app.study import Condition, StudyError, TaskSettings

__all__ = ["Document", "open_documents"]

_SHUFFLE_BUFFER = 10_000
"""Rows that a stream is shuffled over; a stream cannot be drawn from at random as a whole."""

_LOCAL_BUILDERS = ("arrow", "csv", "json", "parquet", "text", "webdataset", "xml")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a task."""

    source: str
    """Where it comes from: a path, 'name#row' of a dataset, 'name@place' of a drawn stream."""
    text: str
    """The text."""
    label: str | None = None
    """Its label, if it has one."""


def open_documents(name: str, task: TaskSettings, seed: int) -> Iterator[Document]:
    """Documents of one task (not a mixture), drawn in the order that the seed gives.

    Args:
        name: name of the task, for errors and for its own stream of random numbers.
        task: where the documents are.
        seed: the study's seed.

    Raises:
        StudyError: if files, dataset, split or column are not there, or a row does not hold what
            column, template or filter expect; when documents are drawn.
    """
    documents = _files(name, task, seed) if task.files is not None else _rows(name, task, seed)
    return itertools.islice(documents, task.limit)


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
    # Names from the folder that all files share: telling, and the same on every machine.
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    order = np.random.default_rng(task_seed(name, seed)).permutation(len(paths))
    for path in (paths[index] for index in order):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise StudyError(
                f"tasks.{name}.files: cannot read {path}: {error.strerror}."
            ) from error
        yield Document(source=path.relative_to(shared).as_posix(), text=text)


def _rows(name: str, task: TaskSettings, seed: int) -> Iterator[Document]:
    rows = _load(name, task)
    columns = rows.column_names
    if columns is None:  # A stream may not know its columns before its first row.
        columns = list(_first_row(name, task, rows))
    render = _renderer(name, task, columns)
    for column in [*task.filter, *([task.label_column] if task.label_column else [])]:
        _require_column(name, column, columns)
    for source, row in _in_drawn_order(name, task, rows, task_seed(name, seed)):
        if all(_matches(name, column, row[column], test) for column, test in task.filter.items()):
            label = None if task.label_column is None else row[task.label_column]
            yield Document(
                source=source, text=render(row), label=None if label is None else str(label)
            )


def _load(name: str, task: TaskSettings) -> Any:
    # Importing it takes a third of a second, which studies of plain files need not wait.
    import datasets

    data_files = task.data_files
    if data_files is not None:
        patterns = [data_files] if isinstance(data_files, str) else list(data_files)
        data_files = [resolve_path(pattern) for pattern in patterns]
    elif task.dataset in _LOCAL_BUILDERS:
        # datasets would take every such file below the current folder.
        raise StudyError(
            f"tasks.{name}: dataset {task.dataset!r} reads files: name them in "
            f"tasks.{name}.data_files."
        )
    # What goes wrong is told once, by the exception.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # Else it reports every load to the hub, of local files too, and waits for a name server.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    unreachable = None if _is_local(task) else why_unreachable()
    if unreachable is not None:
        datasets.config.HF_HUB_OFFLINE = True
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
        if unreachable is not None:
            raise StudyError(
                f"tasks.{name}: dataset {task.dataset!r} is no folder here and not in the local "
                f"cache, and the hub cannot be asked for it ({unreachable}): check the name and "
                "the network, or load local files with dataset: json, parquet or text."
            ) from error
        raise _cannot_read(name, task, error) from error


def _is_local(task: TaskSettings) -> bool:
    return task.dataset in _LOCAL_BUILDERS or Path(str(task.dataset)).exists()


def _cannot_read(name: str, task: TaskSettings, error: Exception) -> StudyError:
    # The innermost error is the one that knows; those around it say that there was one.
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(str(cause).split()).rstrip(".")[:300] or "it has no rows"
    return StudyError(
        f"tasks.{name}: dataset {task.dataset!r} cannot be loaded: {reason}; "
        "check the name, data_files and split."
    )


def _first_row(name: str, task: TaskSettings, rows: Any) -> Mapping[str, Any]:
    try:
        first: Mapping[str, Any] | None = next(iter(rows), None)
    except Exception as error:
        raise _cannot_read(name, task, error) from error
    if first is None:
        raise StudyError(
            f"tasks.{name}: dataset {task.dataset!r} has no rows: check data_files and split."
        )
    return first


def _in_drawn_order(
    name: str, task: TaskSettings, rows: Any, seed: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(what to call it, row) in the order that the seed gives."""
    from datasets import IterableDataset

    if not isinstance(rows, IterableDataset):
        for index in np.random.default_rng(seed).permutation(len(rows)):
            yield f"{task.dataset}#{index}", rows[int(index)]
        return
    # A stream does not tell which row it gives: the place in the drawn order has to serve.
    drawn = iter(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
    for place in itertools.count():
        try:
            row = next(drawn)
        except StopIteration:
            return
        except Exception as error:
            raise _cannot_read(name, task, error) from error
        yield f"{task.dataset}@{place}", row


def _renderer(
    name: str, task: TaskSettings, columns: list[str]
) -> Callable[[Mapping[str, Any]], str]:
    if task.template is None:
        _require_column(name, task.column, columns)
        return lambda row: _text(name, task.column, row[task.column])
    template = task.template
    for column in _template_columns(name, template):
        if column not in columns:
            raise StudyError(
                f"tasks.{name}.template: {template!r} asks for {column!r}, which is no column; "
                f"the columns are: {', '.join(columns)}."
            )

    def render(row: Mapping[str, Any]) -> str:
        values = {column: "" if value is None else value for column, value in row.items()}
        try:
            return template.format(**values)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise StudyError(
                f"tasks.{name}.template: {template!r} cannot be filled from a row: {error}."
            ) from error

    return render


def _template_columns(name: str, template: str) -> list[str]:
    try:
        fields = [part[1] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise StudyError(
            f"tasks.{name}.template: {template!r} is no template: {error}; "
            "write {column}, and {{ or }} for a brace."
        ) from error
    return [re.split(r"[.\[]", found)[0] for found in fields]


def _text(name: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise StudyError(
            f"tasks.{name}.column: {column!r} must hold text, found {_type_name(value)}; choose "
            f"another column, or write tasks.{name}.template: '{{{column}}}'."
        )
    return value


def _require_column(name: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise StudyError(
            f"tasks.{name}: there is no column {column!r} in the dataset; "
            f"the columns are: {', '.join(columns)}."
        )


def _matches(name: str, column: str, value: Any, test: Any) -> bool:
    if not isinstance(test, Condition):
        return value in test if isinstance(test, list) else bool(value == test)
    dropped = test.not_ if isinstance(test.not_, list) else [test.not_]
    if test.not_ is not None and value in dropped:
        return False
    if test.min is None and test.max is None:
        return True
    if value is None:
        return False
    if not isinstance(value, int | float):
        raise StudyError(
            f"tasks.{name}.filter.{column}: min and max compare numbers, found "
            f"{_type_name(value)}; keep or drop values by name instead."
        )
    return (test.min is None or value >= test.min) and (test.max is None or value <= test.max)


def _type_name(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
