"""Engines in this process, and captured runs that have documents left to evaluate on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from ray_app.ablation.engine import Engine, evaluation_specs
from ray_app.ablation.samples import EvaluationSamples, evaluation_samples, study_of
from ray_app.ablation.stage import build_evaluation
from ray_app.capture.workers import LocalWorkers
from ray_app.facts import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run


@pytest.fixture
def draw() -> Callable[..., EvaluationSamples]:
    """Draws the evaluation samples of a run; further arguments as of `study_of`."""

    def samples_of(run: Run, *study: Any) -> EvaluationSamples:
        settings = study_of(run, *study)
        return evaluation_samples(run, settings, inspect_model(settings))

    return samples_of


@pytest.fixture
def open_engine() -> Callable[..., Any]:
    """Gives what opens engines of a run in this process, with one stage for each of some layers."""

    def opener(run: Run, samples: EvaluationSamples, *cut: range) -> Callable[..., Any]:
        layers = cut or (range(run.record["model"]["num_layers"]),)

        @contextmanager
        def engine(*, reference: str, kinds: Iterable[Any]) -> Iterator[Engine]:
            specs = evaluation_specs(run, layers, reference, kinds=kinds)
            workers: Any = LocalWorkers(*map(build_evaluation, specs))  # type: ignore[arg-type]
            yield Engine(workers, run, samples, reference, lambda **_: nullcontext(NoProgress()))

        return engine

    return opener
