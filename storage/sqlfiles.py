"""SQL kept in files: each states its name, purpose, parameters and grain, and is checked on load.

-- name: neuron_count
-- purpose: How many neurons each layer has.
-- param: site - 'attn' or 'mlp'
-- grain: one row per layer
select layer, count(*) as neurons from neuron_stats where site = $site group by layer
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

__all__ = ["Query", "filled", "load_query", "parse_query", "quote"]

_HEADER = re.compile(r"^--\s*(name|purpose|param|column|grain):\s*(.*)$")
_PARAMETER = re.compile(r"\$([a-z_]+)")


@dataclass(frozen=True, slots=True)
class Query:
    """One SQL statement with what its file says of it."""

    name: str
    purpose: str
    params: dict[str, str]
    grain: str
    text: str
    columns: dict[str, str]
    """Meaning of each column, where the file says it: of views, which are public."""


def quote(text: str) -> str:
    """A SQL string literal; the only way paths and names enter SQL text."""
    return "'" + text.replace("'", "''") + "'"


def filled(query: Query, params: dict[str, str | float | list[str] | None]) -> str:
    """The text of a query with literals for its parameters, which anyone can run as it is.

    Args:
        query: the query.
        params: a value of each parameter.
    """
    return _PARAMETER.sub(lambda match: _literal(params[match[1]]), query.text)


def _literal(value: str | float | list[str] | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(quote, value))}]"
    return quote(value) if isinstance(value, str) else repr(value)


@cache
def load_query(package: str, name: str) -> Query:
    """Load ``<package>/sql/<name>.sql``.

    Args:
        package: import name of the package that owns the file, such as ``"analysis"``.
        name: file name without its suffix.

    Raises:
        ValueError: if the header is incomplete or does not match the parameters in use.
    """
    path = files(package) / "sql" / f"{name}.sql"
    return parse_query(path.read_text(encoding="utf-8"), file=f"{package}/sql/{name}.sql")


def parse_query(source: str, *, file: str) -> Query:
    """Parse one SQL file; `file` names it in errors."""
    header: dict[str, str] = {}
    params: dict[str, str] = {}
    columns: dict[str, str] = {}
    body: list[str] = []
    for line in source.splitlines():
        match = _HEADER.match(line)
        if match is None:
            body.append(line)
        elif match[1] in ("param", "column"):
            name, _, doc = match[2].partition(" - ")
            (params if match[1] == "param" else columns)[name.strip()] = doc.strip()
        else:
            header[match[1]] = match[2].strip()
    text = "\n".join(body).strip()
    missing = [key for key in ("name", "purpose", "grain") if not header.get(key)]
    if missing:
        raise ValueError(f"{file}: the header lacks {', '.join(missing)}.")
    used = set(_PARAMETER.findall(re.sub(r"--.*", "", text)))
    if used != set(params):
        raise ValueError(
            f"{file}: declared parameters {sorted(params)} differ from those used, {sorted(used)}."
        )
    return Query(header["name"], header["purpose"], params, header["grain"], text, columns)
