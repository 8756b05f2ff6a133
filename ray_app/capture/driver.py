"""The driver: gives shards to workers, commits what they finished, and reports progress."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import Stage
from ray_app.progress import Progress
from ray_app.run import Run
from storage import FileRecord

__all__ = ["BatchDone", "LocalWorkers", "ShardDone", "Workers", "capture"]


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


def capture(run: Run, workers: Workers, progress: Progress) -> int:
    """Compute and commit every shard of a run that has no commit record yet.

    The commit record is written only after all files of the shard are on disk, and only here.

    Returns:
        Number of shards committed by this call.
    """
    committed = 0
    for event in workers.work(run.remaining()):
        if isinstance(event, BatchDone):
            progress.advance(event.num_tokens)
            continue
        shard = event.shard
        run.store.commit(
            run=run.id,
            task=shard.task,
            shard=shard.shard,
            counts=shard.counts,
            files=[shard.samples, *event.files],
        )
        committed += 1
        progress.committed(shard.task)
    return committed
