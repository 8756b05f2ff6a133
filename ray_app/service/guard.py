"""Which SQL the service answers: one query over the views of the store, by its syntax tree.

Everything is an allow-list. DuckDB's own parser gives the tree, and whatever stands in it must be
known here: each kind of node, each table (a view of the store or a name that the query itself
defines), each function. The views read files, but the text of a query cannot name one.

The guard is the first of three walls. The connection is locked (`storage.catalog.lock`), and the
process that runs the query is bounded (`ray_app.service.slot`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from storage import ActlakeError, QueryError
from storage.views import VIEWS

__all__ = ["QueryRefusedError", "allowed_functions", "check_tree"]

_QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLE_NODES = {
    "BASE_TABLE", "EMPTY", "EXPRESSION_LIST", "JOIN", "PIVOT", "SHOW_REF", "SUBQUERY",
    "TABLE_FUNCTION",
}  # fmt: skip
_MODIFIERS = {
    "DISTINCT_MODIFIER", "LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "ORDER_DEFAULT",
    "ORDER_MODIFIER", "ASCENDING", "DESCENDING",
}  # fmt: skip
_NODES = _QUERY_NODES | _TABLE_NODES | _MODIFIERS
_EXPRESSIONS = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT",
    "DEFAULT", "FUNCTION", "LAMBDA", "OPERATOR", "PARAMETER", "POSITIONAL_REFERENCE", "STAR",
    "SUBQUERY", "TYPE", "WINDOW",
}  # fmt: skip
_TABLE_FUNCTIONS = {"generate_series", "json_each", "json_tree", "range", "unnest"}
_SYSTEM_TABLES = {("information_schema", "columns"), ("information_schema", "tables")}
_SHOWN = {"DESCRIBE", "SUMMARY"}


class QueryRefusedError(ActlakeError):
    """A query is not one that the service answers."""


@cache
def allowed_functions() -> frozenset[str]:
    """Names of the functions that a query may call outside FROM, in lower case."""
    text = (files("ray_app.service") / "functions.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("# "))
    return frozenset(name.lower() for line in lines for name in line.split()) | {"unnest"}


def check_tree(tree: Any) -> frozenset[str]:
    """Refuse what is not one harmless query.

    Args:
        tree: what `storage.catalog.syntax_tree` made of the text.

    Returns:
        The views of the store that the query reads.

    Raises:
        QueryError: with the parser's message, if the text is not SQL.
        QueryRefusedError: what it may not do, and what to do instead.
    """
    if tree["error"]:
        raise _unparsed(tree)
    statements = tree["statements"]
    if len(statements) != 1:
        raise QueryRefusedError(
            f"a query must be one statement, found {len(statements)}: ask one by one."
        )
    walk = _Walk()
    walk.check(statements[0])
    return frozenset(walk.views)


def _unparsed(tree: dict[str, Any]) -> ActlakeError:
    message = str(tree.get("error_message", "no statement"))
    if tree.get("error_type") != "not implemented":
        return QueryError(f"{str(tree.get('error_type', 'parser')).capitalize()} Error: {message}")
    return QueryRefusedError(
        "a query must give rows and change nothing (FROM, VALUES, WITH, DESCRIBE, SUMMARIZE or "
        "SELECT): nothing is written, loaded, attached or set here, and plans are not shown. Of "
        "PIVOT, name the values: PIVOT t ON task IN ('code', 'prose') USING ..."
    )


@dataclass(slots=True)
class _Walk:
    """One way through a tree, which knows the names that are defined where it stands."""

    views: set[str] = field(default_factory=set)
    """Views that were met."""

    def check(self, tree: Any) -> None:
        """Check a tree, without recursion: DuckDB's parser allows deeper ones than Python."""
        nodes: list[tuple[Any, frozenset[str]]] = [(tree, frozenset())]
        while nodes:
            node, known = nodes.pop()
            if isinstance(node, list):
                nodes += [(item, known) for item in node]
            elif isinstance(node, dict):
                _check_kind(node)
                if node.get("class") in ("FUNCTION", "WINDOW"):
                    _check_function(node)
                self._check_table(node, known)
                nodes += _children(node, known)

    def _check_table(self, node: dict[str, Any], known: frozenset[str]) -> None:
        if node.get("type") == "BASE_TABLE":
            path = tuple(str(part).lower() for part in node["qualified_name"]["path"])
            if node.get("at_clause") is not None:
                raise QueryRefusedError("a query must not ask for versions (AT): there are none.")
            if path in _SYSTEM_TABLES or (len(path) == 1 and path[0] in known):
                return
            if path[0] == "main":
                path = path[1:]
            if len(path) != 1 or path[0] not in VIEWS:
                raise QueryRefusedError(
                    f"a query can only read the tables of the store and its own WITH, found "
                    f"{'.'.join(node['qualified_name']['path'])!r}: GET /api/schema, or SHOW "
                    "TABLES, names those there are; files, system tables and their like cannot be "
                    "read here."
                )
            self.views.add(path[0])
        elif node.get("type") == "SHOW_REF" and not _may_be_shown(node):
            raise QueryRefusedError(
                "of SHOW, a query may be SHOW TABLES, DESCRIBE or SUMMARIZE of a table or query."
            )


def _children(node: dict[str, Any], known: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """What is below a node, each with the names of WITH that can be read there, in lower case."""
    for entry in node.get("cte_map", {}).get("map", []):
        # A definition sees those before it; a recursive one adds itself where it stands.
        yield entry["value"], known
        known |= {entry["key"].lower()}
    for key, child in node.items():
        if key == "cte_map":
            continue
        if key == "function" and node.get("type") == "TABLE_FUNCTION":
            _check_table_function(child)
            yield child["arguments"], known
        elif key == "right" and node.get("type") == "RECURSIVE_CTE_NODE":
            yield child, known | {node["cte_name"].lower()}
        else:
            yield child, known


def _may_be_shown(node: dict[str, Any]) -> bool:
    if node["show_type"] in _SHOWN:
        return node["query"] is not None
    return bool(node["show_type"] == "SHOW_SPECIAL" and node["table_name"] == '"tables"')


def _check_kind(node: dict[str, Any]) -> None:
    """Refuse nodes that are not known to be harmless."""
    if "class" in node:
        if node["class"] not in _EXPRESSIONS:
            raise QueryRefusedError(f"{node['class']} cannot be part of a query here.")
        if node["class"] == "TYPE" and (node.get("schema") or node.get("catalog")):
            raise QueryRefusedError("a type must be one of DuckDB's own, without a schema.")
    elif isinstance(node.get("type"), str) and node["type"] not in _NODES:
        raise QueryRefusedError(
            f"a query must only read, found {node['type'].removesuffix('_NODE')}: ask with one "
            "that gives rows and changes nothing."
        )


def _check_function(node: dict[str, Any]) -> None:
    name = str(node["function_name"]).lower()
    if name not in allowed_functions():
        raise QueryRefusedError(
            f"a query cannot call {name!r} here: functions that reach beyond their arguments, or "
            "are unknown, are refused."
        )


def _check_table_function(function: dict[str, Any]) -> None:
    name = str(function.get("function_name", "")).lower()
    if name not in _TABLE_FUNCTIONS:
        raise QueryRefusedError(
            f"a query cannot read from {name!r}: table functions are "
            f"{', '.join(sorted(_TABLE_FUNCTIONS))}, and no files can be read."
        )
