"""Workers: whatever computes shards, and what they tell the driver."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

    def __init__(self, *stages: Stage) -> None:
        self._stages = stages

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        """Compute shards one after the other."""
        for shard in shards:
            for batch in range(shard.num_batches):
                passed: Any = None
                for stage in self._stages:
                    passed = stage.step(shard, batch, passed)
                yield BatchDone(passed)
            parts = [stage.finish(shard) for stage in self._stages]
            yield ShardDone(shard, [file for part in parts for file in part])
