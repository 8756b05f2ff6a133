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


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator; help lists them in this order."""

    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_study_options = _together(
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY.PATH=VALUE",
        help="Change one setting of the study, such as model.init=random. May be repeated.",
    ),
    click.option("--tokens", type=click.IntRange(min=1), help="Counted tokens of each task."),
)


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


_view_options = _together(
    click.option("--analysis", help="Which analysis; the last one."),
    click.option("--metric", help="Which metric; abs if there."),
    click.option("--fraction", type=float, help="Fraction to show; the smallest."),
)


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
@click.option(
    "--outline",
    is_flag=True,
    help="Draw no samples: reckon from STUDY and the model's measures alone.",
)
def plan(
    study: Path, store: str, overrides: tuple[str, ...], tokens: int | None, *, outline: bool
) -> None:
    """Show what capturing STUDY would read, write and cost, and whether it fits.

    Where the hub would be needed and cannot be asked, it is reckoned as with --outline.
    """
    settings = _read_study(study, overrides, tokens)
    from ray_app.commands import capture

    capture.plan(settings, store, outline=outline)


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
@click.option("--run", help="Show this run, its random twin and comparisons; all runs.")
@click.option("--out", required=True, type=_PATH, help="The HTML file to write.")
def report(store: str, run: str | None, out: Path) -> None:
    """Write all that the STORE says as one HTML page, which works offline."""
    from ray_app.commands import report

    report.report(store, run, out)


@cli.command()
@_STORE
@_RUN
@click.option("--site", required=True, help="mlp or attn.")
@click.option("--layer", required=True, type=int, help="Layer, from 0.")
@click.option("--neuron", required=True, type=int, help="Index inside site and layer, from 0.")
@click.option("--task", help="Show examples of this task; of all together if not given.")
@click.option(
    "--count", type=click.IntRange(min=1), help="Examples of each kind; as many as were kept."
)
@click.option("--per-sample", is_flag=True, help="Show only the best example of each sample.")
def neuron(store: str, run: str | None, **options: Any) -> None:
    """Show one neuron of a run: statistics by task, scores, and the tokens that excite it."""
    from ray_app.commands import neuron

    neuron.neuron(store, run, **options)


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
@_RUN
@click.option(
    "--file-mb",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Put files together up to this size.",
)
def compact(store: str, run: str | None, file_mb: int) -> None:
    """Put the many small files of a run together, sorted for queries; readers go on meanwhile."""
    from ray_app.commands import upkeep

    upkeep.compact(store, run, file_bytes=file_mb << 20)


@cli.command()
@_STORE
@click.option(
    "--older-than",
    type=click.FloatRange(min=1),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="Leave younger files: a capture may be about to commit them, a query may still read them.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing, only say what would be.")
def gc(store: str, older_than: float, *, dry_run: bool) -> None:
    """Remove files of the STORE that compaction replaced, or that killed processes left behind."""
    from ray_app.commands import upkeep

    upkeep.gc(store, seconds=3600 * older_than, dry_run=dry_run)


@cli.command()
@_STORE
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=8600, show_default=True, help="Port of HTTP."
)
@click.option(
    "--allow-host",
    "allowed",
    multiple=True,
    metavar="NAME",
    help="Another name by which the service is reached. May be repeated.",
)
@click.option("--replicas", type=click.IntRange(min=1), default=1, help="Copies of the service; 1.")
@click.option(
    "--slots", type=click.IntRange(min=1), default=4, help="Queries at a time of each; 4."
)
@click.option(
    "--memory-mb", type=click.IntRange(min=64), default=1024, help="Memory of one query; 1024."
)
@click.option("--studies", type=_PATH, help="Allow jobs, for the study files in this folder.")
@click.option("--token-file", type=_PATH, help="File that keeps the token; made if missing.")
def serve(store: str, **options: Any) -> None:
    """Serve the STORE as a web page and an HTTP API, until Ctrl-C."""
    from ray_app.commands import serve

    serve.serve(store, **options)


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


_pruning_options = _together(
    click.option("--seed", type=int, help="Seed of resampling and of the metric rand; 0."),
    click.option("--sites", type=_Names(), help="mlp, attn; all that were captured."),
    click.option("--within", type=click.Choice(["model", "layer"]), help="Top of what; model."),
    click.option("--metric", help="abs, rms, std, sqrt, freq, mean or rand; abs."),
    click.option("--reference", help="Task to score against; that of the run if not given."),
)
_TOKENS = click.option("--tokens", type=click.IntRange(min=1), help="Tokens to evaluate a task on.")
_STUDY_OF_RUN = click.option(
    "--study", type=_PATH, help="Study file of the run, whose evaluation and resources to use."
)
_evaluation_options = _together(
    _STUDY_OF_RUN,
    _TOKENS,
    click.option("--tasks", type=_Names(), help="Tasks to prune for; all but the reference."),
)


@cli.command()
@_STORE
@_RUN
@_evaluation_options
@_pruning_options
@click.option("--fractions", type=_Numbers(), help="Fractions to remove; 0.01,0.02,0.05,0.1.")
@click.option("--kinds", type=_Names(), help="zero, mean, peak, resample; zero if not given.")
@click.option("--seeds", type=int, help="Random controls of each fraction; 3 if not given.")
@click.option(
    "--iterative", is_flag=True, help="Score again on the ablated model before each fraction."
)
@click.option(
    "--every-task", is_flag=True, help="Evaluate all tasks, not only the pruned and the reference."
)
def ablate(
    store: str,
    run: str | None,
    study: Path | None,
    tokens: int | None,
    reference: str | None,
    **options: Any,
) -> None:
    """Remove tasks' neurons from the model, and random ones, and measure what that costs."""
    from ray_app.commands import ablation

    ablation.ablate(store, run, study=study, tokens=tokens, reference=reference, options=options)


