"""Samples that always fail: how many a run may set aside, and what becomes of their shards.

A shard in which something is not finite is computed again with every sample checked. The first
batch with a sample that fails ends the attempt, at the first site in the order of the layers, and
the shard is computed once more without the samples that failed there, until nothing fails. No
stage writes anything before all stages have closed the shard, so only the last attempt leaves
files. What is left out follows from the shard and the model alone: not from the stages, nor from
which worker died when.
"""

from ray_app.capture.errors import CaptureError, SampleError
from ray_app.capture.shards import CheckedShard, PlannedShard

__all__ = ["Quarantine"]


class Quarantine:
    """Counts the samples that a run sets aside, and stops it beyond a number."""

    def __init__(self, *, max_samples: int, num_samples: int = 0) -> None:
        """Begin to count.

        Args:
            max_samples: samples that may be set aside in the whole run.
            num_samples: samples in the quarantine of shards that are committed already.
        """
        self._max_samples = max_samples
        self._num_samples = num_samples

    def again(self, shard: PlannedShard, error: SampleError) -> CheckedShard:
        """The shard as it must be computed after some of its samples failed.

        Raises:
            CaptureError: if the run sets too many samples aside; names one. If a check found
                nothing, the error itself.
        """
        if not error.samples and isinstance(shard, CheckedShard):
            raise error
        self._num_samples += len(error.samples)
        if self._num_samples > self._max_samples and error.samples:
            aside = error.samples[0]
            raise CaptureError(
                f"sample {aside.sample} ({aside.source}) in shard {shard.shard} of task "
                f"{shard.task!r} fails, because {aside.error}. {self._num_samples} sample(s) of "
                f"the run fail and capture.max_quarantined is {self._max_samples}: remove the "
                "cause, or raise it and run the same command again to set them aside."
            ) from error
        return CheckedShard.of(shard, error.samples)
