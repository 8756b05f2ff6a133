"""``actlake analyse``, ``overlap``, ``summary`` and ``plot``: from a captured run to answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from analysis import AnalysisError, AnalysisSettings, analyse_run, overlap_of_scores
from analysis.settings import Within
from analysis.summary import AnalysisView, newest_analysis, task_accuracy
from ray_app.progress import open_steps
from ray_app.study import load_study
from ray_app.validation import explain
from storage import Store, open_store

_BARS = " ▁▂▃▄▅▆▇█"


def chosen_settings(
    study: Path | None, options: dict[str, Any]
) -> tuple[list[AnalysisSettings], str | None]:
    """Analyses and reference of a study file, or the one that command-line options describe.

    Without a study, the reference is that of the run, which None stands for.

    Args:
        study: the study file, if its analyses are meant.
        options: fields of `AnalysisSettings`; None for those not given.

    Raises:
        AnalysisError: if both are given, the study has none, or an option is wrong.
        StudyError: if the study cannot be read.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if study is None:
        try:
            return [AnalysisSettings.model_validate(given)], None
        except ValidationError as error:
            raise AnalysisError(f"{explain(error, AnalysisSettings)}.") from error
    if given:
        raise AnalysisError(
            f"--{min(given)} cannot be given beside --study, which says what to compute: leave "
            "one of the two out."
        )
    settings = load_study(study)
    if not settings.analyses:
        raise AnalysisError(f"the study {study} has no analyses: add some, or pass --metrics.")
    return settings.analyses, settings.reference


def analyse(
    store: Store,
    run: str,
    analyses: Sequence[AnalysisSettings],
    *,
    reference: str | None = None,
    partial: bool = False,
) -> list[str]:
    """Make the analyses of a run that are not in the store yet; the ids of all of them."""
    ids = []
    for settings in analyses:
        with open_steps("analyse", unit="steps") as advance:
            made = analyse_run(
                store,
                run,
                settings,
                reference=reference,
                partial=partial,
                on_step=lambda step, advance=advance: advance(),  # type: ignore[misc]
            )
        rows = ", ".join(f"{file.table} {file.rows:,}" for file in made.files)
        state = "made" if made.is_new else "was there already"
        click.echo(f"analysis {made.id} {state}: rows of {rows}", err=True)
        ids.append(made.id)
    return ids


def overlap(scores: Path, fractions: list[float], out: Path, within: Within) -> None:
    """Selections and overlap of scores of one's own."""
    with open_steps("overlap", unit="steps") as advance:
        table = overlap_of_scores(
            scores, fractions, out, within=within, on_step=lambda step: advance()
        )
    click.echo(
        f"{out}: overlap ({table.num_rows:,} rows) and selections, each as Parquet and CSV",
        err=True,
    )


def summary(store_path: str, run: str | None, **view_options: Any) -> None:
    """Print what a run and one of its analyses say; options as for `newest_analysis`."""
    store = open_store(store_path)
    chosen = store.resolve_run(run)
    view = newest_analysis(store, chosen, **view_options)
    console = Console(highlight=False)
    has_pairs = bool(view.overlap())
    overlaps = (_overlap_table(view, site) for site in view.sites if has_pairs)
    for table in (
        _accuracy_table(store, chosen), *overlaps, _top_table(view), _profile_table(view)
    ):  # fmt: skip
        # As a title of the table it would be broken to the table's width.
        title, table.title = table.title, None
        console.print(title, style="bold")
        console.print(table)
    console.print(
        f"run {chosen}, analysis {view.analysis}\nstore {store.files.root}", soft_wrap=True
    )


def plot(store_path: str, run: str | None, out: Path, **view_options: Any) -> None:
    """Draw the pictures of an analysis of a run; options as for `newest_analysis`."""
    from analysis.figures import save_figures

    store = open_store(store_path)
    view = newest_analysis(store, store.resolve_run(run), **view_options)
    for path in save_figures(view, out):
        click.echo(path)


def _accuracy_table(store: Store, run: str) -> Table:
    table = _table("How well the model predicts each task", "task")
    for name in ("predictions", "loss (nats)", "top-1", "top-10"):
        _add_column(table, name, justify="right")
    for row in task_accuracy(store, run):
        shares = f"{row['top1']:.1%}", f"{row['top10']:.1%}"
        table.add_row(row["task"], f"{row['predictions']:,}", f"{row['loss']:.3f}", *shares)
    return table


def _overlap_table(view: AnalysisView, site: str) -> Table:
    cells = {(row["task_a"], row["task_b"]): row for row in view.overlap() if row["site"] == site}
    tasks = sorted({task for task, _ in cells})
    table = _table(
        f"Percent of the top {view.fraction:.1%} {site} neurons shared "
        f"({view.metric} against {view.reference}; chance {view.fraction:.1%})",
        "",
    )
    for task in tasks:
        _add_column(table, task, justify="right")
    for a in tasks:
        values = ("" if a == b else f"{100 * (cells[a, b]['share_of_a'] or 0):.1f}" for b in tasks)
        table.add_row(a, *values)
    return table


def _top_table(view: AnalysisView) -> Table:
    table = _table(
        "The most task-specific neurons: layer.neuron (score)", "task", "site", "best three"
    )
    neurons: dict[tuple[str, str], list[str]] = {}
    for row in view.top_neurons(3):
        text = f"{row['layer']}.{row['neuron']} ({row['score']:.1f})"
        neurons.setdefault((row["task"], row["site"]), []).append(text)
    for (task, site), of_task in neurons.items():
        table.add_row(task, site, ", ".join(of_task))
    return table


def _profile_table(view: AnalysisView) -> Table:
    table = _table(
        "Layers in which they lie, first to last", "task", "site", "share of the selection"
    )
    counts: dict[tuple[str, str], list[int]] = {}
    for row in view.layer_profile():
        counts.setdefault((row["task"], row["site"]), []).append(row["num_selected"])
    for (task, site), of_task in sorted(counts.items()):
        table.add_row(task, site, _bars(of_task))
    return table


def _bars(counts: list[int]) -> str:
    """A bar per number, relative to the largest; only zero is empty."""
    top = max(counts)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in counts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for name in columns:
        _add_column(table, name)
    return table


def _add_column(table: Table, name: str, *, justify: Literal["left", "right"] = "left") -> None:
    # On a narrow terminal a cell goes on in the next line; rich would cut it short.
    table.add_column(name, justify=justify, overflow="fold")
