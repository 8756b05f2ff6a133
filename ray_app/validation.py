"""Turning what pydantic says of wrong settings into one sentence for the person who wrote them."""

import difflib
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

__all__ = ["explain"]


def explain(error: ValidationError, settings: type[BaseModel]) -> str:
    """One sentence, without its full stop: which key, what the rule is, what was found.

    Args:
        error: what validating some value as `settings` raised.
        settings: the settings that were to be read.
    """
    complaints = [_Complaint(settings, details) for details in error.errors()]
    # A misspelt key causes others to be missing: the misspelling is what to say.
    first = next((c for c in complaints if c.kind == "extra_forbidden"), complaints[0])
    # Every form that a value may have complains when it fits none; the deepest knows most.
    related = [c for c in complaints if _is_within(c.path, first.path)]
    told = max(related, key=lambda c: (c.kind == "extra_forbidden", len(c.path)))
    is_one_of_many = len({c.kind for c in related if c.path == told.path}) > 1
    others = {tuple(c.path) for c in complaints if not _is_within(c.path, first.path)}
    more = f" ({len(others)} more to correct)" if others else ""
    return _sentence(told, is_one_of_many=is_one_of_many) + more


@dataclass(slots=True)
class _Complaint:
    """One of pydantic's errors, read back to the key that a person wrote."""

    settings: type[BaseModel]
    details: Any
    path: list[str] = field(init=False, default_factory=list)
    """Keys from the top, without the names of types that pydantic adds where several fit."""
    holder: Any = field(init=False, default=None)
    """Settings that hold the last key."""
    description: str = field(init=False, default="")
    """What the innermost documented key on the path is for."""

    def __post_init__(self) -> None:
        annotation: Any = self.settings
        for part in self.details["loc"]:
            annotation = self._step(_plain(annotation), part)

    @property
    def kind(self) -> str:
        return str(self.details["type"])

    def _step(self, annotation: Any, part: int | str) -> Any:
        """Go one part of the location on; the type of what is there."""
        if part == "[key]":
            return annotation
        if _is_union(annotation):
            members = get_args(annotation)
            return next((m for m in members if getattr(m, "__name__", "") == part), object)
        self.path.append(str(part))
        self.holder = annotation
        if not _is_settings(annotation):
            # Values of a mapping, items of a list.
            return (get_args(annotation) or (object,))[-1]
        for name, info in annotation.model_fields.items():
            if part in (name, info.alias):
                self.description = info.description or self.description
                return info.annotation
        return object


def _sentence(complaint: _Complaint, *, is_one_of_many: bool) -> str:
    place = ".".join(complaint.path)
    found = complaint.details["input"]
    if complaint.kind == "extra_forbidden":
        return f"unknown key {place!r}; {_hint(complaint.path[-1], complaint.holder)}"
    if complaint.kind == "missing":
        return f"{place} must be given and is missing"
    if complaint.kind == "model_type":
        return f"{place} must hold keys, found {found!r}"
    if is_one_of_many:
        return f"{place} cannot be {found!r}: {complaint.description.rstrip('.')}"
    message = complaint.details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    suffix = "" if complaint.kind == "value_error" else f", found {found!r}"
    return f"{place + ': ' if place else ''}{message}{suffix}"


def _hint(key: str, holder: type[BaseModel]) -> str:
    valid = [info.alias or name for name, info in holder.model_fields.items()]
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"the nearest valid one is {close[0]!r}" if close else f"valid are {', '.join(valid)}"


def _is_within(path: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one of two paths leads to the other."""
    shorter = min(len(path), len(other))
    return list(path[:shorter]) == list(other[:shorter])


def _plain(annotation: Any) -> Any:
    """A type without what pydantic adds no part of a location for."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if _is_union(annotation):
        members = [member for member in get_args(annotation) if member is not types.NoneType]
        return _plain(members[0]) if len(members) == 1 else annotation
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
