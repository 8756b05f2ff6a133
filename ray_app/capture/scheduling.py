"""Feeding pipelines: which batch goes where and when, and what happens if a worker dies.

Knows nothing of Ray: a `Pipeline` takes calls and gives handles of their results, and `Calls` waits
for handles. Each pipeline has a bounded number of batches and shards in flight, enough to keep all
its stages busy and no more, so that the memory of a run does not grow with its length. When a
worker dies, the shards in flight on its pipeline go back to the head of the queue, any pipeline may
take them, and they are computed again from their first batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray_app.capture.errors import CaptureError, SampleError, ShardInterruptedError
from ray_app.capture.quarantine import Quarantine
from ray_app.capture.shards import PlannedShard
from ray_app.capture.workers import BatchDone, ShardDone, ShardLost

__all__ = ["Calls", "Pipeline", "Scheduler"]

Event = BatchDone | ShardDone | ShardLost


class Pipeline(Protocol):
    """The stages of one whole model, as the scheduler sees them; no call blocks."""

    num_stages: int

    def step(self, shard: PlannedShard, batch: int) -> Any:
        """Send one batch through all stages; a handle of its number of tokens."""

    def close(self, shard: PlannedShard) -> list[Any]:
        """Close a shard whose batches were all sent; a handle for each stage."""

    def write(self, shard: PlannedShard) -> list[Any]:
        """Write a shard that all stages have closed; handles of each stage's files."""

    def drop(self, shard: PlannedShard) -> None:
        """Forget what stages hold of a shard that is not to be written."""

    def revive(self) -> list[Any]:
        """Replace the stages that died; handles that are done when the new ones are ready."""


class Calls(Protocol):
    """How to wait for handles."""

    def wait(self, handles: list[Any]) -> Any:
        """Block until one of the handles is done, and return it."""

    def result(self, handle: Any) -> Any:
        """The result of a handle that is done.

        Raises:
            ShardInterruptedError: if the worker died, or asks for the shard's first batch.
            SampleError: if samples of the shard fail.
            ActlakeError: what the stage raised.
        """


@dataclass(slots=True)
class _Flight:
    """A shard in flight."""

    shard: PlannedShard
    num_sent: int = 0
    num_tokens_done: int = 0
    steps: deque[Any] = field(default_factory=deque)
    closing: deque[Any] = field(default_factory=deque)
    parts: deque[Any] = field(default_factory=deque)
    files: list[Any] = field(default_factory=list)

    @property
    def head(self) -> Any:
        """The handle to wait for next."""
        return (self.steps or self.closing or self.parts)[0]


@dataclass(slots=True)
class _Lane:
    """A pipeline with what it does now."""

    pipeline: Pipeline
    flights: list[_Flight] = field(default_factory=list)
    reviving: list[Any] = field(default_factory=list)

    @property
    def num_batches(self) -> int:
        """Batches in flight."""
        return sum(len(flight.steps) for flight in self.flights)


class Scheduler:
    """Computes shards on pipelines; implements `Workers`."""

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        calls: Calls,
        *,
        max_deaths: int,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Take over pipelines whose stages are ready.

        Args:
            pipelines: one per replica.
            calls: waits for their handles.
            max_deaths: interruptions in a row, without a shard finished in between, that are borne.
            quarantine: what takes the samples that fail; without it, the first one is an error.
        """
        self._lanes = [_Lane(pipeline) for pipeline in pipelines]
        self._calls = calls
        self._max_deaths = max_deaths
        self._quarantine = quarantine or Quarantine(max_samples=0)
        self._deaths = 0
        self._waiting: deque[PlannedShard] = deque()

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[Event]:
        """Compute shards in any order and yield what is done as it is done.

        Raises:
            CaptureError: if workers die again and again, or more samples fail than may be set
                aside; names the last reason.
            ActlakeError: what a stage raised.
        """
        self._waiting.extend(shards)
        while self._waiting or any(lane.flights for lane in self._lanes):
            heads: dict[Any, tuple[_Lane, _Flight | None]] = {}
            for lane in self._lanes:
                self._fill(lane)
                heads |= dict.fromkeys(lane.reviving, (lane, None))
                heads |= {flight.head: (lane, flight) for flight in lane.flights}
            handle = self._calls.wait(list(heads))
            lane, flight = heads[handle]
            try:
                result = self._calls.result(handle)
            except ShardInterruptedError as error:
                yield from self._interrupted(lane, error)
                continue
            except SampleError as error:
                if flight is None:  # Loading a model computes no samples.
                    raise
                yield self._failed(lane, flight, error)
                continue
            if flight is None:
                lane.reviving.remove(handle)
            else:
                yield from self._advance(lane, flight, result)

    def _fill(self, lane: _Lane) -> None:
        if lane.reviving:
            return
        num_stages = lane.pipeline.num_stages
        # Twice the stages: while each computes one batch, the next lies ready for it.
        while lane.num_batches < 2 * num_stages:
            flight = lane.flights[-1] if lane.flights else None
            if flight is None or flight.num_sent == flight.shard.num_batches:
                # One shard per stage when shards are single batches, and one that is written.
                if not self._waiting or len(lane.flights) > num_stages:
                    return
                flight = _Flight(self._waiting.popleft())
                lane.flights.append(flight)
            flight.steps.append(lane.pipeline.step(flight.shard, flight.num_sent))
            flight.num_sent += 1
            if flight.num_sent == flight.shard.num_batches:
                flight.closing.extend(lane.pipeline.close(flight.shard))

    def _advance(self, lane: _Lane, flight: _Flight, result: Any) -> Iterator[Event]:
        if flight.steps:
            flight.steps.popleft()
            flight.num_tokens_done += result
            yield BatchDone(result)
            return
        if flight.closing:
            flight.closing.popleft()
            if not flight.closing:
                flight.parts.extend(lane.pipeline.write(flight.shard))
            return
        flight.parts.popleft()
        flight.files.extend(result)
        if not flight.parts:
            lane.flights.remove(flight)
            self._deaths = 0
            yield ShardDone(flight.shard, flight.files)

    def _failed(self, lane: _Lane, flight: _Flight, error: SampleError) -> ShardLost:
        # What is still on its way of this shard is refused by the stages, which wait for the batch
        # that failed, until the first batch opens it anew.
        lane.flights.remove(flight)
        lane.pipeline.drop(flight.shard)
        self._waiting.appendleft(self._quarantine.again(flight.shard, error))
        return ShardLost(flight.shard, flight.num_tokens_done, str(error))

    def _interrupted(self, lane: _Lane, error: ShardInterruptedError) -> Iterator[Event]:
        self._deaths += 1
        if self._deaths > self._max_deaths:
            raise CaptureError(
                f"workers were interrupted {self._deaths} times in a row without finishing a shard "
                f"in between, the last time because {error}. Committed shards are kept; remove the "
                "cause and run the same command again."
            ) from error
        lost = list(lane.flights)
        lane.flights.clear()
        self._waiting.extendleft(flight.shard for flight in reversed(lost))
        lane.reviving = lane.pipeline.revive()
        for flight in lost:
            lane.pipeline.drop(flight.shard)
            yield ShardLost(flight.shard, flight.num_tokens_done, str(error))
