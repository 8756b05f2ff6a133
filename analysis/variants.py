"""Analyses of one kind and run that differ, and what tells them apart."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Variant", "names_of", "variants_of"]

_MOST_IN_NAME = 3
"""Values of a list that a name tells."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An analysis, and older ones with the same parameters."""

    id: str
    """Id of the analysis."""
    parameters: dict[str, Any]
    """Its settings, from its record."""
    older: tuple[str, ...]
    """Ids of older analyses with the same settings, of other data."""

    @property
    def metric(self) -> str:
        """'abs' if it has it, else its first."""
        metrics = self.parameters["metrics"]
        return "abs" if "abs" in metrics else metrics[0]

    def note(self) -> str:
        """Two or three sentences: its name and settings, and what is not shown."""
        told = f"Analysis {self.id}"
        if "metrics" in self.parameters:
            others = [metric for metric in self.parameters["metrics"] if metric != self.metric]
            told += f", metric {self.metric}"
            told += f" (it also has {', '.join(others)})" if others else ""
        rest = [key for key in sorted(self.parameters) if key != "metrics"]
        told += f". Settings: {_told(self.parameters, rest)}."
        if self.older:
            told += (
                " Older ones with the same settings, of other data, are not shown: "
                f"{', '.join(self.older)}."
            )
        return told

    def likeness(self, other: "Variant") -> int:
        """How many parameters of another analysis are the same in this one."""
        return sum(self.parameters.get(key) == value for key, value in other.parameters.items())


def variants_of(rows: Iterable[dict[str, Any]]) -> list[Variant]:
    """The newest of each set of parameters, in the order given.

    Args:
        rows: analysis (id) and parameters of analyses, the newest first.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["parameters"], sort_keys=True), []).append(row)
    return [
        Variant(newest["analysis"], newest["parameters"], tuple(row["analysis"] for row in older))
        for newest, *older in groups.values()
    ]


def names_of(variants: Sequence[Variant]) -> list[str]:
    """A name for each: its id, and those of its parameters in which not all are alike."""
    keys = {key for variant in variants for key in variant.parameters}
    differing = [
        key
        for key in sorted(keys)
        if any(one.parameters.get(key) != variants[0].parameters.get(key) for one in variants)
    ]
    return [
        ": ".join(filter(None, (one.id, _told(one.parameters, differing, most=_MOST_IN_NAME))))
        for one in variants
    ]


def _told(parameters: dict[str, Any], keys: Iterable[str], most: int | None = None) -> str:
    told = ((key, _value(parameters.get(key), most)) for key in keys)
    return "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in told if value)


def _value(value: Any, most: int | None) -> str:
    """A value in words; nothing for one that was not given."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{key} {one}" for key, one in value.items()]
    if isinstance(value, list):
        left = len(value) - most if most is not None and len(value) > most + 1 else 0
        told = ", ".join(map(str, value[: len(value) - left]))
        return f"{told} and {left} more" if left else told
    return str(value)