@cli.command()
@_STORE
@_RUN
@_evaluation_options
@_pruning_options
@click.option("--kind", help="zero, mean, peak or resample; zero if not given.")
@click.option("--target", type=float, help="Share of its top-1 to prune a task to; 0.8.")
@click.option("--upper", type=float, help="Fraction that the search begins with; 0.128.")
def crosseval(
    store: str,
    run: str | None,
    study: Path | None,
    tokens: int | None,
    reference: str | None,
    **options: Any,
) -> None:
    """Prune for each task until its top-1 falls to a target, and measure all tasks."""
    from ray_app.commands import ablation

    ablation.crosseval(store, run, study=study, tokens=tokens, reference=reference, options=options)


@cli.command()
@_STORE
@_RUN
@click.option("--task", required=True, help="Task whose neurons to remove.")
@click.option("--fraction", required=True, type=float, help="Share of the neurons to remove.")
@click.option("--out", required=True, type=_PATH, help="Folder to make.")
@click.option("--kind", help="zero, mean or peak; zero if not given.")
@_pruning_options
def prune(
    store: str,
    run: str | None,
    task: str,
    fraction: float,
    out: Path,
    reference: str | None,
    **options: Any,
) -> None:
    """Write the model without a task's neurons as a checkpoint of transformers or timm."""
    from ray_app.commands import ablation

    ablation.prune(
        store, run, task=task, fraction=fraction, out=out, reference=reference, options=options
    )


@cli.command()
@_STORE
@_RUN
@click.option("--clusters", required=True, type=int, help="Experts of each layer.")
@click.option(
    "--method",
    default="kmeans",
    show_default=True,
    help="kmeans: balanced k-means on unit rows of the input projection; coactivation: the graph "
    "of neurons that fire together, cut; random: a control.",
)
@click.option(
    "--projection",
    default="up",
    show_default=True,
    help="Whose rows kmeans clusters: up, or gate of gated MLPs.",
)
@click.option("--task", help="Whose pairs of neurons coactivation reads; the run's reference.")
@click.option(
    "--weight",
    default="product",
    show_default=True,
    help="Of two neurons in coactivation: product of activations, or together, a count.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of centres and shuffling."
)
@click.option(
    "--ray", "on_ray", is_flag=True, help="One Ray task per layer, where RAY_ADDRESS says or here."
)
def experts(store: str, run: str | None, *, on_ray: bool, **options: Any) -> None:
    """Group the MLP neurons of each layer of a run into experts of equal size."""
    from ray_app.commands import experts

    experts.experts(store, run, options, on_ray=on_ray)


@cli.command()
@_STORE
@click.argument("experts", nargs=-1, required=True)
@click.option(
    "--fractions",
    type=_Numbers(),
    default="0.01,0.05",
    show_default=True,
    help="Fractions of the neurons of each layer to select.",
)
@click.option(
    "--metric", default="abs", show_default=True, help="abs, rms, std, sqrt, freq, mean or rand."
)
@click.option(
    "--simulations",
    type=click.IntRange(min=2),
    default=1000,
    show_default=True,
    help="Random selections that each is compared with.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of these."
)
@click.option("--plots", type=_PATH, help="Also draw pictures into this folder.")
def align(store: str, experts: tuple[str, ...], *, plots: Path | None, **options: Any) -> None:
    """Compare EXPERTS (ids of analyses) with what tasks select, in each run that they are of."""
    from ray_app.commands import experts as commands

    commands.align(store, experts, options, plots=plots)


@cli.command()
@_STORE
@click.argument("experts", nargs=-1, required=True)
@click.option("--tasks", type=_Names(), help="Tasks to evaluate; the reference if not given.")
@_TOKENS
@_STUDY_OF_RUN
@click.option("--reference", help="Task that routers learn from; that of the run if not given.")
@click.option("--shares", type=_Numbers(), help="Shares of experts to keep; 0.1,0.2,0.3,0.4,0.5.")
@click.option("--layers", type=_Indices(), help="Layers to route in; all that have experts.")
@click.option("--learn-tokens", type=int, help="Tokens that routers learn from; 4096.")
@click.option("--seed", type=int, help="Seed of learning and of random experts; 0.")
def routing(
    store: str,
    experts: tuple[str, ...],
    study: Path | None,
    tokens: int | None,
    reference: str | None,
    **options: Any,
) -> None:
    """Keep, for each token, a share of EXPERTS (ids of analyses), and measure what that costs."""
    from ray_app.commands import routing as commands

    commands.routing(
        store, experts, study=study, tokens=tokens, reference=reference, options=options
    )


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
