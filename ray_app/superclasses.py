"""Tables that group labels into superclasses: those that ship with actlake, and your own."""

from pathlib import Path

import yaml

from ray_app.study import StudyError

__all__ = ["load_superclasses"]

_SHIPPED = Path(__file__).parent / "labels"


def load_superclasses(key: str, place: str) -> dict[str, str]:
    """The superclass of each label, superclasses in the order of the table.

    Args:
        key: key of the study that names the table, for errors.
        place: name of a table that ships with actlake, or path of a YAML file that maps each
            superclass to a list of its labels.

    Raises:
        StudyError: if there is no such table, or it does not give every label one superclass.
    """
    shipped = _SHIPPED / f"{place}.yaml"
    path = shipped if shipped.is_file() else Path(place).expanduser()
    try:
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in _SHIPPED.glob("*.yaml")))
        raise StudyError(
            f"{key} must be a table that ships with actlake ({known}) or a YAML file, found "
            f"{place!r}."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(
            f"{key}: {place} is not valid YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(groups, dict) or not all(isinstance(g, list) and g for g in groups.values()):
        raise StudyError(f"{key}: {place} must map each superclass to a list of its labels.")
    table: dict[str, str] = {}
    for superclass, labels in groups.items():
        for label in map(str, labels):
            if label in table:
                raise StudyError(
                    f"{key}: {place} puts the label {label!r} in two places, {table[label]} and "
                    f"{superclass}: each label must have one superclass."
                )
            table[label] = str(superclass)
    return table
