"""The errors that stop a capture, or one attempt at a shard."""

from ray_app.capture.shards import SetAside
from storage import ActlakeError

__all__ = ["CaptureError", "SampleError", "ShardInterruptedError"]


class CaptureError(ActlakeError):
    """A capture cannot go on."""


class ShardInterruptedError(CaptureError):
    """A shard must be computed again from its first batch; the message is the reason."""


class SampleError(CaptureError):
    """Samples of a shard always fail.

    Without `samples` it is known that some do, but not which: the shard must be checked.
    """

    def __init__(self, message: str, samples: tuple[SetAside, ...] = ()) -> None:
        super().__init__(message)
        self.samples = samples
