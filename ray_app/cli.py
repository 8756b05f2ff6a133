"""The command line: each command parses, imports what it needs, calls it, and leaves.

Imports are inside the commands because those of torch, transformers and Ray take seconds that
asking a store should not cost.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from storage import ActlakeError

__all__ = ["cli", "main"]

Command = TypeVar("Command", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
_STUDY = click.argument("study", type=_PATH)
_STORE = click.argument("store")
_RUN = click.option("--run", help="Id of the run; not needed if the store has one run.")


def _study_options(command: Command) -> Command:
    command = click.option(
        "--tokens", type=click.IntRange(min=1), help="Counted tokens of each task."
    )(command)
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY.PATH=VALUE",
        help="Change one setting of the study, such as model.init=random. May be repeated.",
    )(command)


def _overrides(given: tuple[str, ...], tokens: int | None) -> list[str]:
    return [*given, *([] if tokens is None else [f"capture.tokens={tokens}"])]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="actlake")
def cli() -> None:
    """actlake: what every neuron of a transformer did, in Parquet, asked with SQL."""


@cli.command()
@_STUDY
@click.option("--store", default=".", help="Folder or URL (s3://bucket/prefix) of the store to be.")
@_study_options
def plan(study: Path, store: str, overrides: tuple[str, ...], tokens: int | None) -> None:
    """Show what capturing STUDY would read, write and cost, and whether it fits."""
    from ray_app.commands import capture

    capture.plan(study, store, _overrides(overrides, tokens))


@cli.command()
@_STUDY
@click.option("--store", required=True, help="Folder or URL (s3://bucket/prefix) of the store.")
@_study_options
@click.option("--new-run", is_flag=True, help="Capture beside a run of an earlier form of STUDY.")
def capture(
    study: Path, store: str, overrides: tuple[str, ...], tokens: int | None, *, new_run: bool
) -> None:
    """Run the model of STUDY over its tasks into the store; resumes where it was stopped."""
    from ray_app.commands import capture

    capture.capture(study, store, _overrides(overrides, tokens), new_run=new_run)


@cli.command()
@_STORE
@click.argument("query")
@click.option(
    "--format",
    "result_format",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
    help="How to write the result.",
)
@click.option("--output", type=_PATH, help="File to write to instead of standard output.")
@click.option("--max-rows", type=click.IntRange(min=1), default=40, help="Most rows of a table.")
def sql(store: str, query: str, result_format: str, output: Path | None, max_rows: int) -> None:
    """Ask the STORE one SQL QUERY ('-' reads it from standard input)."""
    from ray_app.commands import query as commands

    text = sys.stdin.read() if query == "-" else query
    commands.sql(store, text, result_format=result_format, output=output, max_rows=max_rows)


@cli.command()
@_STORE
def views(store: str) -> None:
    """Print the view definitions, with which any DuckDB client can use the STORE alone."""
    from ray_app.commands import query

    query.views(store)


@cli.command()
@_STORE
def status(store: str) -> None:
    """Show the runs, tasks and analyses of the STORE and how far they are."""
    from ray_app.commands import query

    query.status(store)


@cli.command()
@_STORE
@click.option(
    "--recompute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also compute N samples again, one by one, and compare.",
)
@_RUN
def verify(store: str, recompute: int | None, run: str | None) -> None:
    """Check every committed file of the STORE against its checksum, and counts with each other."""
    from ray_app.commands import query

    query.verify(store, recompute=recompute, run=run)


@cli.command()
@_STORE
@click.argument("run_a")
@click.argument("run_b")
@click.option("--store-b", help="Folder or URL of the store that holds RUN_B, if another.")
@click.option("--fractions", default="0.01,0.05", show_default=True, help="Fractions to select.")
@click.option(
    "--metric", default="abs", show_default=True, help="abs, rms, std, sqrt, freq or mean."
)
@click.option(
    "--within",
    type=click.Choice(["model", "layer"]),
    default="model",
    show_default=True,
    help="Select the top fraction over all layers, or in each layer.",
)
@click.option(
    "--format",
    "result_format",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="A summary for people, or all rows.",
)
def drift(
    store: str,
    run_a: str,
    run_b: str,
    store_b: str | None,
    fractions: str,
    metric: str,
    within: str,
    result_format: str,
) -> None:
    """Compare RUN_B with RUN_A of the STORE: how far importance and selections differ."""
    from ray_app.commands import drift

    options = {"fractions": fractions.split(","), "metrics": [metric], "within": within}
    drift.drift(store, run_a, run_b, store_b=store_b, result_format=result_format, options=options)


def main() -> None:
    """Run the command line; user errors print one sentence and exit with status 2."""
    if not sys.stderr.isatty():
        # Logs want lines, not the bars that datasets and transformers draw.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("stopped; the same command goes on from what is finished.", err=True)
        sys.exit(130)
    except ActlakeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
