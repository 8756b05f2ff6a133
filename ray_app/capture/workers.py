"""Workers: whatever computes shards, and what they tell the driver."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import Stage
from storage import FileRecord

__all__ = ["BatchDone", "LocalWorkers", "ShardDone", "Workers"]


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch went through the model."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class ShardDone:
    """All parts of a shard are on disk."""

    shard: PlannedShard
    files: list[FileRecord]


class Workers(Protocol):
    """Whatever computes shards: this process, or actors on a cluster."""

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        """Compute shards in any order and yield what is done as it is done."""


class LocalWorkers:
    """One stage in this process."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        """Compute shards one after the other."""
        for shard in shards:
            for batch in range(shard.num_batches):
                yield BatchDone(self._stage.step(shard, batch))
            yield ShardDone(shard, self._stage.finish(shard))
