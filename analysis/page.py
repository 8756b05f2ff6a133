"""A report as one page that needs nothing else: no network, no other file."""

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

__all__ = ["render_page"]

_MODULES = ("shared/format.js", "shared/dom.js", "shared/charts.js", "shared/table.js", "report.js")
"""The scripts of the page, each after those that it imports."""


def render_page(report: dict[str, Any]) -> str:
    """The page of a report, as HTML.

    All that comes from the store stands in one JSON block, which the script puts on the page as
    text, never as markup. A content security policy lets nothing run but that script, and nothing
    be loaded.

    The script is one module that holds those of `_MODULES`: a page on a disk can import none. The
    service serves the shared ones as they are.

    Args:
        report: from `analysis.report.make_report`.
    """
    style = _part("shared/base.css") + _part("report.css")
    script = "".join(map(_inlined, _MODULES))
    parts = {
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "report": _json(report),
    }
    # One pass: what is put in may hold such a mark itself.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _part("report.html"))


def _part(name: str) -> str:
    return (files("analysis") / "web" / name).read_text(encoding="utf-8")


def _inlined(name: str) -> str:
    """A module without its imports and exports: all modules of the page stand in one."""
    return re.sub(r"^(?:import \{[^}]*\} from \S+;\n|export )", "", _part(name), flags=re.MULTILINE)


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _json(report: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in: HTML sees no tag, comment or entity."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
