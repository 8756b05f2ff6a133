"""Cutting a graph of neurons into parts of equal size, so that those that fire together stay so.

MoEfication (Zhang et al., 2022, arXiv 2110.01786) cuts a co-activation graph with METIS and moves
surplus neurons at random afterwards. Here the parts have their sizes from the start: a spectral
embedding (Ng, Jordan and Weiss, 2001) is clustered by balanced k-means, and pairs of neurons change
places as long as that leaves more weight inside parts (Kernighan and Lin, 1970).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh

from analysis.errors import AnalysisError
from analysis.kmeans import balanced_kmeans, balanced_sizes, normalise_rows

__all__ = ["split_graph", "weight_inside"]

Weights = NDArray[np.float64]
Indices = NDArray[np.int64]


def split_graph(weights: Weights, num_parts: int, *, seed: int = 0) -> Indices:
    """Cut a weighted graph into parts whose sizes differ by at most one.

    Args:
        weights: (d, d) symmetric, finite and not negative, such as how often two neurons fire
            together; the diagonal does not matter.
        num_parts: number of parts.
        seed: of the embedding and of k-means; the same seed gives the same parts.

    Returns:
        (d,) part of each node.

    Raises:
        AnalysisError: if the weights are none of that, or there are more parts than nodes.
    """
    weights = np.array(weights, dtype=np.float64)
    _check(weights)
    balanced_sizes(len(weights), num_parts)
    np.fill_diagonal(weights, 0)
    if num_parts == len(weights):
        return np.arange(num_parts)
    embedded = _embed(weights, num_parts, seed)
    return _improve(weights, balanced_kmeans(embedded, num_parts, seed=seed).labels, num_parts)


def weight_inside(weights: Weights, labels: Indices) -> float:
    """Sum of the weights of edges inside parts, each edge counted once."""
    same = labels[:, None] == labels
    return float((weights * same).sum() - np.trace(weights)) / 2


def _check(weights: Weights) -> None:
    rule = "weights must be a square matrix, symmetric, finite and not negative, found"
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise AnalysisError(f"{rule} shape {weights.shape}: give one row and column per neuron.")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise AnalysisError(f"{rule} {weights.min():g} among them: give counts or their like.")
    if not np.allclose(weights, weights.T):
        raise AnalysisError(f"{rule} one that is not symmetric: add its transpose to it.")


def _embed(weights: Weights, num_parts: int, seed: int) -> NDArray[np.float32]:
    """Unit rows of the leading eigenvectors of D^-1/2 W D^-1/2; isolated nodes at the origin."""
    if not weights.any():
        return np.zeros((len(weights), 1), dtype=np.float32)
    degrees = weights.sum(axis=1)
    scales = np.divide(1, np.sqrt(degrees), out=np.zeros_like(degrees), where=degrees > 0)
    # A start of its own makes the iteration the same each time.
    start = np.random.default_rng(seed).normal(size=len(weights))
    normalised = scales[:, None] * weights * scales
    _, vectors = eigsh(normalised, k=min(num_parts, len(weights) - 1), which="LA", v0=start)
    return normalise_rows(vectors.astype(np.float32))


def _improve(weights: Weights, labels: Indices, num_parts: int) -> Indices:
    """Exchange the pair of nodes that gains most, as long as one gains, at most once per node."""
    labels = labels.copy()
    nodes = np.arange(len(labels))
    to_part = weights @ np.eye(num_parts)[labels]
    least_gain = 1e-9 * float(weights.sum())
    for _ in nodes:
        # (d, K) what a node gains inside by moving, without whoever it changes places with.
        moves = to_part - to_part[nodes, labels][:, None]
        first, second, gain = _best_exchange(weights, moves, labels)
        if gain <= least_gain:
            break
        change = weights[:, first] - weights[:, second]
        to_part[:, labels[second]] += change
        to_part[:, labels[first]] -= change
        labels[[first, second]] = labels[[second, first]]
    return labels


def _best_exchange(weights: Weights, moves: Weights, labels: Indices) -> tuple[int, int, float]:
    """Of the best movers between every two parts, the pair that gains most."""
    num_parts = moves.shape[1]
    movers = np.zeros((num_parts, num_parts), dtype=np.int64)
    for part in range(num_parts):
        members = np.flatnonzero(labels == part)
        movers[part] = members[np.argmax(moves[members], axis=0)]
    gains = moves[movers, np.arange(num_parts)]
    # The edge between the two stays outside, though both moves count it as gained.
    both = gains + gains.T - 2 * weights[movers, movers.T]
    np.fill_diagonal(both, -np.inf)
    first, second = np.unravel_index(np.argmax(both), both.shape)
    return int(movers[first, second]), int(movers[second, first]), float(both[first, second])
