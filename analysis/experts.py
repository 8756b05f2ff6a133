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
from analysis.graph import split_graph, weight_inside
from analysis.keeping import Analysis, committed_lineage, keep
from analysis.kmeans import balanced_kmeans, normalise_rows
from analysis.pairs import NeuronPairs, counted_layers
from analysis.steps import Steps
from storage import TABLES, Store
from storage.sqlfiles import load_query

__all__ = [
    "EXPERT_SITE",
    "ExpertSettings",
    "LayerExperts",
    "Method",
    "PairWeight",
    "Projection",
    "expert_layers",
    "experts_by_layer",
    "keep_experts",
    "pair_task",
    "run_of_experts",
    "split_at_random",
    "split_by_pairs",
    "split_by_rows",
]

Method = Literal["kmeans", "coactivation", "random"]
Projection = Literal["up", "gate"]
PairWeight = Literal["product", "together"]

_METHOD_ONLY: dict[str, set[str]] = {"kmeans": {"projection"}, "coactivation": {"task", "weight"}}
"""Settings that one method alone reads."""

EXPERT_SITE = "mlp"
"""The site whose neurons have rows of an input projection."""


class ExpertSettings(BaseModel):
    """How neurons are grouped into experts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: int = Field(ge=1, description="Experts of each layer.")
    method: Method = Field(
        "kmeans",
        description="kmeans: balanced k-means on the unit rows of an input projection; "
        "coactivation: the graph of neurons that fire together, cut; random: neurons in shuffled "
        "order, dealt out one by one.",
    )
    projection: Projection = Field(
        "up", description="Of gated MLPs, whose rows kmeans clusters; plain MLPs have up alone."
    )
    task: str | None = Field(
        None, description="Task whose pairs of neurons coactivation reads; the run's reference."
    )
    weight: PairWeight = Field(
        "product",
        description="Weight of two neurons in the graph of coactivation: product, the sum of the "
        "products of their activations, or 0 if that is negative; together, the number of "
        "positions at which both are above zero.",
    )
    seed: int = Field(0, ge=0, description="Seed of first centres and of shuffling.")

    def parameters(self) -> dict[str, Any]:
        """All that decides the result, JSON-ready: what other methods read is left out."""
        unused = {name for m, names in _METHOD_ONLY.items() if m != self.method for name in names}
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
    """Iterations of k-means, if rows were read."""
    inside: float | None = None
    """Share of the weight of a graph that lies inside experts, if one was cut."""


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


def split_by_pairs(pairs: NeuronPairs, settings: ExpertSettings, layer: int) -> LayerExperts:
    """Group the neurons of a layer by cutting the graph of those that fire together.

    MoEfication weighs an edge by the products of the activations of two neurons, where both are
    above zero; of an activation function that is never negative this is the sum of all products.
    Where activations have either sign, products of opposite signs count against the edge.

    Args:
        pairs: of the layer's neurons.
        settings: number of experts, weight of edges and seed.
        layer: index of the layer.
    """
    given = pairs.product if settings.weight == "product" else pairs.together
    weights = np.maximum(given, 0).astype(np.float64)
    np.fill_diagonal(weights, 0)
    labels = split_graph(weights, settings.clusters, seed=settings.seed)
    total = float(weights.sum()) / 2
    inside = weight_inside(weights, labels) / total if total else None
    return LayerExperts(layer=layer, labels=labels, inside=inside)


def pair_task(record: dict[str, Any], settings: ExpertSettings) -> str:
    """The task whose pairs of neurons are read: the one asked for, or the run's reference.

    Raises:
        AnalysisError: if none was asked for and the run has no reference.
    """
    task = settings.task or record["reference"]
    if task is None:
        raise AnalysisError(
            f"the study of run {record['run']!r} named no reference: pass --task with one of "
            f"{', '.join(task['task'] for task in record['tasks'])}."
        )
    return str(task)


def split_at_random(num_neurons: int, settings: ExpertSettings, layer: int) -> LayerExperts:
    """Deal the neurons of a layer out to experts one by one, in a seeded order of its own."""
    random = np.random.default_rng([settings.seed, layer])
    return LayerExperts(layer=layer, labels=random.permutation(num_neurons) % settings.clusters)


def expert_layers(store: Store, record: dict[str, Any], settings: ExpertSettings) -> dict[int, int]:
    """Number of neurons of each layer that gets experts: of coactivation, where pairs are counted.

    Args:
        store: the store that holds the run.
        record: of the run.
        settings: how many experts, made how.

    Raises:
        AnalysisError: if the run has no such site or counted no pairs, or a layer has fewer
            neurons than experts.
    """
    widths = {s["layer"]: s["width"] for s in record["sites"] if s["site"] == EXPERT_SITE}
    if not widths:
        raise AnalysisError(
            f"run {record['run']!r} must have captured site {EXPERT_SITE!r} to have experts, found "
            f"{', '.join(sorted({s['site'] for s in record['sites']})) or 'none'}: capture again "
            "with it among capture.sites."
        )
    if settings.method == "coactivation":
        task = pair_task(record, settings)
        counted = counted_layers(store, record["run"], task, EXPERT_SITE)
        widths = {layer: widths[layer] for layer in counted}
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
    parameters, lineage = settings.parameters(), weights
    if settings.method == "coactivation":
        parameters |= {"task": pair_task(record, settings)}
        advice = "finish it with `actlake capture` first"
        lineage = weights | committed_lineage(store, record, partial=False, advice=advice)
    key = {"run": record["run"], "parameters": parameters, "lineage": lineage}

    def made() -> Steps:
        layers = sorted(compute(), key=lambda layer: layer.layer)
        steps = Steps(store.connect(), lambda step: None)
        steps.give("clusters", _clusters(layers, record["run"], settings))
        steps.give("cluster_layers", _cluster_layers(layers, record["run"], settings))
        return steps

    return keep(store, "experts", key, ("clusters", "cluster_layers"), made)


def run_of_experts(store: Store, experts: str) -> str:
    """The run that experts were made of.

    Raises:
        AnalysisError: if there are no experts of that id.
    """
    query = load_query("analysis", "experts").text
    found = store.table(query, {"analysis": experts}).to_pylist()
    if not found:
        raise AnalysisError(
            f"there are no experts {experts!r} in {store.files.root}: make some with `actlake "
            f"experts {store.files.root}`; `actlake status` names those there are."
        )
    return str(found[0]["run"])


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
            "inside": layer.inside,
        }
        for layer in layers
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["cluster_layers"].schema)
