"""What can be wrong with the input of an analysis."""

from storage import ActlakeError

__all__ = ["AnalysisError"]


class AnalysisError(ActlakeError):
    """An analysis cannot be made of what was given."""
