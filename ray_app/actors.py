"""Ray: actors that hold stages, and the pool that feeds them. The only module that starts Ray."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from torch import Tensor

from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import CaptureError, StageSpec, build_stage
from ray_app.capture.workers import BatchDone, ShardDone
from ray_app.models.loading import quiet_transformers
from storage import ActlakeError, FileRecord

__all__ = ["RayWorkers", "ray_session"]

_SHARDS_IN_FLIGHT = 2
"""Per pipeline: one that is computed and one that waits, so that no actor idles."""


class StageActor:
    """A stage on a Ray worker; every call goes to the stage."""

    def __init__(self, spec: StageSpec) -> None:
        quiet_transformers()
        self._stage = build_stage(spec)

    def ready(self) -> None:
        """Return once the model is loaded."""

    def step(self, shard: PlannedShard, index: int, hidden: Tensor | None) -> int:
        """See `Stage.step`."""
        return self._stage.step(shard, index, hidden)

    def finish(self, shard: PlannedShard) -> list[FileRecord]:
        """See `Stage.finish`."""
        return self._stage.finish(shard)


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine for the block."""
    ray.init(
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False,
        ignore_reinit_error=True,
    )
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(slots=True)
class _Submitted:
    """A shard whose calls wait in the actors' queues."""

    shard: PlannedShard
    pipeline: int
    steps: deque[Any] = field(default_factory=deque)
    finish: list[Any] = field(default_factory=list)


class RayWorkers:
    """Pipelines of stage actors, one pipeline per replica."""

    def __init__(self, spec: StageSpec, *, replicas: int) -> None:
        """Start the actors and wait until every model is loaded.

        Raises:
            ActlakeError: what the stage raised, if a model cannot be loaded.
            CaptureError: if the cluster cannot place the actors, or one died.
        """
        cpus = float(ray.cluster_resources().get("CPU", 0))
        if spec.threads * replicas > cpus:
            raise CaptureError(
                f"resources: {replicas} replica(s) of {spec.threads} thread(s) need "
                f"{spec.threads * replicas} CPUs, and the cluster has {cpus:g}: lower "
                "resources.replicas or resources.threads."
            )
        actor: Any = ray.remote(num_cpus=spec.threads)(StageActor)
        self._pipelines: list[list[Any]] = [[actor.remote(spec)] for _ in range(replicas)]
        _get([stage.ready.remote() for stages in self._pipelines for stage in stages])

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        """Compute shards on all pipelines; a bounded number is in flight."""
        waiting = deque(shards)
        running: list[_Submitted] = []
        while waiting or running:
            for pipeline in range(len(self._pipelines)):
                while waiting and self._load(running, pipeline) < _SHARDS_IN_FLIGHT:
                    running.append(self._submit(waiting.popleft(), pipeline))
            heads = {_head(submitted): submitted for submitted in running}
            done, _ = ray.wait(list(heads), num_returns=1)
            submitted = heads[done[0]]
            if submitted.steps:
                yield BatchDone(_get([submitted.steps.popleft()])[0])
            else:
                parts = _get(submitted.finish)
                running.remove(submitted)
                yield ShardDone(submitted.shard, [file for part in parts for file in part])

    def _load(self, running: list[_Submitted], pipeline: int) -> int:
        return sum(submitted.pipeline == pipeline for submitted in running)

    def _submit(self, shard: PlannedShard, pipeline: int) -> _Submitted:
        submitted = _Submitted(shard, pipeline)
        for batch in range(shard.num_batches):
            passed = None
            for stage in self._pipelines[pipeline]:
                passed = stage.step.remote(shard, batch, passed)
            submitted.steps.append(passed)
        submitted.finish = [stage.finish.remote(shard) for stage in self._pipelines[pipeline]]
        return submitted


def _head(submitted: _Submitted) -> Any:
    return submitted.steps[0] if submitted.steps else submitted.finish[0]


def _get(references: list[Any]) -> list[Any]:
    try:
        return list(ray.get(references))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ActlakeError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise CaptureError(
            f"a worker died ({' '.join(str(error).split())[:300]}): committed shards are kept; "
            "run the same command again. If memory ran out, lower capture.batch_tokens or "
            "resources.replicas."
        ) from error
