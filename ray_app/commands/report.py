"""``actlake report``: what a store says, as one page."""

from pathlib import Path

import click

from analysis import AnalysisError
from analysis.page import render_page
from analysis.report import make_report
from storage import open_store


def report(store_path: str, run: str | None, out: Path) -> None:
    """Write the page of a store, or of one run of it."""
    page = render_page(make_report(open_store(store_path), run))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise AnalysisError(
            f"cannot write {out}: {error.strerror or error}. Give a file that can be written."
        ) from error
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, complete in itself", err=True)
