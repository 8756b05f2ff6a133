"""Workers: whatever computes shards, and what they tell the driver."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray_app.capture.errors import SampleError
from ray_app.capture.quarantine import Quarantine
from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import Stage
from storage import FileRecord

__all__ = ["BatchDone", "LocalWorkers", "ShardDone", "ShardLost", "Workers"]


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch went through the model."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class ShardDone:
    """All parts of a shard are on disk."""

    shard: PlannedShard
    files: list[FileRecord]


@dataclass(frozen=True, slots=True)
class ShardLost:
    """A shard was interrupted; it will be computed again from its first batch."""

    shard: PlannedShard
    num_tokens: int
    """Tokens that were reported of it, and will be reported again."""
    reason: str
    """What happened."""


class Workers(Protocol):
    """Whatever computes shards: this process, or actors on a cluster."""

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone | ShardLost]:
        """Compute shards in any order and yield what is done as it is done."""


class LocalWorkers:
    """One pipeline of stages in this process."""

    def __init__(self, *stages: Stage, quarantine: Quarantine | None = None) -> None:
        """Take over stages.

        Args:
            stages: those of one pipeline, in order.
            quarantine: what takes the samples that fail; without it, the first one is an error.
        """
        self._stages = stages
        self._quarantine = quarantine or Quarantine(max_samples=0)

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone | ShardLost]:
        """Compute shards one after the other.

        Raises:
            CaptureError: if more samples fail than may be set aside.
        """
        waiting = deque(shards)
        while waiting:
            shard, num_tokens = waiting.popleft(), 0
            try:
                for batch in range(shard.num_batches):
                    done = self._step(shard, batch)
                    num_tokens += done.num_tokens
                    yield done
                for stage in self._stages:
                    stage.close(shard)
            except SampleError as error:
                for stage in self._stages:
                    stage.drop(shard)
                waiting.appendleft(self._quarantine.again(shard, error))
                yield ShardLost(shard, num_tokens, str(error))
                continue
            parts = [stage.write(shard) for stage in self._stages]
            yield ShardDone(shard, [file for part in parts for file in part])

    def _step(self, shard: PlannedShard, batch: int) -> BatchDone:
        passed: Any = None
        for stage in self._stages:
            passed = stage.step(shard, batch, passed)
        return BatchDone(passed)
