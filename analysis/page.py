"""A report as one page that needs nothing else: no network, no other file."""

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

__all__ = ["render_page"]


def render_page(report: dict[str, Any]) -> str:
    """The page of a report, as HTML.

    All that comes from the store stands in one JSON block, which the script puts on the page as
    text, never as markup. A content security policy lets nothing run but that script, and nothing
    be loaded.

    Args:
        report: from `analysis.report.make_report`.
    """
    style, script = _part("report.css"), _part("report.js")
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


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _json(report: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in: HTML sees no tag, comment or entity."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
