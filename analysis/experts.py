"""Experts: the neurons of each layer's MLP in groups of equal size (MoEfication).

Zhang et al. (2022, "MoEfication", arXiv 2110.01786) split an MLP by clustering the unit rows of its
input projection with balanced k-means, by cutting a graph of neurons that fire together, and, as a
control, at random. Sizes differ by at most one where the number of experts does not divide that of
neurons.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from analysis.errors import AnalysisError
from analysis.keeping import Analysis, keep
from analysis.kmeans import balanced_kmeans, normalise_rows
from analysis.steps import Steps
from storage import TABLES, Store
from storage.sqlfiles import load_query

__all__ = [
    "EXPERT_SITE",
    "ExpertSettings",
    "LayerExperts",
    "Method",
    "Projection",
    "expert_layers",
    "experts_by_layer",
    "keep_experts",
    "split_at_random",
    "split_by_rows",
]

Method = Literal["kmeans", "random"]
Projection = Literal["up", "gate"]

EXPERT_SITE = "mlp"
"""The site whose neurons have rows of an input projection."""


class ExpertSettings(BaseModel):
    """How neurons are grouped into experts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: int = Field(ge=1, description="Experts of each layer.")
    method: Method = Field(
        "kmeans",
        description="kmeans: balanced k-means on the unit rows of an input projection; random: "
        "neurons in shuffled order, dealt out one by one.",
    )
    projection: Projection = Field(
        "up", description="Of gated MLPs, whose rows kmeans clusters; plain MLPs have up alone."
    )
    seed: int = Field(0, ge=0, description="Seed of first centres and of shuffling.")

    def parameters(self) -> dict[str, Any]:
        """All that decides the result, JSON-ready; the projection only if rows are read."""
        unused = set() if self.method == "kmeans" else {"projection"}
        return {"site": EXPERT_SITE, **self.model_dump(exclude=unused)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExperts:
    """The experts of one layer."""

    layer: int
    """Index of the layer."""
    labels: NDArray[np.int64]
    """(neurons,) expert of each neuron."""
    inertia: float | None = None
    """Sum of squared distances of unit rows to the means of their experts, if rows were read."""
    total_inertia: float | None = None
    """The same if all were one expert."""
    num_iterations: int | None = None
    """Iterations of k-means, if there were any."""


def split_by_rows(rows: NDArray[np.float32], settings: ExpertSettings, layer: int) -> LayerExperts:
    """Group the neurons of a layer by their rows of an input projection.

    Args:
        rows: (neurons, width) float32.
        settings: number of experts and seed.
        layer: index of the layer.

    Raises:
        AnalysisError: if there are more experts than neurons, or a weight is not finite.
    """
    points = normalise_rows(rows)
    found = balanced_kmeans(points, settings.clusters, seed=settings.seed)
    spread = (points - points.mean(axis=0, dtype=np.float64)) ** 2
    return LayerExperts(
        layer=layer,
        labels=found.labels,
        inertia=found.inertia,
        total_inertia=float(spread.sum()),
        num_iterations=found.num_iterations,
    )


def split_at_random(num_neurons: int, settings: ExpertSettings, layer: int) -> LayerExperts:
    """Deal the neurons of a layer out to experts one by one, in a seeded order of its own."""
    random = np.random.default_rng([settings.seed, layer])
    return LayerExperts(layer=layer, labels=random.permutation(num_neurons) % settings.clusters)


def expert_layers(record: dict[str, Any], settings: ExpertSettings) -> dict[int, int]:
    """Number of neurons of each layer that has experts.

    Args:
        record: of a run.
        settings: how many experts.

    Raises:
        AnalysisError: if the run has no such site, or a layer has fewer neurons than experts.
    """
    widths = {s["layer"]: s["width"] for s in record["sites"] if s["site"] == EXPERT_SITE}
    if not widths:
        raise AnalysisError(
            f"run {record['run']!r} must have captured site {EXPERT_SITE!r} to have experts, found "
            f"{', '.join(sorted({s['site'] for s in record['sites']})) or 'none'}: capture again "
            "with it among capture.sites."
        )
    layer = min(widths, key=lambda layer: (widths[layer], layer))
    if settings.clusters > widths[layer]:
        raise AnalysisError(
            f"clusters must be at most the number of neurons of a layer, {widths[layer]:,} in "
            f"layer {layer} of run {record['run']!r}, found {settings.clusters:,}: ask for fewer."
        )
    return widths


def keep_experts(
    store: Store,
    record: dict[str, Any],
    settings: ExpertSettings,
    compute: Callable[[], Iterable[LayerExperts]],
) -> Analysis:
    """Keep the experts of a run as tables ``clusters`` and ``cluster_layers``, unless they are.

    Args:
        store: the store that holds the run.
        record: the run's record.
        settings: how neurons are grouped; its weights and these decide the id.
        compute: groups the neurons of every layer, in any order of layers.

    Raises:
        StoreError: if the store cannot be written.
    """
    model = record["model"]
    weights = {"fingerprint": model["fingerprint"], "init": model["init"]}
    if model["init"] == "random":
        weights["init_seed"] = model["settings"]["init_seed"]
    key = {"run": record["run"], "parameters": settings.parameters(), "lineage": weights}

    def made() -> Steps:
        layers = sorted(compute(), key=lambda layer: layer.layer)
        steps = Steps(store.connect(), lambda step: None)
        steps.give("clusters", _clusters(layers, record["run"], settings))
        steps.give("cluster_layers", _cluster_layers(layers, record["run"], settings))
        return steps

    return keep(store, "experts", key, ("clusters", "cluster_layers"), made)


def experts_by_layer(store: Store, analysis: str) -> list[dict[str, Any]]:
    """Rows of the table ``cluster_layers`` of one analysis, in the order of layers."""
    query = load_query("analysis", "experts_by_layer").text
    rows: list[dict[str, Any]] = store.table(query, {"analysis": analysis}).to_pylist()
    return rows


def _clusters(layers: Sequence[LayerExperts], run: str, settings: ExpertSettings) -> pa.Table:
    sizes = [len(layer.labels) for layer in layers]
    columns = {
        "run": [run] * sum(sizes),
        "site": [EXPERT_SITE] * sum(sizes),
        "method": [settings.method] * sum(sizes),
        "layer": np.repeat([layer.layer for layer in layers], sizes),
        "neuron": np.concatenate([np.arange(size) for size in sizes]),
        "expert": np.concatenate([layer.labels for layer in layers]),
    }
    return pa.table(columns).cast(TABLES["clusters"].schema)


def _cluster_layers(layers: Sequence[LayerExperts], run: str, settings: ExpertSettings) -> pa.Table:
    rows = [
        {
            "run": run,
            "site": EXPERT_SITE,
            "method": settings.method,
            "layer": layer.layer,
            "num_neurons": len(layer.labels),
            "num_experts": settings.clusters,
            "smallest": int(np.bincount(layer.labels).min()),
            "largest": int(np.bincount(layer.labels).max()),
            "inertia": layer.inertia,
            "total_inertia": layer.total_inertia,
            "num_iterations": layer.num_iterations,
        }
        for layer in layers
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["cluster_layers"].schema)
