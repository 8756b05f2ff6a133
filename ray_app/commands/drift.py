"""``actlake drift``: how far one run is from another."""

from typing import Any

import click
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from analysis import AnalysisError, AnalysisSettings, compare_runs
from analysis.drift import drift_by_layer, drift_by_task, drift_query, persistence_of
from ray_app.commands import query
from ray_app.progress import open_steps
from ray_app.validation import explain
from storage import Store, open_store

_MAX_FRACTIONS = 3
"""More columns of shared neurons than this do not fit 80 columns."""

_NUM_LAYERS = 3
"""Layers of each site that the summary names."""

_TASK_WIDTH = 12

_LEGEND = """\
corr: Spearman's correlation of importance; error: its |a - b| / max(|a|, |b|)
top: % of A's selection {scope} that B shares; chance: the fraction
loss in nats, top-1 in percentage points: B - A"""

_PERSISTENCE_LEGEND = """\
corr: over pairs of tasks, of the share they have in common in A and in B
p: share of orders of the tasks with as large a corr; same: % of A that B shares"""


def drift(
    store_path: str,
    run_a: str,
    run_b: str,
    *,
    store_b: str | None,
    result_format: str,
    options: dict[str, Any],
) -> None:
    """Compare two runs, keep the result in the store and print it.

    Args:
        store_path: the store that holds run A and gets the result.
        run_a: id of the first run.
        run_b: id of the second run.
        store_b: the store that holds run B, if it is another one.
        result_format: 'table' for a summary; 'csv' or 'json' for all rows.
        options: values of `AnalysisSettings`, as text.
    """
    store = open_store(store_path)
    settings = _settings(options)
    with open_steps("drift", unit="steps") as advance:
        made = compare_runs(
            store,
            run_a,
            run_b,
            settings,
            store_b=None if store_b is None else open_store(store_b),
            on_step=lambda step: advance(),
        )
    state = "made" if made.analysis.is_new else "was there already"
    click.echo(
        f"analysis {made.analysis.id} {state}: {made.analysis.files[0].rows:,} rows of drift",
        err=True,
    )
    if made.left_out:
        click.echo(f"left out: {', '.join(made.left_out)}", err=True)
    if result_format == "table":
        click.echo(f"drift from {run_a} (A)\n        to {run_b} (B)\n")
        _print_summary(store, made.analysis.id, settings)
    else:
        text = drift_query(made.analysis.id)
        query.sql(store_path, text, result_format=result_format, output=None, max_rows=1)


def _settings(options: dict[str, Any]) -> AnalysisSettings:
    try:
        return AnalysisSettings.model_validate(options)
    except ValidationError as error:
        raise AnalysisError(f"{explain(error, AnalysisSettings)}.") from error


def _print_summary(store: Store, analysis: str, settings: AnalysisSettings) -> None:
    metric = settings.metrics[0]
    rows = drift_by_task(store, analysis, metric)
    console = Console(highlight=False)
    console.print(_by_task(rows, settings))
    scope = "over all layers" if settings.within == "model" else "in each layer"
    click.echo(_LEGEND.format(scope=scope) + "\n")
    console.print(_by_layer(drift_by_layer(store, analysis, metric, _NUM_LAYERS), settings))
    console.print(_persistence(persistence_of(store, analysis, metric)))
    click.echo(_PERSISTENCE_LEGEND + "\n")
    others = sorted({row["task"] for row in rows if not row["same_inputs"]})
    if others:
        console.print(
            f"The runs did not read the same tokens of {', '.join(others)}: differences there are "
            "also those of the texts."
        )


def _by_task(rows: list[dict[str, Any]], settings: AnalysisSettings) -> Table:
    fractions = settings.fractions[:_MAX_FRACTIONS]
    table = _table(f"Drift by task: {settings.metrics[0]}, over the whole model")
    table.add_column("task", max_width=_TASK_WIDTH, no_wrap=True, overflow="ellipsis")
    table.add_column("site")
    tops = [f"top\n{fraction:.3g}" for fraction in fractions]
    for name in ("rank\ncorr", "error\nmedian", "error\np90", *tops, "loss", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        is_first, last = row["task"] != last, row["task"]
        predictions = (
            (_signed(row["loss_difference"], 3), _signed(row["top1_difference"], 1, scale=100))
            if is_first
            else ("", "")
        )
        table.add_row(
            row["task"] if is_first else "",
            row["site"],
            _number(row["correlation"], 4),
            _number(row["error_median"], 4),
            _number(row["error_p90"], 4),
            *(_number(share, 1, scale=100) for share in row["shares"][: len(fractions)]),
            *predictions,
        )
    return table


def _by_layer(rows: list[dict[str, Any]], settings: AnalysisSettings) -> Table:
    table = _table("Layers that drift most, over all tasks")
    table.add_column("site")
    top = f"top\n{settings.fractions[0]:.3g}"
    for name in ("layer", "rank\ncorr", "error\nmedian", "error\np90", top, "lift"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["site"],
            str(row["layer"]),
            _number(row["correlation"], 4),
            _number(row["error_median"], 4),
            _number(row["error_p90"], 4),
            _number(row["share_of_a"], 1, scale=100),
            _number(row["lift"], 1),
        )
    return table


def _persistence(rows: list[dict[str, Any]]) -> Table:
    table = _table("Do tasks share neurons in the same way, and are they the same neurons?")
    table.add_column("site")
    for name in ("fraction", "corr", "p", "same", "spread", "chance", "lift"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["site"],
            f"{row['fraction']:.3g}",
            _number(row["correlation"], 3),
            _number(row["p_value"], 4),
            _number(row["same_neurons"], 1, scale=100),
            _number(row["same_neurons_spread"], 1, scale=100),
            _number(row["same_by_chance"], 1, scale=100),
            _number(row["lift"], 1),
        )
    return table


def _number(value: float | None, digits: int, *, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _signed(value: float | None, digits: int, *, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:+.{digits}f}"


def _table(title: str) -> Table:
    # Ten columns fit 80 characters only if they stand close together.
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
