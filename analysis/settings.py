"""What can be asked of an analysis, validated; study files hold the same fields."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = [
    "EPS",
    "AblationSettings",
    "AnalysisSettings",
    "CrossSettings",
    "Kind",
    "Metric",
    "PruningSettings",
    "Site",
    "Within",
]

Metric = Literal["abs", "rms", "std", "sqrt", "freq", "mean", "rand"]
Site = Literal["mlp", "attn"]
Within = Literal["model", "layer"]
Kind = Literal["zero", "mean", "peak", "resample"]

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
        return _checked_fractions(value)


def _checked_fractions(value: list[float]) -> list[float]:
    for fraction in value:
        if not 0 < fraction <= 1:
            raise ValueError(f"each fraction must be in (0, 1], found {fraction}")
    return sorted(set(value))


class RoutingSettings(BaseModel):
    """Which experts each token keeps, and on what that is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[str] | None = Field(None, description="Tasks to evaluate; the reference.")
    layers: list[int] | None = Field(
        None, description="Layers in which experts are chosen; all that all experts have."
    )
    shares: list[float] = Field(
        [0.1, 0.2, 0.3, 0.4, 0.5],
        min_length=1,
        description="Shares of the experts of each layer to keep, each in (0, 1].",
    )
    learn_tokens: int = Field(
        4096, ge=2, description="Counted tokens of the reference's capture that routers learn from."
    )
    seed: int = Field(0, ge=0, description="Seed of learning and of random experts.")

    @field_validator("shares")
    @classmethod
    def _in_range(cls, value: list[float]) -> list[float]:
        return _checked_fractions(value)


class PruningSettings(BaseModel):
    """What is pruned, by which scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[str] | None = Field(
        None, description="Tasks whose neurons are removed; all but the reference."
    )
    metric: Metric = Field("abs", description="Importance metric of the score.")
    within: Within = Field(
        "model", description="Remove the top fraction over all layers, or of each layer."
    )
    sites: list[Site] | None = Field(
        None, description="Sites to remove neurons at, the fraction of each; all captured ones."
    )
    seed: int = Field(0, description="Seed of resampling and of the metric rand.")

    def parameters(self, sites: Sequence[str]) -> dict[str, Any]:
        """All that decides the result at some sites, JSON-ready, with defaults filled in."""
        own = self.model_dump(mode="json", exclude={"metric"})
        return {**own, "sites": list(sites), "metrics": [self.metric], "eps": dict(EPS)}


class AblationSettings(PruningSettings):
    """Pruning curves: models without the top fractions of a task's neurons, and random controls."""

    kinds: list[Kind] = Field(
        ["zero"], min_length=1, description="What takes the place of a removed neuron's activation."
    )
    fractions: list[float] = Field(
        [0.01, 0.02, 0.05, 0.1],
        min_length=1,
        description="Fractions of the neurons to remove, each in (0, 1].",
    )
    seeds: int = Field(
        3, ge=0, description="Random controls of each fraction, with as many neurons per layer."
    )
    iterative: bool = Field(
        False, description="Score again on the ablated model before each larger fraction."
    )
    every_task: bool = Field(
        False,
        description="Evaluate every task, instead of the one whose neurons are removed and the "
        "reference.",
    )

    @field_validator("fractions")
    @classmethod
    def _in_range(cls, value: list[float]) -> list[float]:
        return _checked_fractions(value)

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, value: list[Kind]) -> list[Kind]:
        return list(dict.fromkeys(value))


class CrossSettings(PruningSettings):
    """Cross-evaluation: prune for one task down to a target accuracy, then measure every task."""

    kind: Kind = Field("zero", description="What takes the place of a removed neuron's activation.")
    target: float = Field(
        0.8, description="Share of its unpruned top-1 accuracy that the task is to fall to."
    )
    tolerance: float = Field(0.02, gt=0, description="How far below the target top-1 may end.")
    upper: float = Field(
        0.128,
        gt=0,
        le=1,
        description="Fraction that the search begins with; doubled while it removes too few.",
    )

    @field_validator("target")
    @classmethod
    def _below_unpruned(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(
                "target must be in (0, 1), as a share of the unpruned accuracy, which pruning has "
                f"to fall below, found {value}"
            )
        return value
