"""The errors that stop a capture, or one attempt at a shard."""

from storage import ActlakeError

__all__ = ["CaptureError", "ShardInterruptedError"]


class CaptureError(ActlakeError):
    """A capture cannot go on."""


class ShardInterruptedError(CaptureError):
    """A shard must be computed again from its first batch; the message is the reason."""
