"""``actlake experts`` and ``align``: neurons in groups, and how groups match tasks."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from analysis import AnalysisError, AnalysisSettings
from analysis.alignment import AlignmentSettings, align_experts, alignment_by_run
from analysis.experts import ExpertSettings, experts_by_layer
from ray_app.actors import ray_session
from ray_app.experts import make_experts, split_layers
from ray_app.models.loading import quiet_transformers
from ray_app.progress import open_steps
from ray_app.tasks import split_layers_on_ray
from ray_app.validation import explain
from storage import Store, open_store

_LEGEND = """\
means over layers and tasks, +-: standard deviation over tasks
auc: how far selected neurons lie together; random, best: by chance, and at most
ami: adjusted mutual information of experts and selection
rich: share of it in experts that hold more than by chance (p <= 0.001)"""


def experts(store_path: str, run: str | None, options: dict[str, Any], *, on_ray: bool) -> None:
    """Group the neurons of a run, keep the experts in the store and print what they are.

    Args:
        store_path: the store.
        run: id of the run; not needed if the store has one.
        options: values of `ExpertSettings`.
        on_ray: whether layers are tasks of a Ray cluster.
    """
    store = open_store(store_path)
    chosen = store.resolve_run(run)
    try:
        settings = ExpertSettings.model_validate(options)
    except ValidationError as error:
        raise AnalysisError(f"{explain(error, ExpertSettings)}.") from error
    quiet_transformers()
    num_layers = store.run_record(chosen)["model"]["num_layers"]
    with (
        ray_session() if on_ray else nullcontext(),
        open_steps("experts", total=num_layers, unit="layers") as advance,
    ):
        mapper = split_layers_on_ray if on_ray else split_layers
        made = make_experts(store, chosen, settings, mapper=mapper, on_layer=advance)
    state = "made" if made.is_new else "was there already"
    rows = ", ".join(f"{file.table} {file.rows:,}" for file in made.files)
    click.echo(f"analysis {made.id} {state}: rows of {rows}", err=True)
    _print_layers(store, made.id)


def align(
    store_path: str, experts: tuple[str, ...], options: dict[str, Any], *, plots: Path | None
) -> None:
    """Compare experts with the selections of tasks, keep the result and print its means.

    Args:
        store_path: the store.
        experts: ids of analyses that made experts.
        options: ``metric``, ``fractions``, ``simulations`` and ``seed``.
        plots: folder for a picture; none is drawn if not given.
    """
    store = open_store(store_path)
    settings = _alignment_settings(**options)
    with open_steps("align", unit="steps") as advance:
        made = align_experts(store, experts, settings, on_step=lambda step: advance())
    state = "made" if made.is_new else "was there already"
    written = ", ".join(f"{file.table} {file.rows:,}" for file in made.files)
    click.echo(f"analysis {made.id} {state}: rows of {written}", err=True)
    metric = settings.selection.metrics[0]
    tables = {
        fraction: alignment_by_run(store, made.id, metric, fraction)
        for fraction in settings.selection.fractions
    }
    rows = next(iter(tables.values()))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    of_experts = {row["experts"]: f"{row['method']} of {row['experts_run']}" for row in rows}
    for name, meaning in of_experts.items():
        click.echo(f"{name}: {meaning}")
    for number, run in enumerate(runs, 1):
        click.echo(f"run {number}: {run}")
    for fraction, rows in tables.items():
        _print_alignment(rows, runs, fraction)
    click.echo(_LEGEND)
    if plots is not None:
        from analysis.figures import save_alignment

        for fraction in settings.selection.fractions:
            click.echo(save_alignment(store, made.id, metric, fraction, plots))


def _alignment_settings(
    *, metric: str, fractions: list[float], simulations: int, seed: int
) -> AlignmentSettings:
    try:
        selection = AnalysisSettings.model_validate(
            {"metrics": [metric], "fractions": fractions, "within": "layer"}
        )
    except ValidationError as error:
        raise AnalysisError(f"{explain(error, AnalysisSettings)}.") from error
    return AlignmentSettings(selection=selection, simulations=simulations, seed=seed)


def _print_alignment(rows: list[dict[str, Any]], runs: list[str], fraction: float) -> None:
    table = Table(
        title=f"Experts and the top {fraction:.1%} of each layer",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("experts", no_wrap=True)
    table.add_column("scores", no_wrap=True)
    for name in ("auc", "+-", "random", "best", "ami", "+-", "rich"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = (row[k] for k in ("auc", "auc_std", "auc_random", "auc_best", "ami", "ami_std"))
        table.add_row(
            row["experts"],
            f"run {runs.index(row['run']) + 1}",
            *("-" if number is None else f"{number:.3f}" for number in numbers),
            f"{row['enriched']:.1%}",
        )
    Console(highlight=False).print(table)


def _print_layers(store: Store, analysis: str) -> None:
    rows = experts_by_layer(store, analysis)
    table = Table()
    for name in ("layer", "neurons", "experts", "sizes", "iterations", "explained", "inside"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = sorted({row["smallest"], row["largest"]})
        explained = "-"
        if row["inertia"] is not None:
            explained = f"{1 - row['inertia'] / row['total_inertia']:.1%}"
        table.add_row(
            str(row["layer"]),
            f"{row['num_neurons']:,}",
            f"{row['num_experts']:,}",
            "-".join(map(str, sizes)),
            str(row["num_iterations"] or "-"),
            explained,
            "-" if row["inside"] is None else f"{row['inside']:.1%}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print("explained: share of the unit rows' spread that lies between experts")
    console.print("inside: share of the weight of co-activation that lies inside experts")
