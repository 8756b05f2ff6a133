"""``actlake ablate``, ``crosseval`` and ``prune``: models without some of their neurons."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from analysis import AblationSettings, Analysis, AnalysisError, CrossSettings
from analysis.overlap import run_parameters
from analysis.selection import Neurons
from analysis.settings import Kind, PruningSettings
from ray_app.ablation.crossing import cross_evaluate
from ray_app.ablation.curves import check_tasks, pruning_curves, rank_run
from ray_app.ablation.engine import Engine, evaluation_specs, reference_means
from ray_app.ablation.masks import Ablation
from ray_app.ablation.samples import (
    EvaluationSamples,
    evaluation_samples,
    study_of,
    with_tokens,
)
from ray_app.ablation.stage import EvaluationSpec, EvaluationStage, build_evaluation
from ray_app.actors import cluster_nodes, ray_session, ray_workers
from ray_app.capture.workers import Workers
from ray_app.facts import ModelFacts, inspect_model
from ray_app.models.export import check_exportable, export_model
from ray_app.models.loading import quiet_transformers
from ray_app.placement import place
from ray_app.progress import open_progress
from ray_app.run import Run, load_run
from ray_app.study import Study
from ray_app.validation import explain
from storage import Store, open_store
from storage.sqlfiles import load_query

__all__ = ["Session", "ablate", "crosseval", "prune", "say_made"]

Settings = TypeVar("Settings", bound=PruningSettings)

_console = Console(stderr=True, highlight=False, soft_wrap=True)


class Session:
    """What the commands share: a run, its study and model, and its evaluation samples."""

    def __init__(self, store: Store, run: str, study: Path | None, tokens: int | None) -> None:
        quiet_transformers()
        # Drawing is Python and tokenizer work; torch's threads would only contend with it.
        torch.set_num_threads(1)
        self.run: Run = load_run(store, run)
        self.study: Study = study_of(self.run, study)
        if tokens is not None:
            self.study = with_tokens(self.study, tokens)
        self.model: ModelFacts = inspect_model(self.study)

    def samples(self) -> EvaluationSamples:
        """The samples to evaluate on, drawn if they are not there yet."""
        found = evaluation_samples(self.run, self.study, self.model, on_task=_say_task)
        for note in found.notes:
            _console.print(note)
        return found

    @contextmanager
    def engine(
        self, samples: EvaluationSamples, *, reference: str, kinds: Iterable[Kind]
    ) -> Iterator[Engine]:
        """An engine on Ray actors, which end with the block."""

        def specs_of(cut: Sequence[range]) -> Sequence[EvaluationSpec]:
            return evaluation_specs(self.run, cut, reference, kinds=kinds)

        with self.workers(specs_of, build_evaluation) as workers:
            yield Engine(workers, self.run, samples, reference, open_progress)

    @contextmanager
    def workers(
        self,
        specs_of: Callable[[Sequence[range]], Sequence[EvaluationSpec]],
        build: Callable[..., EvaluationStage],
    ) -> Iterator[Workers]:
        """Ray actors that run the stages of the model; they end with the block.

        Args:
            specs_of: gives the specs of stages with these layers.
            build: makes a stage of its spec and a device.
        """
        with ray_session():
            threads = int(self.run.record["threads"])
            placement = place(self.study, self.model, cluster_nodes(), threads=threads)
            specs = specs_of(placement.cut)
            max_deaths = self.study.resources.max_deaths
            with ray_workers(specs, placement, max_deaths=max_deaths, build=build) as workers:
                yield workers

    def measure(
        self, measure: Callable[..., Analysis], settings: PruningSettings, reference: str | None
    ) -> Analysis:
        """Measure ablated models on the evaluation samples, and say what was made.

        Args:
            measure: `pruning_curves` or `cross_evaluate`.
            settings: what to remove.
            reference: the task to score against; the run's own if not given.
        """
        samples = self.samples()
        open_engine = partial(self.engine, samples)
        made = measure(self.run, samples, settings, open_engine, reference=reference)
        say_made(made)
        return made

    def ablation(self, kind: Kind, neurons: Neurons, reference: str) -> Ablation:
        """An ablation with the values of a reference; only peaks need the model to run."""
        if kind == "peak":
            nothing = EvaluationSamples(analysis="", shards={}, notes=())
            with self.engine(nothing, reference=reference, kinds=[kind]) as engine:
                return engine.ablation(kind, neurons)
        means = reference_means(self.run, reference) if kind == "mean" else None
        return Ablation.of(kind, neurons, replacements=means)


def ablate(
    store_path: str,
    run: str | None,
    *,
    study: Path | None,
    tokens: int | None,
    reference: str | None,
    options: dict[str, Any],
) -> None:
    """Make pruning curves, keep them and print what the largest fraction does.

    Args:
        store_path: the store.
        run: id of the run, if the store has several.
        study: a study file with evaluations and resources.
        tokens: counted tokens of each task to evaluate on.
        reference: the task to score against; the run's own if not given.
        options: fields of `AblationSettings`; None for those not given.
    """
    settings = _settings(AblationSettings, options)
    store = open_store(store_path)
    session = Session(store, store.resolve_run(run), study, tokens)
    made = session.measure(pruning_curves, settings, reference)
    Console(highlight=False).print(_effects(store, made.id))


def crosseval(
    store_path: str,
    run: str | None,
    *,
    study: Path | None,
    tokens: int | None,
    reference: str | None,
    options: dict[str, Any],
) -> None:
    """Fill the cross-evaluation matrix, keep it and print it; arguments as `ablate`."""
    settings = _settings(CrossSettings, options)
    store = open_store(store_path)
    session = Session(store, store.resolve_run(run), study, tokens)
    made = session.measure(cross_evaluate, settings, reference)
    Console(highlight=False).print(_matrix(store, made.id))


def prune(
    store_path: str,
    run: str | None,
    *,
    task: str,
    fraction: float,
    out: Path,
    reference: str | None,
    options: dict[str, Any],
) -> None:
    """Write a checkpoint without the top fraction of a task's neurons.

    Args:
        store_path: the store.
        run: id of the run, if the store has several.
        task: the task.
        fraction: share of the neurons to remove.
        out: folder to make.
        reference: the task to score against; the run's own if not given.
        options: fields of `CrossSettings`; None for those not given.
    """
    settings = _settings(CrossSettings, {**options, "tasks": [task]})
    if settings.kind == "resample":
        raise AnalysisError(
            "kind must be zero, mean or peak to be exported, found 'resample': weights cannot draw "
            "activations of other positions."
        )
    store = open_store(store_path)
    session = Session(store, store.resolve_run(run), None, None)
    parameters = run_parameters(session.run.record, settings, reference)
    check_tasks(session.run, settings, parameters["reference"])
    neurons = rank_run(session.run, parameters)[task].top(fraction)
    model = session.model
    check_exportable(
        session.study.model,
        model.sites,
        model.architecture.skeleton(),
        neurons,
        has_values=settings.kind != "zero",
        out=out,
    )
    values = session.ablation(settings.kind, neurons, parameters["reference"]).values
    export_model(session.study.model, model.files, model.sites, neurons, values, out)
    click.echo(f"{out}: {sum(map(len, neurons.values())):,} neurons removed", err=True)


def _settings(kind: type[Settings], options: dict[str, Any]) -> Settings:
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise AnalysisError(f"{explain(error, kind)}.") from error


def _say_task(task: str) -> None:
    _console.print(f"choosing evaluation samples of {task}")


def say_made(made: Analysis) -> None:
    """Say which analysis was made, and how many rows its tables have."""
    rows = ", ".join(f"{file.table} {file.rows:,}" for file in made.files)
    state = "made" if made.is_new else "was there already"
    click.echo(f"analysis {made.id} {state}: rows of {rows}", err=True)


def _effects(store: Store, analysis: str) -> Table:
    query = load_query("analysis", "own_effects").text
    table = _table("Loss (nats) of a task, and what it rises by without neurons: own, random")
    for name in ("task", "kind", "top", "loss", "own", "random", "excess", "95 %"):
        left = name in ("task", "kind")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in store.table(query, {"analysis": analysis}).to_pylist():
        interval = "-"
        if row["excess_lower"] is not None:
            interval = f"{row['excess_lower']:+.3f} to {row['excess_upper']:+.3f}"
        numbers = (f"{row[name]:+.3f}" for name in ("selected_change", "random_change", "excess"))
        table.add_row(
            row["task"],
            row["kind"],
            f"{row['fraction']:.3g}",
            f"{row['unpruned']:.3f}",
            *numbers,
            interval,
        )
    return table


def _matrix(store: Store, analysis: str) -> Table:
    query = load_query("analysis", "cross_matrix").text
    rows = store.table(query, {"analysis": analysis}).to_pylist()
    evaluated = list(dict.fromkeys(row["evaluated"] for row in rows))
    table = _table("% left of each task by top-1, pruned for one (rows); -: target not reached")
    table.add_column("pruned for", no_wrap=True)
    for name in ("fraction", *evaluated):
        table.add_column(name, justify="right", no_wrap=True)
    for task in dict.fromkeys(row["task"] for row in rows):
        own = {row["evaluated"]: row for row in rows if row["task"] == task}
        shares = (own[name]["ratio"] for name in evaluated)
        cells = ("-" if share is None else f"{100 * share:.0f}" for share in shares)
        fraction = f"{own[task]['fraction']:.4f}" if own[task]["reached"] else "-"
        table.add_row(task, fraction, *cells)
    return table


def _table(title: str) -> Table:
    # Eight columns fit 80 characters only if they stand close together.
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
