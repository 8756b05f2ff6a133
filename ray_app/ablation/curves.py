"""Pruning curves: what the removal of ever more of a task's neurons does, against random ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from analysis import AblationSettings, Analysis, AnalysisError
from analysis.evaluation import SampleScores, change, excess, means
from analysis.keeping import ComputedTables, committed_lineage, keep
from analysis.overlap import run_parameters
from analysis.selection import Neurons, Ranking, random_like, rankings, rankings_of_stats
from analysis.selectivity import selectivity
from analysis.settings import Kind, PruningSettings
from analysis.steps import Steps
from ray_app.ablation.engine import Engine
from ray_app.ablation.masks import Ablation
from ray_app.ablation.samples import EvaluationSamples
from ray_app.run import Run
from storage import TABLES
from storage.sqlfiles import load_query

__all__ = ["OpenEngine", "check_tasks", "keep_measured", "measured", "pruning_curves", "rank_run"]

OpenEngine = Callable[..., AbstractContextManager[Engine]]
"""Takes `reference` and `kinds`, and gives an `Engine` whose workers end with the block."""

_TABLES = ("evaluations", "ablation_effects", "selectivity")
_MEASURES = ("loss", "top1", "top10", "top1_uncommon", "top10_uncommon")

Rows = list[dict[str, Any]]


def pruning_curves(
    run: Run,
    samples: EvaluationSamples,
    settings: AblationSettings,
    open_engine: OpenEngine,
    *,
    reference: str | None = None,
) -> Analysis:
    """Remove the top fractions of tasks' neurons, and random ones, and keep what that does.

    Args:
        run: the run.
        samples: what models are evaluated on.
        settings: what to remove, and how.
        open_engine: starts workers, unless the result is in the store already.
        reference: the task to score against; the study's own if not given.

    Raises:
        AnalysisError: if a task, site or fraction does not fit the run.
        StudyError: if a task has no samples to evaluate on.
    """

    def compute(parameters: dict[str, Any]) -> ComputedTables:
        ranked = rank_run(run, parameters)
        for task in parameters["tasks"]:
            ranked[task].top(settings.fractions[0])  # A fraction of no neuron is told at once.
        with open_engine(reference=parameters["reference"], kinds=settings.kinds) as engine:
            return _Curves(engine, run, samples, parameters).tables(ranked)

    return keep_measured(
        run, samples, settings, reference, kind="ablation", tables=_TABLES, compute=compute
    )


def keep_measured(
    run: Run,
    samples: EvaluationSamples,
    settings: PruningSettings,
    reference: str | None,
    *,
    kind: str,
    tables: Sequence[str],
    compute: Callable[[dict[str, Any]], ComputedTables],
) -> Analysis:
    """Keep what is measured of ablated models, unless it is in the store already.

    Args:
        run: the run; it must be complete.
        samples: what models are evaluated on.
        settings: what is removed.
        reference: the task to score against; the study's own if not given.
        kind: first part of the analysis's id.
        tables: names of the tables.
        compute: makes them, given all parameters.

    Raises:
        AnalysisError: if a task or site does not fit the run, or it is not complete.
    """
    parameters = run_parameters(run.record, settings, reference)
    parameters["tasks"] = check_tasks(run, settings, parameters["reference"])
    lineage = committed_lineage(
        run.store, run.record, partial=False, advice="finish it with `actlake capture` first"
    )
    key = {
        "run": run.id,
        "parameters": parameters,
        "lineage": lineage | {"samples": samples.analysis},
    }
    return keep(run.store, kind, key, tables, lambda: compute(parameters))


def check_tasks(run: Run, settings: PruningSettings, reference: str) -> list[str]:
    """The tasks whose neurons are removed: those asked for, or all but the reference.

    Raises:
        AnalysisError: if one is not in the run or is the reference.
    """
    there = [task["task"] for task in run.record["tasks"] if task["task"] != reference]
    asked = settings.tasks or there
    for task in asked:
        if task not in there:
            raise AnalysisError(
                f"tasks must be among those of run {run.id!r} beside its reference "
                f"({', '.join(there)}), found {task!r}."
            )
    return list(dict.fromkeys(asked))


def rank_run(run: Run, parameters: dict[str, Any]) -> dict[str, Ranking]:
    """Rankings of a run's neurons by task; see `rankings`."""
    return rankings(Steps(run.store.connect(), lambda step: None), run.id, parameters)


