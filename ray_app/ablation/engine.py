"""Running many ablated models on one set of workers, and gathering what they measure."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pyarrow as pa

from analysis import AnalysisError
from analysis.evaluation import SampleScores
from analysis.selection import Neurons
from analysis.settings import Kind
from ray_app.ablation.masks import UNPRUNED, Ablation, Histogram
from ray_app.ablation.samples import EvaluationSamples
from ray_app.ablation.stage import EvaluationSpec, Trial
from ray_app.capture.errors import CaptureError
from ray_app.capture.recorders import SiteKey
from ray_app.capture.shards import PlannedShard
from ray_app.capture.workers import BatchDone, ShardLost, Workers
from ray_app.progress import Progress
from ray_app.run import Run
from storage.sqlfiles import load_query

__all__ = ["NUM_COMMON", "Engine", "evaluation_specs", "reference_means"]

NUM_COMMON = 50
"""Tokens that uncommon accuracies leave out (Pochinkov and Schoots 2024)."""

OpenProgress = Callable[..., AbstractContextManager[Progress]]


def evaluation_specs(
    run: Run, cut: Sequence[range], reference: str, *, kinds: Iterable[Kind]
) -> list[EvaluationSpec]:
    """What workers need to evaluate ablations of a run.

    Args:
        run: the run.
        cut: the layers of each stage.
        reference: the task that decides which tokens are common, and where neurons peak.
        kinds: kinds of ablation that will be asked for.
    """
    params = {"run": run.id, "task": reference, "count": NUM_COMMON}
    rows = run.store.table(load_query("ray_app", "common_tokens").text, params)
    common = tuple(rows["token_id"].to_pylist())
    bounds = _bounds(run, reference) if "peak" in kinds else {}
    return [EvaluationSpec.of(spec, common=common, bounds=bounds) for spec in run.stage_specs(cut)]


class Engine:
    """Measures ablated models of one run."""

    def __init__(
        self,
        workers: Workers,
        run: Run,
        samples: EvaluationSamples,
        reference: str,
        open_progress: OpenProgress,
    ) -> None:
        """Take workers into use.

        Args:
            workers: their stages are made of `evaluation_specs`.
            run: the run.
            samples: what predictions are measured on.
            reference: the task that means and peaks are those of.
            open_progress: as `ray_app.progress.open_progress`.
        """
        self._workers = workers
        self._run = run
        self._samples = samples
        self._reference = reference
        self._open_progress = open_progress
        self._means: Mapping[SiteKey, np.ndarray] = {}
        self._peaks: Mapping[SiteKey, np.ndarray] = {}
        self._unpruned: dict[str, SampleScores] = {}
        self._num_trials = 0

    def ablation(self, kind: Kind, neurons: Neurons, *, seed: int = 0) -> Ablation:
        """An ablation whose values are those of the run's reference.

        Args:
            kind: what takes the place of an activation.
            neurons: the neurons to remove.
            seed: seed of ``resample``.
        """
        replacements = None
        if kind == "mean":
            self._means = self._means or reference_means(self._run, self._reference)
            replacements = self._means
        if kind == "peak":
            self._peaks = self._peaks or self._find_peaks()
            replacements = self._peaks
        return Ablation.of(kind, neurons, replacements=replacements, seed=seed)

    def evaluate(
        self, asked: Sequence[tuple[Ablation, str]], *, name: str = "ablate"
    ) -> list[SampleScores]:
        """How well the samples of tasks are predicted without some neurons.

        Args:
            asked: pairs of an ablation and the task to evaluate.
            name: what progress calls it.

        Raises:
            StudyError: if a task has no samples to evaluate on.
        """
        trials = [
            [self._trial(shard, ablation) for shard in self._samples.of(task)]
            for ablation, task in asked
        ]
        return self._joined(trials, name)

    def unpruned(self, tasks: Sequence[str]) -> dict[str, SampleScores]:
        """How well the samples of tasks are predicted by the whole model.

        Raises:
            StudyError: if a task has no samples to evaluate on.
            AnalysisError: if nothing is predicted of a task.
        """
        wanted = [task for task in tasks if task not in self._unpruned]
        found = self.evaluate([(UNPRUNED, task) for task in wanted], name="unpruned")
        for task, scores in zip(wanted, found, strict=True):
            if not scores.sums["n"].sum():
                raise AnalysisError(
                    f"nothing is predicted of task {task!r}, so ablation cannot change it: give "
                    "its images labels and choose a model with a classification head, or texts of "
                    "at least two tokens."
                )
            self._unpruned[task] = scores
        return {task: self._unpruned[task] for task in tasks}

    def recapture(self, ablation: Ablation, tasks: Sequence[str]) -> pa.Table:
        """Statistics of the ablated model over the samples that the run captured of tasks.

        Returns:
            Rows of table ``stats`` with columns ``run`` and ``task``.
        """
        trials = self._captured(tasks, ablation, "moments")
        found = self._measure(trials, "capture again")
        parts = []
        for trial in trials:
            for stats in found[trial.serial]:
                names = {"run": self._run.id, "task": trial.task}
                for name, value in names.items():
                    stats = stats.append_column(name, pa.array([value] * len(stats), pa.string()))
                parts.append(stats)
        return pa.concat_tables(parts)

    def _joined(self, groups: Sequence[Sequence[Trial]], name: str) -> list[SampleScores]:
        """The scores of each group of trials, over all of its samples."""
        found = self._measure([trial for group in groups for trial in group], name)
        return [
            SampleScores.join([part for trial in group for part in found[trial.serial]])
            for group in groups
        ]

    def _find_peaks(self) -> dict[SiteKey, np.ndarray]:
        trials = self._captured([self._reference], UNPRUNED, "histograms")
        total: dict[SiteKey, np.ndarray] = {}
        for parts in self._measure(trials, "peaks").values():
            for counts in parts:
                for key, found in counts.items():
                    total[key] = total[key] + found if key in total else found
        bounds = _bounds(self._run, self._reference)
        return {key: Histogram.peaks(counts, *bounds[key]) for key, counts in total.items()}

    def _captured(self, tasks: Sequence[str], ablation: Ablation, measure: Any) -> list[Trial]:
        """Trials over what the run captured."""
        trials = []
        for task in tasks:
            more = {"measure": measure, "left_out": self._left_out(task)}
            trials += [
                self._trial(shard, ablation, **more)
                for shard in self._run.shards
                if shard.task == task
            ]
        return trials

    def _left_out(self, task: str) -> tuple[int, ...]:
        """Samples of a task that the capture set aside."""
        query = load_query("ray_app", "left_out").text
        rows = self._run.store.table(query, {"run": self._run.id, "task": task})
        return tuple(rows["sample"].to_pylist())

    def _trial(self, shard: PlannedShard, ablation: Ablation, **more: Any) -> Trial:
        chosen = {"measure": "predictions"} | more
        return Trial.of(shard, serial=self._next_serial(), ablation=ablation, **chosen)

    def _next_serial(self) -> int:
        self._num_trials += 1
        return self._num_trials

    def _measure(self, trials: Sequence[Trial], name: str) -> dict[int, list[Any]]:
        """What each trial measured, by its serial number."""
        found: dict[int, list[Any]] = {}
        total = sum(trial.num_tokens for trial in trials)
        with self._open_progress(
            total_tokens=total, total_shards=len(trials), name=name, done="trials done"
        ) as progress:
            for event in self._workers.work(trials):
                if isinstance(event, BatchDone):
                    progress.advance(event.num_tokens)
                    continue
                trial = event.shard
                if isinstance(event, ShardLost):
                    progress.lost(trial.task, trial.shard, event.num_tokens, event.reason)
                    continue
                if not isinstance(trial, Trial):
                    raise CaptureError(f"workers gave back what is no trial: {trial!r}.")
                found[trial.serial] = list(event.files)
                progress.committed(trial.task)
        return found


def reference_means(run: Run, task: str) -> dict[SiteKey, np.ndarray]:
    """(width,) mean activation of each neuron in a task, by (site, layer)."""
    return {key: np.array(row["means"]) for key, row in _statistics(run, task)}


def _bounds(run: Run, task: str) -> dict[SiteKey, tuple[np.ndarray, np.ndarray]]:
    """(width,) least and largest activation of each neuron in a task, by (site, layer)."""
    return {
        key: (np.array(row["lowest"]), np.array(row["highest"]))
        for key, row in _statistics(run, task)
    }


def _statistics(run: Run, task: str) -> Iterator[tuple[SiteKey, dict[str, Any]]]:
    query = load_query("ray_app", "neuron_bounds").text
    for row in run.store.table(query, {"run": run.id, "task": task}).to_pylist():
        yield (row["site"], row["layer"]), row
