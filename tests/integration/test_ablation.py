"""Ablated models on Ray actors: the same bits as in this process."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_app.ablation.engine import Engine, evaluation_specs
from ray_app.ablation.masks import UNPRUNED
from ray_app.ablation.samples import evaluation_samples, study_of
from ray_app.ablation.stage import build_evaluation
from ray_app.actors import ray_workers
from ray_app.capture.workers import LocalWorkers
from ray_app.facts import inspect_model
from ray_app.placement import Placement
from ray_app.progress import NoProgress
from ray_app.run import Run

pytestmark = pytest.mark.ray


def test_actors_evaluate_as_this_process_does(
    ray_cluster: None, write_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    run = capture_locally(write_study())
    study = study_of(run)
    samples = evaluation_samples(run, study, inspect_model(study))
    cut = (range(2),)
    specs = evaluation_specs(run, cut, "mixed", kinds=["mean"])
    neurons = {("mlp", 0): np.arange(9), ("attn", 1): np.arange(4)}

    def measure(workers: Any) -> list[Any]:
        engine = Engine(workers, run, samples, "mixed", lambda **_: nullcontext(NoProgress()))
        kinds: list[Any] = ["mean", "resample"]
        asked = [UNPRUNED, *(engine.ablation(kind, neurons) for kind in kinds)]
        return engine.evaluate([(ablation, "code") for ablation in asked])

    here = measure(LocalWorkers(*map(build_evaluation, specs)))
    placement = Placement(cut=cut, replicas=1, threads=1, gpus_per_stage=0)
    with ray_workers(specs, placement, max_deaths=0, build=build_evaluation) as actors:
        there = measure(actors)
    for ours, theirs in zip(here, there, strict=True):
        assert all(np.array_equal(ours.sums[name], theirs.sums[name]) for name in ours.sums)
