"""The error of everything that concerns a model's files and structure."""

from storage import ActlakeError

__all__ = ["ModelError"]


class ModelError(ActlakeError):
    """A model cannot be found, loaded or understood."""
