"""The command line: each command parses, imports what it needs, calls it, and leaves.

Imports are inside the commands because those of torch, transformers and Ray take seconds that
asking a store should not cost.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from storage import ActlakeError, open_store

if TYPE_CHECKING:
    from ray_app.study import Study

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


class _Numbers(click.ParamType[list[float]]):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[float]:
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.01,0.05", param, ctx)


class _Indices(click.ParamType[list[int]]):
    """Indices and ranges of them, separated by commas."""

    name = "indices"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        found: list[int] = []
        for part in str(value).split(","):
            first, _, last = part.partition("-")
            if not (first.isdecimal() and (last or first).isdecimal()):
                self.fail(f"{value!r} is not a list of indices such as 0-99,512", param, ctx)
            found.extend(range(int(first), int(last or first) + 1))
        return found


class _Names(click.ParamType[list[str]]):
    """Names separated by commas."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        return [part.strip() for part in str(value).split(",")]


_WITHIN = click.option(
    "--within",
    type=click.Choice(["model", "layer"]),
    default="model",
    show_default=True,
    help="Select the top fraction over all layers, or in each layer.",
)


def _view_options(command: Command) -> Command:
    command = click.option("--fraction", type=float, help="Fraction to show; the smallest.")(
        command
    )
    command = click.option("--metric", help="Which metric; abs if there.")(command)
    return click.option("--analysis", help="Which analysis; the last one.")(command)


def _read_study(path: Path, overrides: tuple[str, ...], tokens: int | None) -> "Study":
    """The study, read before the libraries that carry it out: a mistake is told at once."""
    from ray_app.study import load_study

    return load_study(path, [*overrides, *([] if tokens is None else [f"capture.tokens={tokens}"])])


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
    settings = _read_study(study, overrides, tokens)
    from ray_app.commands import capture

    capture.plan(settings, store)


@cli.command()
@_STUDY
@click.option("--store", required=True, help="Folder or URL (s3://bucket/prefix) of the store.")
@_study_options
@click.option("--new-run", is_flag=True, help="Capture beside a run of an earlier form of STUDY.")
def capture(
    study: Path, store: str, overrides: tuple[str, ...], tokens: int | None, *, new_run: bool
) -> None:
    """Run the model of STUDY over its tasks into the store; resumes where it was stopped."""
    settings = _read_study(study, overrides, tokens)
    from ray_app.commands import capture

    capture.capture(settings, store, new_run=new_run)


@cli.command()
@_STUDY
@click.option("--store", required=True, help="Folder or URL (s3://bucket/prefix) of the store.")
@_study_options
@click.option("--new-run", is_flag=True, help="Capture beside a run of an earlier form of STUDY.")
@click.option("--plots", type=_PATH, help="Also draw pictures into this folder.")
def run(
    study: Path,
    store: str,
    overrides: tuple[str, ...],
    tokens: int | None,
    *,
    new_run: bool,
    plots: Path | None,
) -> None:
    """Capture STUDY, make its analyses, and show what they say."""
    settings = _read_study(study, overrides, tokens)
    if plots is not None and not settings.analyses:
        raise ActlakeError(f"--plots draws analyses, and the study {study} has none: add some.")
    from ray_app.commands import analysis, capture

    finished = capture.capture(settings, store, new_run=new_run)
    made = analysis.analyse(
        finished.store, finished.id, settings.analyses, reference=settings.reference
    )
    if made:
        if plots is not None:
            analysis.plot(store, finished.id, plots, analysis=made[-1])
        analysis.summary(store, finished.id, analysis=made[-1])


@cli.command()
@_STORE
@_RUN
@click.option("--study", type=_PATH, help="Make the analyses of this study file.")
@click.option("--reference", help="Task to score against; that of --study, else of the run.")
@click.option("--metrics", type=_Names(), help="abs, rms, std, sqrt, freq, mean, rand.")
@click.option("--fractions", type=_Numbers(), help="Fractions to select, such as 0.01,0.05.")
@click.option("--within", type=click.Choice(["model", "layer"]), help="Top of model or layer.")
@click.option("--sites", type=_Names(), help="mlp, attn; all that were captured if not given.")
@click.option("--seed", type=int, help="Seed of the metric rand.")
@click.option("--partial", is_flag=True, help="Analyse a capture that is not complete.")
def analyse(
    store: str,
    run: str | None,
    study: Path | None,
    reference: str | None,
    *,
    partial: bool,
    **options: Any,
) -> None:
    """Compute importance, scores, selections and overlap of a run into the STORE."""
    from ray_app.commands import analysis

    opened = open_store(store)
    analyses, named = analysis.chosen_settings(study, options)
    chosen = opened.resolve_run(run)
    analysis.analyse(opened, chosen, analyses, reference=reference or named, partial=partial)


@cli.command()
@click.option("--scores", required=True, type=_PATH, help="Parquet: task, layer, neuron, score.")
@click.option(
    "--fractions",
    type=_Numbers(),
    default="0.01,0.05",
    show_default=True,
    help="Fractions of the neurons to select.",
)
@_WITHIN
@click.option("--out", required=True, type=_PATH, help="Folder for the results.")
def overlap(scores: Path, fractions: list[float], within: Any, out: Path) -> None:
    """Select and compare neurons by scores of your own, from a Parquet file."""
    from ray_app.commands import analysis

    analysis.overlap(scores, fractions, out, within)


@cli.command()
@_STORE
@_RUN
@_view_options
def summary(store: str, run: str | None, **view_options: Any) -> None:
    """Show accuracy, overlap and the most task-specific neurons of a run."""
    from ray_app.commands import analysis

    analysis.summary(store, run, **view_options)


@cli.command()
@_STORE
@_RUN
@_view_options
@click.option("--out", required=True, type=_PATH, help="Folder for the pictures.")
def plot(store: str, run: str | None, out: Path, **view_options: Any) -> None:
    """Draw overlap and layer profiles of a run as PNG files."""
    from ray_app.commands import analysis

    analysis.plot(store, run, out, **view_options)


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
@click.option("--site", required=True, help="'attn' or 'mlp'.")
@click.option("--layer", type=int, required=True, help="Index of the layer.")
@click.option("--task", required=True, help="Name of the task.")
@_RUN
@click.option("--neurons", type=_Indices(), help="Which neurons, such as 0-99,512; all of them.")
@click.option("--output", type=_PATH, required=True, help="The Parquet file to write.")
def export(store: str, output: Path, **place: Any) -> None:
    """Write raw values of the STORE as a Parquet file of positions by neurons."""
    from ray_app.commands import query

    query.export(store, output, **place)


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
@click.option(
    "--fractions",
    type=_Numbers(),
    default="0.01,0.05",
    show_default=True,
    help="Fractions of the neurons to select.",
)
@click.option(
    "--metric", default="abs", show_default=True, help="abs, rms, std, sqrt, freq or mean."
)
@_WITHIN
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
    fractions: list[float],
    metric: str,
    within: Any,
    result_format: str,
) -> None:
    """Compare RUN_B with RUN_A of the STORE: how far importance and selections differ."""
    from ray_app.commands import drift

    options = {"fractions": fractions, "metrics": [metric], "within": within}
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
