"""The cross-evaluation matrix: prune for one task down to a target, then measure every task.

Protocol of Pochinkov, Jones and Rahman (2024, arXiv 2408.17324): the top fraction of the task's
neurons is removed, and the fraction found by bisection, so that the task's top-1 accuracy falls to
a share of what it was (0.8); what is left of each task's accuracy fills the matrix.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from analysis import Analysis, AnalysisError, CrossSettings
from analysis.evaluation import SampleScores, means, ratio
from analysis.keeping import ComputedTables
from analysis.selection import Ranking
from ray_app.ablation.curves import OpenEngine, keep_measured, rank_run
from ray_app.ablation.engine import Engine
from ray_app.ablation.masks import Ablation
from ray_app.ablation.samples import EvaluationSamples
from ray_app.run import Run
from storage import TABLES

__all__ = ["cross_evaluate"]

_TABLE = "cross_evaluations"


def cross_evaluate(
    run: Run,
    samples: EvaluationSamples,
    settings: CrossSettings,
    open_engine: OpenEngine,
    *,
    reference: str | None = None,
) -> Analysis:
    """Prune for each task until its top-1 falls to the target, and keep what is left of all tasks.

    Arguments and errors as of `pruning_curves`, and:

    Raises:
        AnalysisError: if a task is never predicted right.
    """

    def compute(parameters: dict[str, Any]) -> ComputedTables:
        ranked = rank_run(run, parameters)
        for task in parameters["tasks"]:
            ranked[task].top(settings.upper)  # A fraction of no neuron is told at once.
        with open_engine(reference=parameters["reference"], kinds=[settings.kind]) as engine:
            searches = _search_all(engine, run, ranked, settings, parameters["tasks"])
            rows = _rows(engine, run, searches, parameters)
        return ComputedTables({_TABLE: pa.Table.from_pylist(rows, TABLES[_TABLE].schema)})

    return keep_measured(
        run, samples, settings, reference, kind="cross", tables=(_TABLE,), compute=compute
    )


@dataclass(slots=True)
class _Search:
    """Bisection over the fraction; removing `upper` leaves less than the target, `lower` more.

    Until some fraction leaves less, the fraction is doubled. That removing all neurons leaves less
    is not certain: other sites may do without, or all is taken for this task's class.
    """

    task: str
    ranking: Ranking
    target: float
    """Top-1 that the task is to fall to."""
    within: float
    """How far below it may end."""
    trial: float
    """The fraction to try next."""
    lower: float = 0.0
    upper: float | None = None
    found: Ablation | None = None
    """The ablation of `upper`; of all neurons, if no tried fraction reached the target."""
    is_done: bool = False

    def tell(self, top1: float, ablation: Ablation) -> None:
        """Take in what the tried fraction left."""
        if top1 <= self.target:
            self.upper, self.found = self.trial, ablation
            self.is_done = top1 >= self.target - self.within
        elif self.trial == 1:
            self.found, self.is_done = ablation, True
        else:
            self.lower = self.trial
        if self.is_done:
            return
        if self.upper is None:
            self.trial = min(1.0, 2 * self.trial)
        else:
            self.is_done = not self._halve(self.upper)

    def _halve(self, upper: float) -> bool:
        """Find the next fraction to try; False if none between the two selects other neurons."""
        least, most = (self.ranking.count(fraction) for fraction in (self.lower, upper))
        while upper - self.lower >= _LEAST_STEP:
            self.trial = (self.lower + upper) / 2
            count = self.ranking.count(self.trial)
            if count not in (least, most):
                return True
            if count == least:
                self.lower = self.trial
            else:
                self.upper = upper = self.trial
        return False


_LEAST_STEP = 1e-6
"""Differences of fractions that are not looked into, as in the paper's code."""


def _search_all(
    engine: Engine,
    run: Run,
    ranked: dict[str, Ranking],
    settings: CrossSettings,
    tasks: list[str],
) -> list[_Search]:
    """Search for all tasks side by side, so that workers have enough to do."""
    searches = []
    for task, scores in engine.unpruned(tasks).items():
        top1 = _top1(scores)
        if top1 == 0:
            raise AnalysisError(
                f"the top-1 accuracy of task {task!r} is 0 before anything is removed, so it "
                "cannot fall: leave the task out, or evaluate it on more tokens."
            )
        searches.append(
            _Search(task, ranked[task], settings.target * top1, settings.tolerance, settings.upper)
        )
    while under_way := [search for search in searches if not search.is_done]:
        asked = []
        for search in under_way:
            neurons = search.ranking.select(search.trial)
            ablation = engine.ablation(settings.kind, neurons, seed=settings.seed)
            asked.append((ablation, search.task))
        name = f"bisection of {len(under_way)} task(s)"
        for search, (ablation, _), scores in zip(
            under_way, asked, engine.evaluate(asked, name=name), strict=True
        ):
            search.tell(_top1(scores), ablation)
    return searches


def _rows(
    engine: Engine, run: Run, searches: list[_Search], parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    every = [task["task"] for task in run.record["tasks"]]
    unpruned = engine.unpruned(every)
    pairs = [(search, task) for search in searches for task in every]
    asked = [(search.found, task) for search, task in pairs if search.found is not None]
    rows = []
    for (search, task), scores in zip(pairs, engine.evaluate(asked, name="matrix"), strict=True):
        before, after = means(unpruned[task]), means(scores)
        rows.append(
            {
                "run": run.id,
                "task": search.task,
                "kind": parameters["kind"],
                "metric": parameters["metrics"][0],
                "sites": "+".join(parameters["sites"]),
                "within": parameters["within"],
                "target": parameters["target"],
                "reached": search.upper is not None,
                "fraction": search.upper or 1.0,
                "num_removed": 0 if search.found is None else search.found.num_removed,
                "evaluated": task,
                "n": after["n"],
                "top1_unpruned": before["top1"],
                "top1_pruned": after["top1"],
                **ratio(unpruned[task], scores, "top1").columns("ratio"),
                "loss_unpruned": before["loss"],
                "loss_pruned": after["loss"],
            }
        )
    return rows


def _top1(scores: SampleScores) -> float:
    return float(scores.sums["top1"].sum() / scores.sums["n"].sum())
