"""Expert routing: how much a model loses if each token keeps a few experts, by who chooses them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from analysis import Analysis, AnalysisError
from analysis.evaluation import SampleScores
from analysis.keeping import ComputedTables, committed_lineage, keep
from analysis.kmeans import normalise_rows
from analysis.routing import ROUTERS, KeptMass, RoutedExperts, Router, num_kept, unit_centres
from analysis.settings import RoutingSettings
from ray_app.ablation.curves import measured
from ray_app.ablation.engine import Engine, evaluation_specs
from ray_app.ablation.masks import UNPRUNED
from ray_app.ablation.routers import LayerRouters
from ray_app.ablation.routing_stage import RoutingSpec, RoutingTrial
from ray_app.ablation.samples import EvaluationSamples
from ray_app.capture.shards import PlannedShard
from ray_app.experts import weights_of
from ray_app.run import Run
from storage import TABLES

__all__ = ["OpenRouting", "Routers", "RoutingEngine", "route_experts", "routing_specs"]

Routers = Mapping[str, Mapping[int, LayerRouters]]
"""By id of the experts, then by layer."""
OpenRouting = Callable[[str, Routers], AbstractContextManager["RoutingEngine"]]
"""Takes the reference and what chooses experts, and gives an engine that ends with the block."""

_TABLES = ("routing", "routing_layers")
_GATHERED_BYTES = 1 << 30
"""Inputs of MLPs that are gathered at once; layers beyond take another pass of the model."""


def routing_specs(
    run: Run, cut: Sequence[range], reference: str, routers: Routers
) -> list[RoutingSpec]:
    """What workers need to route tokens in a run's model.

    Args:
        run: the run.
        cut: the layers of each stage.
        reference: the task that decides which tokens are common.
        routers: what chooses experts.
    """
    return [
        RoutingSpec.of(
            spec,
            common=spec.common,
            experts={
                name: {n: one for n, one in layers.items() if spec.start <= n < spec.stop}
                for name, layers in routers.items()
            },
        )
        for spec in evaluation_specs(run, cut, reference, kinds=[])
    ]


class RoutingEngine(Engine):
    """Measures routed models of one run; its workers' stages are made of `routing_specs`."""

    def route(
        self, experts: str, asked: Sequence[tuple[Router, int]], task: str, *, seed: int
    ) -> list[SampleScores]:
        """How well the samples of a task are predicted if each token keeps some experts.

        Args:
            experts: id of the experts.
            asked: pairs of a router and how many experts it keeps.
            task: the task.
            seed: of random experts.
        """
        shards = self._samples.of(task)
        more = {"experts": experts, "measure": "predictions", "seed": seed}
        return self._joined(
            [
                [self._routing_trial(s, router=router, num_kept=(count,), **more) for s in shards]
                for router, count in asked
            ],
            f"route {task}",
        )

    def kept_masses(
        self, experts: str, counts: Sequence[int], task: str, *, seed: int
    ) -> dict[int, KeptMass]:
        """What routers keep of the mass of a task's positions, by layer; arguments as `route`."""
        more = {"experts": experts, "measure": "masses", "num_kept": tuple(counts), "seed": seed}
        trials = [self._routing_trial(shard, **more) for shard in self._samples.of(task)]
        total: dict[int, KeptMass] = {}
        for parts in self._measure(trials, f"masses of {task}").values():
            for found in parts:
                for layer, mass in found.items():
                    total[layer] = total[layer] + mass if layer in total else mass
        return total

    def inputs(
        self, experts: str, layers: Sequence[int], task: str, num_tokens: int
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """What enters MLPs in the first counted positions that the run captured of a task.

        Args:
            experts: id of the experts.
            layers: the layers.
            task: the task.
            num_tokens: number of positions; fewer if there are not so many.

        Returns:
            By layer, (positions, width of the residual stream) and (positions, experts) float32:
            inputs, and the masses of experts.
        """
        more = {"experts": experts, "measure": "inputs", "layers": tuple(layers)}
        trials: list[RoutingTrial] = []
        for shard in self._run.shards:
            if shard.task == task and sum(trial.num_counted for trial in trials) < num_tokens:
                left_out = self._left_out(task)
                trials.append(self._routing_trial(shard, left_out=left_out, **more))
        found = self._measure(trials, "inputs of experts")
        parts = [part for trial in trials for part in found[trial.serial]]
        gathered = {}
        for layer in layers:
            x, masses = zip(*(part[layer] for part in parts if layer in part), strict=True)
            gathered[layer] = np.concatenate(x)[:num_tokens], np.concatenate(masses)[:num_tokens]
        return gathered

    def _routing_trial(self, shard: PlannedShard, **more: Any) -> RoutingTrial:
        return RoutingTrial.of(shard, serial=self._next_serial(), ablation=UNPRUNED, **more)


def route_experts(
    run: Run,
    samples: EvaluationSamples,
    experts: Sequence[RoutedExperts],
    settings: RoutingSettings,
    open_engine: OpenRouting,
    *,
    reference: str | None = None,
) -> Analysis:
    """Let routers choose experts for each token, and keep what they keep and what that costs.

    Args:
        run: the run that the experts are of.
        samples: what models are evaluated on.
        experts: from `load_experts`.
        settings: how many experts are kept, and on what that is measured.
        open_engine: starts workers, unless the result is in the store already.
        reference: the task that routers learn from; the study's own if not given.

    Raises:
        AnalysisError: if a task or share does not fit the run or the experts.
        ModelError: if the rows of experts cannot be read.
        StudyError: if a task has no samples to evaluate on.
    """
    chosen = _task_of(run, "reference", reference or run.record["reference"])
    tasks = [_task_of(run, "tasks", task) for task in settings.tasks or [chosen]]
    kept = {
        one.analysis: {share: num_kept(share, one.num_experts) for share in settings.shares}
        for one in experts
    }
    parameters = settings.model_dump() | {
        "reference": chosen,
        "tasks": tasks,
        "experts": list(kept),
        "layers": list(experts[0].labels),
    }
    lineage = committed_lineage(
        run.store, run.record, partial=False, advice="finish it with `actlake capture` first"
    )
    key = {
        "run": run.id,
        "parameters": parameters,
        "lineage": lineage | {"samples": samples.analysis},
    }

    def compute() -> ComputedTables:
        routers = _untaught(run, experts)
        with open_engine(chosen, routers) as engine:
            routers = _taught(engine, routers, chosen, settings)
        with open_engine(chosen, routers) as engine:
            return _tables(engine, experts, kept, tasks, settings.seed)

    return keep(run.store, "routing", key, _TABLES, compute)


def _tables(
    engine: RoutingEngine,
    experts: Sequence[RoutedExperts],
    kept: Mapping[str, Mapping[float, int]],
    tasks: Sequence[str],
    seed: int,
) -> ComputedTables:
    """Both tables of an engine whose routers have learned.

    Args:
        engine: runs the model.
        experts: the experts.
        kept: by id of the experts, how many are kept for each share.
        tasks: the tasks to evaluate.
        seed: of random experts.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    for task, one in product(tasks, experts):
        shared = {"run": one.run, "experts": one.analysis, "method": one.method, "task": task}
        asked = engine, one, kept[one.analysis], shared, seed
        found["routing_layers"] += _layers(*asked)
        found["routing"] += _predictions(*asked)
    return ComputedTables(
        {name: pa.Table.from_pylist(rows, TABLES[name].schema) for name, rows in found.items()}
    )


def _task_of(run: Run, setting: str, task: str | None) -> str:
    there = [row["task"] for row in run.record["tasks"]]
    if task is None or task not in there:
        raise AnalysisError(
            f"{setting} must be of run {run.id!r} ({', '.join(there)}), found {task!r}: pass "
            f"--{setting} with one of these."
        )
    return task


def _untaught(run: Run, experts: Iterable[RoutedExperts]) -> dict[str, dict[int, LayerRouters]]:
    """Experts with their centres."""
    weights = weights_of(run.record).open()
    return {
        one.analysis: {
            layer: LayerRouters.untaught(
                torch.from_numpy(labels),
                torch.from_numpy(
                    unit_centres(
                        normalise_rows(weights.rows(layer, one.projection)), labels, one.num_experts
                    )
                ),
            )
            for layer, labels in one.labels.items()
        }
        for one in experts
    }


def _taught(
    engine: RoutingEngine, routers: Routers, task: str, settings: RoutingSettings
) -> dict[str, dict[int, LayerRouters]]:
    """The same with networks that have learned."""
    taught: dict[str, dict[int, LayerRouters]] = {}
    for name, layers in routers.items():
        taught[name] = {}
        for group in _groups(layers, settings.learn_tokens):
            gathered = engine.inputs(name, group, task, settings.learn_tokens)
            for layer, (x, masses) in gathered.items():
                seen = torch.from_numpy(x), torch.from_numpy(masses)
                taught[name][layer] = layers[layer].taught(*seen, seed=settings.seed)
    return taught


def _groups(layers: Mapping[int, LayerRouters], num_tokens: int) -> Iterator[list[int]]:
    """Layers whose inputs are gathered together."""
    width = max(sum(one.centres.shape) for one in layers.values())
    size = max(1, _GATHERED_BYTES // (4 * width * num_tokens))
    ordered = sorted(layers)
    yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def _layers(
    engine: RoutingEngine,
    experts: RoutedExperts,
    kept: Mapping[float, int],
    shared: Mapping[str, Any],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of table ``routing_layers``."""
    found = engine.kept_masses(experts.analysis, list(kept.values()), shared["task"], seed=seed)
    for row, router in enumerate(ROUTERS):
        for column, (share, count) in enumerate(kept.items()):
            for layer, mass in sorted(found.items()):
                yield {
                    **shared,
                    "router": router,
                    "share": share,
                    "layer": layer,
                    "num_experts": experts.num_experts,
                    "num_kept": count,
                    "n": mass.n,
                    "mass_kept": mass.kept[row, column] / mass.n,
                    "mass_best": mass.kept[ROUTERS.index("truth"), column] / mass.n,
                    "mass_ratio": mass.relative[row, column] / mass.n,
                }


def _predictions(
    engine: RoutingEngine,
    experts: RoutedExperts,
    kept: Mapping[float, int],
    shared: Mapping[str, Any],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of table ``routing``."""
    task = shared["task"]
    shared = {**shared, "num_layers": len(experts.labels)}
    whole = engine.unpruned([task])[task]
    everything = {"router": "all", "share": 1.0, "num_kept": experts.num_experts}
    yield {**shared, **everything, **measured(whole, whole)}
    asked = [(router, share, count) for router in ROUTERS for share, count in kept.items()]
    pairs = [(router, count) for router, _, count in asked]
    scores = engine.route(experts.analysis, pairs, task, seed=seed)
    for (router, share, count), found in zip(asked, scores, strict=True):
        chosen = {"router": router, "share": share, "num_kept": count}
        yield {**shared, **chosen, **measured(whole, found)}
