"""Ray: actors that hold stages, and pipelines of them. The only module that starts Ray."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.metrics import Counter
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from ray_app.capture.errors import CaptureError, ShardInterruptedError
from ray_app.capture.quarantine import Quarantine
from ray_app.capture.scheduling import Scheduler
from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import Stage, StageSpec, build_stage
from ray_app.models.loading import quiet_transformers
from ray_app.placement import Node, Placement
from storage import ActlakeError, FileRecord

__all__ = ["cluster_nodes", "ray_session", "ray_workers"]

_SECONDS_TO_PLACE = 600
"""How long a cluster may take to find room, which includes machines that an autoscaler starts."""
_SECONDS_TO_ANSWER = 30
"""How long a living actor may take to say so; its calls of this kind do not queue behind work."""


class StageActor:
    """A stage on a Ray worker; every call goes to the stage."""

    def __init__(self, spec: StageSpec, build: Callable[..., Stage]) -> None:
        self._spec = spec
        self._build = build
        self._stage: Stage | None = None
        self._metrics = _StageMetrics(spec)

    def load(self) -> None:
        """Build the stage, on the GPU if Ray gave this actor one."""
        quiet_transformers()
        self._stage = self._build(self._spec, device="cuda" if ray.get_gpu_ids() else "cpu")

    def step(self, shard: PlannedShard, index: int, hidden: Tensor | None) -> int | Tensor:
        """See `Stage.step`."""
        with self._metrics.busy():
            result = self._loaded.step(shard, index, hidden)
        if isinstance(result, int) and result > 0:  # Counters refuse to add nothing.
            self._metrics.tokens.inc(result)
        return result

    def close(self, shard: PlannedShard) -> None:
        """See `Stage.close`."""
        self._loaded.close(shard)

    def drop(self, shard: PlannedShard) -> None:
        """See `Stage.drop`."""
        self._loaded.drop(shard)

    @ray.method(concurrency_group="beside")
    def write(self, shard: PlannedShard) -> list[Any]:
        """See `Stage.write`."""
        parts = self._loaded.write(shard)
        self._metrics.shards.inc()
        # Stages that evaluate give measurements back and write no files.
        num_bytes = sum(part.bytes for part in parts if isinstance(part, FileRecord))
        if num_bytes > 0:
            self._metrics.bytes.inc(num_bytes)
        return parts

    # In a group of its own: writing to a slow store is no reason to be taken for dead.
    @ray.method(concurrency_group="answers")
    def answer(self) -> None:
        """Return at once."""

    @property
    def _loaded(self) -> Stage:
        if self._stage is None:
            raise ShardInterruptedError("a worker was replaced and has not loaded its model yet")
        return self._stage


class _StageMetrics:
    """What Ray's dashboard and Prometheus see of a stage; counters that nobody reads cost nothing.

    Idle time is the time between two batches: of a balanced pipeline that is fed well, little.
    """

    def __init__(self, spec: StageSpec) -> None:
        tags = {"run": spec.run, "stage": f"{spec.index:02d}"}

        def counter(name: str, description: str) -> Counter:
            made = Counter(f"actlake_{name}", description, tag_keys=tuple(tags))
            made.set_default_tags(tags)
            return made

        self.tokens = counter("tokens", "Tokens that left the last stage.")
        self.shards = counter("shards", "Shards of which the stage wrote its parts.")
        self.bytes = counter("bytes", "Bytes of parts that the stage wrote.")
        self._idle = counter("idle_seconds", "Seconds that the stage waited for batches.")
        self._free_since: float | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the time since the last block as idle."""
        if self._free_since is not None and (idle := time.monotonic() - self._free_since) > 0:
            self._idle.inc(idle)
        try:
            yield
        finally:
            self._free_since = time.monotonic()


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine, or start one."""
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


def cluster_nodes() -> list[Node]:
    """The machines of the cluster that this process has joined."""
    gpu_memory = 0
    if ray.cluster_resources().get("GPU", 0) >= 1:
        gpu_memory = ray.get(ray.remote(num_gpus=1)(_gpu_memory).remote())
    return [
        Node(
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
            memory=int(node["Resources"].get("memory", 0)),
            gpu_memory=gpu_memory,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextmanager
def ray_workers(
    specs: Sequence[StageSpec],
    placement: Placement,
    *,
    max_deaths: int,
    quarantine: Quarantine | None = None,
    build: Callable[..., Any] = build_stage,
) -> Iterator[Scheduler]:
    """Pipelines of stage actors whose models are loaded; they end with the block.

    Args:
        specs: the stages of one pipeline, in order.
        placement: how many pipelines, and what each stage takes.
        max_deaths: see `Scheduler`.
        quarantine: see `Scheduler`.
        build: makes a stage of its spec and a device: what takes the calls of `Stage`.

    Raises:
        ActlakeError: what a stage raised, if its model cannot be loaded.
        CaptureError: if the cluster has no room, or workers die again and again while they load.
    """
    pipelines: list[_RayPipeline] = []
    try:
        for _ in range(placement.replicas):
            pipelines.append(_RayPipeline(specs, placement, build))
        calls = _RayCalls()
        _load_all(pipelines, calls, max_deaths)
        yield Scheduler(pipelines, calls, max_deaths=max_deaths, quarantine=quarantine)
    finally:
        for pipeline in pipelines:
            pipeline.end()


def _load_all(pipelines: Sequence["_RayPipeline"], calls: "_RayCalls", max_deaths: int) -> None:
    loading = {handle: pipeline for pipeline in pipelines for handle in pipeline.load()}
    deaths = 0
    while loading:
        handle = calls.wait(list(loading))
        pipeline = loading.pop(handle)
        try:
            calls.result(handle)
        except ShardInterruptedError as error:
            deaths += 1
            if deaths > max_deaths:
                raise CaptureError(
                    f"workers could not load their models {deaths} times, the last time because "
                    f"{error}: if memory ran out, raise resources.stages, or lower "
                    "resources.replicas."
                ) from error
            loading |= dict.fromkeys(pipeline.revive(), pipeline)


class _RayPipeline:
    """The stage actors of one model, as close together as the cluster allows."""

    def __init__(
        self, specs: Sequence[StageSpec], placement: Placement, build: Callable[..., Any]
    ) -> None:
        self.num_stages = len(specs)
        self._specs = specs
        self._build = build
        resources = {"CPU": placement.threads, "GPU": placement.gpus_per_stage}
        self._resources = {name: count for name, count in resources.items() if count}
        self._group = placement_group([self._resources] * len(specs), strategy="PACK")
        if not self._group.wait(_SECONDS_TO_PLACE):
            remove_placement_group(self._group)
            raise CaptureError(
                f"the cluster found no room for {len(specs)} stages of {self._resources} within "
                f"{_SECONDS_TO_PLACE} s: it has {ray.available_resources()} free; end other jobs, "
                "or lower resources.stages or resources.replicas."
            )
        self._stages = [self._start(index) for index in range(len(specs))]
        self._loading: list[Any] = []

    def load(self) -> list[Any]:
        """Load all models; one handle for each."""
        self._loading = [stage.load.remote() for stage in self._stages]
        return list(self._loading)

    def step(self, shard: PlannedShard, batch: int) -> Any:
        """See `Pipeline.step`."""
        passed = None
        for stage in self._stages:
            passed = stage.step.remote(shard, batch, passed)
        return passed

    def close(self, shard: PlannedShard) -> list[Any]:
        """See `Pipeline.close`."""
        return [stage.close.remote(shard) for stage in self._stages]

    def write(self, shard: PlannedShard) -> list[Any]:
        """See `Pipeline.write`."""
        return [stage.write.remote(shard) for stage in self._stages]

    def drop(self, shard: PlannedShard) -> None:
        """See `Pipeline.drop`."""
        for stage in self._stages:
            stage.drop.remote(shard)

    def revive(self) -> list[Any]:
        """See `Pipeline.revive`."""
        # One that still loads need not answer: it may wait for a machine, and if it dies, the
        # handle of its loading says so.
        _, loading = ray.wait(self._loading, num_returns=len(self._loading), timeout=0)
        answers = {
            index: self._stages[index].answer.remote()
            for index, loaded in enumerate(self._loading)
            if loaded not in loading
        }
        if answers:
            asked = list(answers.values())
            ray.wait(asked, num_returns=len(asked), timeout=_SECONDS_TO_ANSWER)
        for index, answer in answers.items():
            try:
                ray.get(answer, timeout=0)
            except RayError:
                # Dead already, or it does not answer: in either case it must not go on.
                ray.kill(self._stages[index])
                self._stages[index] = self._start(index)
                self._loading[index] = self._stages[index].load.remote()
                loading.append(self._loading[index])
        return loading

    def end(self) -> None:
        """End the actors and give their room back."""
        for stage in self._stages:
            ray.kill(stage)
        remove_placement_group(self._group)

    def _start(self, index: int) -> Any:
        # Ray's type stubs do not know concurrency groups.
        remote: Any = ray.remote
        actor = remote(
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources.get("GPU", 0),
            concurrency_groups={"beside": 1, "answers": 1},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index
            ),
        )(StageActor)
        return actor.remote(self._specs[index], self._build)


class _RayCalls:
    """Waiting for Ray's object references."""

    def wait(self, handles: list[Any]) -> Any:
        """See `Calls.wait`."""
        done, _ = ray.wait(handles, num_returns=1)
        return done[0]

    def result(self, handle: Any) -> Any:
        """See `Calls.result`."""
        try:
            return ray.get(handle)
        except RayTaskError as error:
            if isinstance(error.cause, ActlakeError):
                raise error.cause from None
            if isinstance(error.cause, RayError):
                raise _died(error.cause) from error
            raise
        except RayError as error:
            # Actors, machines and objects that were lost: all of them mean that a worker is gone.
            raise _died(error) from error


def _died(error: BaseException) -> ShardInterruptedError:
    return ShardInterruptedError(f"a worker died ({' '.join(str(error).split())[:300]})")


def _gpu_memory() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)
