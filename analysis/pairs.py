"""Pairs of neurons of one layer as matrices, merged over the shards of a task."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.errors import AnalysisError
from storage import Store
from storage.sqlfiles import load_query

__all__ = ["NeuronPairs", "counted_layers", "neuron_pairs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronPairs:
    """Symmetric matrices of N neurons."""

    n: int
    """Number of counted positions."""
    together: np.ndarray
    """(N, N) int64: positions at which both neurons are > 0; on the diagonal, those of one."""
    product: np.ndarray
    """(N, N) float64: sum of z_a z_b."""
    correlation: np.ndarray
    """(N, N) float64: Pearson's correlation; NaN for neurons that never change."""


def counted_layers(store: Store, run: str, task: str, site: str) -> list[int]:
    """The layers of a site of which a run counted pairs in a task, in order.

    Raises:
        AnalysisError: if there is none; says where pairs were counted.
    """
    for row in _places(store, run):
        if (row["task"], row["site"]) == (task, site):
            return list(row["layers"])
    raise _not_counted(store, {"run": run, "task": task, "site": site})


def neuron_pairs(store: Store, run: str, task: str, site: str, layer: int) -> NeuronPairs:
    """How often the neurons of a layer are active together, and how they correlate.

    Args:
        store: the store.
        run: id of the run.
        task: name of the task.
        site: 'mlp' or 'attn'.
        layer: index of the layer.

    Raises:
        AnalysisError: if the run counted no pairs there; says where it did.
    """
    key = {"run": run, "task": task, "site": site, "layer": layer}
    together = product = total = np.zeros(0)
    n = 0
    for rows in store.sql(load_query("analysis", "pair_rows").text, key).to_arrow_reader(1024):
        neurons = rows["neuron"].to_numpy()
        width = int(rows["width"][0].as_py())
        if n == 0:
            together, product = np.zeros((width, width), np.int64), np.zeros((width, width))
            total = np.zeros(width)
        # A batch may hold a neuron in several shards.
        np.add.at(together, neurons, rows["together"].flatten().to_numpy().reshape(-1, width))
        np.add.at(product, neurons, rows["product"].flatten().to_numpy().reshape(-1, width))
        np.add.at(total, neurons, rows["total"].to_numpy())
        n += int(rows["n"].to_numpy()[neurons == 0].sum())
    if n == 0:
        raise _not_counted(store, key)
    mean = total / n
    covariance = product / n - np.outer(mean, mean)
    # Of a neuron that never changes, rounding leaves a variance of some 1e-16 of its square.
    variance = covariance.diagonal()
    std = np.where(variance > 1e-12 * mean**2, np.sqrt(np.maximum(variance, 0)), np.nan)
    correlation = np.clip(covariance / np.where(std > 0, np.outer(std, std), np.nan), -1, 1)
    return NeuronPairs(n=n, together=together, product=product, correlation=correlation)


def _places(store: Store, run: str) -> list[dict[str, Any]]:
    rows = store.table(load_query("analysis", "pair_places").text, {"run": run})
    found: list[dict[str, Any]] = rows.to_pylist()
    return found


def _not_counted(store: Store, key: dict[str, Any]) -> AnalysisError:
    kept = _places(store, key["run"])
    found = ", ".join(f"{row['task']}: {row['site']} {row['layers']}" for row in kept)
    layer = f", layer {key['layer']}," if "layer" in key else ""
    return AnalysisError(
        f"run {key['run']!r} counted no pairs of neurons of site {key['site']!r}{layer} in task "
        f"{key['task']!r} (it counted {found or 'none at all'}): capture with "
        f"capture.coactivation: {{sites: [{key['site']}], layers: [{key.get('layer', '...')}]}}."
    )