@dataclass(frozen=True, slots=True)
class _Point:
    """One ablated model of a curve."""

    kind: Kind
    fraction: float
    seed: int | None
    """Which random choice; None for the top fraction."""
    ablation: Ablation

    @property
    def chosen_by(self) -> str:
        return "score" if self.seed is None else "random"


class _Curves:
    """The computation of `pruning_curves`."""

    def __init__(
        self, engine: Engine, run: Run, samples: EvaluationSamples, parameters: dict[str, Any]
    ) -> None:
        self._engine = engine
        self._run = run
        self._parameters = parameters
        sites = run.record["sites"]
        self._widths = {(site["site"], site["layer"]): site["width"] for site in sites}
        query = load_query("ray_app", "evaluation_labels").text
        labels = run.store.table(query, {"analysis": samples.analysis}).to_pylist()
        self._labels = {row["label_id"]: row["label"] for row in labels}

    def tables(self, ranked: dict[str, Ranking]) -> ComputedTables:
        """Compute all curves."""
        rows: dict[str, Rows] = {name: [] for name in _TABLES}
        tasks, reference = self._parameters["tasks"], self._parameters["reference"]
        every = [task["task"] for task in self._run.record["tasks"]]
        chosen = every if self._parameters["every_task"] else [*tasks, reference]
        unpruned = self._engine.unpruned(chosen)
        for evaluated, scores in unpruned.items():
            rows["evaluations"] += self._evaluations(None, None, evaluated, scores, scores)
        for task in tasks:
            on = every if self._parameters["every_task"] else [task, reference]
            points = list(self._points(task, ranked[task]))
            pairs = [(point, evaluated) for point in points for evaluated in on]
            asked = [(point.ablation, evaluated) for point, evaluated in pairs]
            found = dict(zip(pairs, self._engine.evaluate(asked, name=task), strict=True))
            for (point, evaluated), scores in found.items():
                rows["evaluations"] += self._evaluations(
                    task, point, evaluated, unpruned[evaluated], scores
                )
            rows["ablation_effects"] += self._effects(task, points, on, unpruned, found)
            rows["selectivity"] += self._selectivity(task, points, on, unpruned, found)
        return ComputedTables(
            {name: pa.Table.from_pylist(rows[name], TABLES[name].schema) for name in _TABLES}
        )

    def _points(self, task: str, ranking: Ranking) -> Iterator[_Point]:
        for kind in self._parameters["kinds"]:
            for fraction, neurons in self._selections(task, ranking, kind):
                seed = self._parameters["seed"]
                ablation = self._engine.ablation(kind, neurons, seed=seed)
                yield _Point(kind, fraction, None, ablation)
                for number in range(self._parameters["seeds"]):
                    drawn = random_like(neurons, self._widths, seed=number, name=task)
                    ablation = self._engine.ablation(kind, drawn, seed=number)
                    yield _Point(kind, fraction, number, ablation)

    def _selections(
        self, task: str, ranking: Ranking, kind: Kind
    ) -> Iterator[tuple[float, Neurons]]:
        """The neurons of each fraction, from the smallest up, so that each holds those before."""
        fractions = self._parameters["fractions"]
        neurons: Neurons | None = None
        for index, fraction in enumerate(fractions):
            neurons = ranking.top(fraction, beside=neurons)
            yield fraction, neurons
            if self._parameters["iterative"] and index < len(fractions) - 1:
                ablation = self._engine.ablation(kind, neurons, seed=self._parameters["seed"])
                reference = self._parameters["reference"]
                stats = self._engine.recapture(ablation, [task, reference])
                ranking = rankings_of_stats(stats, self._run.id, self._parameters)[task]

    def _identity(self, task: str, point: _Point) -> dict[str, Any]:
        return {"run": self._run.id, "task": task, "kind": point.kind}

    def _evaluations(
        self,
        task: str | None,
        point: _Point | None,
        evaluated: str,
        before: SampleScores,
        after: SampleScores,
    ) -> Iterator[dict[str, Any]]:
        shared = {
            "run": self._run.id,
            "task": task,
            "kind": None if point is None else point.kind,
            "chosen_by": "none" if point is None else point.chosen_by,
            "metric": self._parameters["metrics"][0],
            "sites": "+".join(self._parameters["sites"]),
            "within": self._parameters["within"],
            "iterative": self._parameters["iterative"],
            "fraction": 0.0 if point is None else point.fraction,
            "seed": None if point is None else point.seed,
            "num_removed": 0 if point is None else point.ablation.num_removed,
            "evaluated": evaluated,
        }
        yield {**shared, **measured(before, after)}
        for label_id in sorted(set(before.labels.tolist()) - {-1}):
            label = {"label_id": label_id, "label": self._labels[label_id]}
            parts = (scores.of_label(label_id) for scores in (before, after))
            yield {**shared, **label, **measured(*parts)}

    def _effects(
        self,
        task: str,
        points: Sequence[_Point],
        on: Sequence[str],
        unpruned: dict[str, SampleScores],
        found: dict[tuple[_Point, str], SampleScores],
    ) -> Iterator[dict[str, Any]]:
        for point in points:
            alike = [
                p for p in points
                if (p.kind, p.fraction) == (point.kind, point.fraction) and p.seed is not None
            ]  # fmt: skip
            if point.seed is not None or not alike:
                continue
            for evaluated in on:
                before, after = unpruned[evaluated], found[point, evaluated]
                controls = [found[other, evaluated] for other in alike]
                for measure in _MEASURES:
                    if not before.per(measure).sum():
                        continue
                    difference, spread = excess(after, controls, measure)
                    changed = change(before, after, measure).value
                    yield {
                        **self._identity(task, point),
                        "fraction": point.fraction,
                        "evaluated": evaluated,
                        "measure": measure,
                        "unpruned": means(before)[measure],
                        "selected_change": changed,
                        "num_random": len(alike),
                        "random_change": changed - difference.value,
                        "random_std": spread,
                        **difference.columns("excess"),
                    }

    def _selectivity(
        self,
        task: str,
        points: Sequence[_Point],
        on: Sequence[str],
        unpruned: dict[str, SampleScores],
        found: dict[tuple[_Point, str], SampleScores],
    ) -> Iterator[dict[str, Any]]:
        curves: dict[tuple[Kind, int | None], list[_Point]] = {}
        for point in points:
            curves.setdefault((point.kind, point.seed), []).append(point)
        for curve in curves.values():
            for retained in on:
                for measure in _MEASURES[1:]:
                    if retained == task or not unpruned[task].per(measure).sum():
                        continue
                    forget, retain = (
                        [
                            means(scores)[measure]
                            for scores in (unpruned[of], *(found[point, of] for point in curve))
                        ]
                        for of in (task, retained)
                    )
                    yield {
                        **self._identity(task, curve[0]),
                        "chosen_by": curve[0].chosen_by,
                        "seed": curve[0].seed,
                        "retained": retained,
                        "measure": measure,
                        **selectivity(forget, retain),  # type: ignore[arg-type]
                    }


def measured(before: SampleScores, after: SampleScores) -> dict[str, Any]:
    """Columns that say how well a model predicts, and how that differs from the unpruned one.

    Args:
        before: of the unpruned model.
        after: of the model, on the same samples.
    """
    found = means(after)
    # Tables of single predictions have columns of these names, of other types.
    renamed = {"loss": "mean_loss", "top1": "top1_share", "top10": "top10_share"}
    return {
        **{renamed.get(name, name): value for name, value in found.items()},
        **change(before, after, "loss").columns("loss_change"),
        **change(before, after, "top1").columns("top1_change"),
    }
