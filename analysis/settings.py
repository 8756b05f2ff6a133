"""What can be asked of an analysis, validated; study files hold the same fields."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["EPS", "AnalysisSettings", "Metric", "Site", "Within"]

Metric = Literal["abs", "rms", "std", "sqrt", "freq", "mean", "rand"]
Site = Literal["mlp", "attn"]
Within = Literal["model", "layer"]

EPS: dict[Site, float] = {"mlp": 1e-3, "attn": 1e-4}
"""Added to the reference importance, by site: the values of Pochinkov and Schoots (2024)."""


class AnalysisSettings(BaseModel):
    """One analysis of a run: importance, scores, selections and their overlap."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: list[Metric] = Field(["abs"], min_length=1, description="Importance metrics.")
    fractions: list[float] = Field(
        [0.01, 0.05],
        min_length=1,
        description="Fractions of the neurons to select, each in (0, 1].",
    )
    within: Within = Field(
        "model", description="Select the top fraction over all layers, or in each layer."
    )
    sites: list[Site] | None = Field(None, description="Sites to analyse; all captured ones.")
    # Without it, a neuron that is never active would score 0 / 0.
    eps: dict[Site, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="Added to the reference importance, by site; mlp 0.001 and attn 0.0001, the "
        "papers' values, where not given.",
    )
    seed: int = Field(0, description="Seed of the metric rand.")

    def parameters(self, sites: Sequence[str]) -> dict[str, Any]:
        """All that decides the result at some sites, JSON-ready, with defaults filled in."""
        return {
            "sites": list(sites),
            "metrics": sorted(set(self.metrics)),
            "fractions": self.fractions,
            "within": self.within,
            "eps": EPS | self.eps,
            "seed": self.seed,
        }

    @field_validator("fractions")
    @classmethod
    def _in_range(cls, value: list[float]) -> list[float]:
        for fraction in value:
            if not 0 < fraction <= 1:
                raise ValueError(f"each fraction must be in (0, 1], found {fraction}")
        return sorted(set(value))
