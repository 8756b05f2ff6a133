"""Write the reference pages of docs/ from the code that they describe; a test holds them to it.

python docs/make_reference.py
"""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ray_app.cli import cli
from ray_app.study import Study
from storage import TABLES
from storage.sqlfiles import load_query
from storage.views import VIEWS


def tables_page() -> str:
    """Every table and view of a store."""
    parts = [
        "# Tables\n",
        "What `actlake sql` can ask, and what lies in the Parquet files. Tables are files; the",
        "views behind them are computed when asked.\n",
    ]
    for table in TABLES.values():
        parts += [f"## {table.name}\n", f"{table.purpose} Grain: {table.grain}.\n"]
        parts += ["| column | type | meaning |", "|---|---|---|"]
        types_of = {field.name: str(field.type) for field in table.schema}
        for name, doc in table.column_docs().items():
            parts.append(f"| {name} | {types_of.get(name, 'string')} | {_cell(doc)} |")
        parts.append("")
    for name in VIEWS:
        if name not in TABLES:
            query = load_query("storage", name)
            parts += [f"## {name} (view)\n", f"{query.purpose} Grain: {query.grain}.\n"]
            parts += ["| column | meaning |", "|---|---|"]
            parts += [f"| {column} | {_cell(doc)} |" for column, doc in query.columns.items()]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def study_page() -> str:
    """Every key of a study file."""
    parts = [
        "# Study files\n",
        "A study is one YAML file. Unknown keys are refused. `--set KEY.PATH=VALUE` changes one",
        "key for one command.\n",
    ]
    for title, model in _sections(Study, "study"):
        doc = (model.__doc__ or "").strip()
        parts += [f"## {title}\n", f"{doc}\n", "| key | type | default | meaning |"]
        parts.append("|---|---|---|---|")
        for name, field in model.model_fields.items():
            default = _default(field)
            parts.append(
                f"| {field.alias or name} | {_cell(_type_name(field.annotation))} | "
                f"{_cell(default)} | {_cell(field.description or '')} |"
            )
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def commands_page() -> str:
    """The help of every command."""
    parts = ["# Commands\n"]
    # As users call them: below the group, of which they inherit the names of the help option.
    group = cli.make_context("actlake", [], resilient_parsing=True)
    for name, command in sorted(cli.commands.items()):
        context = click.Context(command, parent=group, info_name=name, max_content_width=90)
        context.terminal_width = 90
        parts += [f"## actlake {name}\n", f"```text\n{command.get_help(context)}\n```\n"]
    return "\n".join(parts).rstrip() + "\n"


PAGES = {"tables.md": tables_page, "study.md": study_page, "commands.md": commands_page}


def _sections(model: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield title, model
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            yield from _sections(inner, name if title == "study" else f"{title}.{name}")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if origin in (list, dict):
        return f"{origin.__name__} of {_type_name(arguments[-1])}"
    if arguments and origin is not None:
        return _type_name(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys below"
    return str(getattr(annotation, "__name__", annotation))


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value in ({}, []):
        return ""
    return "" if isinstance(value, BaseModel) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page(), encoding="utf-8")
