"""Routing: which few experts a token needs, and how nearly that is known before they are computed.

MoEfication (Zhang et al., 2022, arXiv 2110.01786) keeps, for each token, the experts with the
largest sum of relu(activation). Gated and GELU models have activations of either sign, of which
neither is "off": here the mass of an expert is the sum of their absolute values, which for ReLU
models is the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from analysis.errors import AnalysisError
from analysis.experts import Projection, run_of_experts
from storage import Store
from storage.sqlfiles import load_query

__all__ = [
    "ROUTERS",
    "KeptMass",
    "RoutedExperts",
    "Router",
    "load_experts",
    "num_kept",
    "routing_by_share",
    "unit_centres",
]

Router = Literal["truth", "centroid", "learned", "random"]
"""What chooses the experts of a token."""
ROUTERS: tuple[Router, ...] = get_args(Router)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutedExperts:
    """The experts of one analysis, in the layers in which tokens are routed."""

    analysis: str
    """Id of the analysis that made them."""
    run: str
    """Id of its run."""
    method: str
    """How they were made."""
    projection: Projection
    """Whose rows they have centres of."""
    num_experts: int
    """Experts of each layer."""
    labels: Mapping[int, NDArray[np.int64]]
    """(neurons,) expert of each neuron, by layer."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptMass:
    """Sums over positions of the share of a token's mass that routers keep, of one layer."""

    n: int
    """Number of positions."""
    kept: NDArray[np.float64]
    """(routers, shares) of the token's whole mass, in the order of `ROUTERS`."""
    relative: NDArray[np.float64]
    """(routers, shares) of the most that as many experts can hold."""

    def __add__(self, other: "KeptMass") -> "KeptMass":
        return KeptMass(self.n + other.n, self.kept + other.kept, self.relative + other.relative)


def load_experts(
    store: Store, names: Sequence[str], layers: Sequence[int] | None
) -> list[RoutedExperts]:
    """Read experts that can be compared: of one run, in the same layers.

    Args:
        store: the store.
        names: ids of analyses that made experts.
        layers: the layers to read; None for all that all of the experts have.

    Raises:
        AnalysisError: if one of the experts is not there or is of another run, or lacks a layer.
    """
    names = list(dict.fromkeys(names))
    runs = {name: run_of_experts(store, name) for name in names}
    first = names[0]
    for name, run in runs.items():
        if run != runs[first]:
            raise AnalysisError(
                f"experts must be of one run to be routed in its model, found {first} of "
                f"{runs[first]} and {name} of {run}: route them one after the other."
            )
    query = load_query("analysis", "expert_labels").text
    rows = {name: store.table(query, {"analysis": name}).to_pylist() for name in names}
    shared = sorted(set.intersection(*({row["layer"] for row in rows[name]} for name in names)))
    chosen = sorted(set(shared if layers is None else layers))
    if not shared or not set(chosen) <= set(shared):
        raise AnalysisError(
            "layers must be among those that all of the experts have "
            f"({', '.join(map(str, shared)) or 'none'}), found "
            f"{', '.join(map(str, chosen)) or 'no layer'}: name others, or make experts of them."
        )
    return [_experts(name, runs[name], rows[name], chosen) for name in names]


def _experts(
    name: str, run: str, rows: list[dict[str, Any]], layers: Sequence[int]
) -> RoutedExperts:
    parameters = json.loads(rows[0]["parameters"])
    labels = {row["layer"]: np.array(row["labels"], dtype=np.int64) for row in rows}
    return RoutedExperts(
        analysis=name,
        run=run,
        method=parameters["method"],
        projection=parameters.get("projection", "up"),
        num_experts=parameters["clusters"],
        labels={layer: labels[layer] for layer in layers},
    )


def num_kept(share: float, num_experts: int) -> int:
    """How many experts a share of them is, rounded down.

    Raises:
        AnalysisError: if it is none.
    """
    # As in quotas.sql: 0.29 * 100 is 28.999999999999996 in floating point.
    kept = int(np.floor(share * num_experts + 1e-9))
    if kept == 0:
        raise AnalysisError(
            f"share {share:g} keeps no expert: layers have {num_experts:,}, so the least share is "
            f"{1 / num_experts:.3g}."
        )
    return kept


def unit_centres(
    unit_rows: NDArray[np.float32], labels: NDArray[np.int64], num_experts: int
) -> NDArray[np.float32]:
    """(experts, width) float32: means of the unit rows of each expert's neurons.

    Args:
        unit_rows: (neurons, width), of length one.
        labels: (neurons,) expert of each.
        num_experts: number of experts, none of them empty.
    """
    members = (labels == np.arange(num_experts)[:, None]).astype(np.float32)
    centres: NDArray[np.float32] = members @ unit_rows / members.sum(1, keepdims=True)
    return centres


def routing_by_share(store: Store, analysis: str) -> list[dict[str, Any]]:
    """What routers keep and what that costs: one row per (experts, task, router, share).

    Columns experts, method, task, router, share, mass_kept and mass_ratio (means over layers),
    mean_loss, loss_change and top1_share.
    """
    query = load_query("analysis", "routing_by_share").text
    rows: list[dict[str, Any]] = store.table(query, {"analysis": analysis}).to_pylist()
    return rows
