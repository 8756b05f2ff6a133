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

import fsspec
import numpy as np

from ray_app.hub import OutOfReachError, why_unreachable
from ray_app.models.architecture import Modality
from ray_app.places import find_files, resolve_path
from ray_app.study import Condition, StudyError, TaskSettings
from ray_app.superclasses import load_superclasses

__all__ = ["Document", "open_documents"]

_SHUFFLE_BUFFER = 10_000
"""Rows that a stream is shuffled over; a stream cannot be drawn from at random as a whole."""

_LOCAL_BUILDERS = ("arrow", "csv", "json", "parquet", "text", "webdataset", "xml")


@dataclass(frozen=True, slots=True)
class Document:
    """One text or image of a task."""

    source: str
    """Where it comes from: a path, 'name#row' of a dataset, 'name@place' of a drawn stream."""
    text: str = ""
    """The text."""
    image: bytes | None = None
    """The image, encoded as it was found; None if there is none."""
    label: str | None = None
    """Its label, if it has one."""
    label_id: int | None = None
    """The label's number, if the dataset has numbers."""


def open_documents(
    name: str, task: TaskSettings, seed: int, modality: Modality = "language"
) -> Iterator[Document]:
    """Documents of one task (not a mixture), drawn in the order that the seed gives.

    Args:
        name: name of the task, for errors and for its own stream of random numbers.
        task: where the documents are.
        seed: the study's seed.
        modality: whether texts or images are wanted.

    Raises:
        StudyError: if files, dataset, split or column are not there, or a row does not hold what
            column, template or filter expect; when documents are drawn.
    """
    if task.files is not None:
        documents = _files(name, task, seed)
    else:
        documents = _rows(name, task, seed, modality)
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


def _rows(name: str, task: TaskSettings, seed: int, modality: Modality) -> Iterator[Document]:
    rows = _load(name, task)
    columns = rows.column_names
    if columns is None:  # A stream may not know its columns before its first row.
        columns = list(_first_row(name, task, rows))
    labels = [task.label_column] if task.label_column else []
    for column in labels:
        _require_column(name, column, columns)
    values = {column: _value_of(name, column, columns) for column in task.filter}
    if modality == "image":
        rows = _with_encoded_images(name, task, rows, columns)
        content = _image_of(name, task)
    else:
        content = _text_of(name, task, columns)
    names = _class_names(rows)
    is_chosen = _superclass_test(name, task, names.get(task.label_column or ""))
    for source, row in _in_drawn_order(name, task, rows, task_seed(name, seed)):
        label = _label(row, task, names)
        if is_chosen(label.get("label")) and all(
            _matches(name, column, _comparable(values[column](row), test, names.get(column)), test)
            for column, test in task.filter.items()
        ):
            yield Document(source=source, **content(row), **label)


def _class_names(rows: Any) -> dict[str, list[str]]:
    """Names of the classes that columns of numbers stand for, by column."""
    import datasets

    features = (rows.features or {}).items()
    return {name: kind.names for name, kind in features if isinstance(kind, datasets.ClassLabel)}


def _label(
    row: Mapping[str, Any], task: TaskSettings, names: Mapping[str, list[str]]
) -> dict[str, Any]:
    """`Document.label` and `Document.label_id` of a row, if it has them."""
    column = task.label_column
    value = None if column is None else row[column]
    if column is None or value is None:
        return {}
    if column in names:
        # datasets writes -1 where a test set keeps its labels to itself.
        return {} if value < 0 else {"label": names[column][value], "label_id": value}
    return {"label": str(value), "label_id": value if isinstance(value, int) else None}


def _comparable(value: Any, test: Any, names: list[str] | None) -> Any:
    """A value of a column of classes by name, if that is how a filter speaks of them."""
    tested = test.not_ if isinstance(test, Condition) else test
    speaks_names = any(
        isinstance(t, str) for t in (tested if isinstance(tested, list) else [tested])
    )
    return names[value] if names is not None and speaks_names and value is not None else value


def _superclass_test(
    name: str, task: TaskSettings, classes: list[str] | None
) -> Callable[[str | None], bool]:
    """Whether rows of a label belong to the task.

    Raises:
        StudyError: if the table lacks the superclass, or a label of the dataset.
    """
    if task.superclasses is None or task.superclass is None:
        return lambda label: True
    table = load_superclasses(f"tasks.{name}.superclasses", task.superclasses)
    wanted = task.superclass
    if wanted not in table.values():
        raise StudyError(
            f"tasks.{name}.superclass must be one of {', '.join(dict.fromkeys(table.values()))}, "
            f"found {wanted!r}."
        )

    def superclass_of(label: str) -> str:
        if label not in table:
            raise StudyError(
                f"tasks.{name}: the label {label!r} of column {task.label_column!r} is in no "
                f"superclass of {task.superclasses}: correct the table, or choose another "
                "label_column."
            )
        return table[label]

    for label in classes or []:
        superclass_of(label)
    return lambda label: label is not None and superclass_of(label) == wanted


def _with_encoded_images(name: str, task: TaskSettings, rows: Any, columns: list[str]) -> Any:
    """The same rows, with images as they are stored instead of decoded."""
    import datasets

    column = task.image_column
    _require_column(name, column, columns)
    kind = (rows.features or {}).get(column)
    holds_images = (
        kind is None
        or isinstance(kind, datasets.Image)
        or (isinstance(kind, dict) and "bytes" in kind)
        or getattr(kind, "dtype", None) in ("binary", "large_binary", "string")
    )
    if not holds_images:
        raise StudyError(
            f"tasks.{name}.image_column: {column!r} must hold images or paths of image files, "
            f"found {kind}; the columns are: {', '.join(columns)}."
        )
    return rows.cast_column(column, datasets.Image(decode=False))


def _image_of(name: str, task: TaskSettings) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def image(row: Mapping[str, Any]) -> dict[str, Any]:
        stored = row[task.image_column] or {}
        data, path = stored.get("bytes"), stored.get("path")
        if data is None and path is not None:
            try:
                with fsspec.open(path, "rb") as file:
                    data = file.read()
            except (OSError, ValueError) as error:
                raise StudyError(
                    f"tasks.{name}.image_column: cannot read the image {path}: {error}."
                ) from error
        return {"image": data}

    return image


def _text_of(
    name: str, task: TaskSettings, columns: list[str]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    render = _renderer(name, task, columns)
    return lambda row: {"text": render(row)}


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
            raise OutOfReachError(
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


def _value_of(name: str, column: str, columns: list[str]) -> Callable[[Mapping[str, Any]], Any]:
    """Reads a column, or a field of one that holds structures: ``meta.pile_set_name``."""
    if column in columns:
        return lambda row: row[column]
    outer, *fields = column.split(".")
    _require_column(name, outer, columns)

    def read(row: Mapping[str, Any]) -> Any:
        value = row[outer]
        for field in fields:
            if value is None:
                return None
            if not isinstance(value, Mapping) or field not in value:
                inside = ", ".join(value) if isinstance(value, Mapping) else _type_name(value)
                raise StudyError(
                    f"tasks.{name}.filter: {column!r} asks for the field {field!r} of {outer!r}, "
                    f"which holds {inside}."
                )
            value = value[field]
        return value

    return read


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
