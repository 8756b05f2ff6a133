"""The driver: gives shards to workers, commits what they finished, and reports progress."""

from ray_app.capture.workers import BatchDone, ShardLost, Workers
from ray_app.progress import Progress
from ray_app.run import Run

__all__ = ["capture"]


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
        if isinstance(event, ShardLost):
            progress.lost(event.shard.task, event.shard.shard, event.num_tokens, event.reason)
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
