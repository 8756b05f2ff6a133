"""What a worker is told of the stage that it builds."""

from dataclasses import dataclass

from ray_app.capture.moments import Reduction
from ray_app.models.sites import SiteLocation
from ray_app.study import CaptureSettings, ModelSettings

__all__ = ["StageSpec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """All that a worker needs to build its stage; small, and the same for every replica."""

    store: str
    """Root of the store."""
    run: str
    """Id of the run."""
    index: int
    """Index of the stage in its pipeline."""
    start: int
    """First layer of the stage."""
    stop: int
    """Layer after its last one."""
    model: ModelSettings
    """Which model."""
    fingerprint: str
    """The weights that the run was planned with."""
    sites: tuple[SiteLocation, ...]
    """Sites to capture in this stage; they lie in its layers."""
    threads: int
    """CPU threads; part of what makes results bit-identical."""
    reduction: Reduction
    """How statistics are reduced; part of it as well."""
    seed: int
    """Seed of the study."""
    capture: CaptureSettings
    """What is kept."""
