"""Balanced k-means: clusters whose sizes differ by at most one, as experts need them.

Lloyd's iterations in which points are assigned to centres at the least total cost that the sizes
allow (Bradley, Bennett and Demiriz, 2000, "Constrained k-means clustering"). That assignment is a
transportation problem of few places and many points. Prices of the places, found by subgradient
steps and kept from one iteration to the next, give nearly the right sizes; what is left over is
moved along shortest paths of a graph that has one node per cluster, which makes the assignment
optimal.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from analysis.errors import AnalysisError

__all__ = ["Partition", "assign_balanced", "balanced_kmeans", "balanced_sizes", "normalise_rows"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

_NUM_SKETCHED = 128
"""Dimensions in which seeds are chosen. A random projection to so many keeps squared distances
within some 12 % (Johnson and Lindenstrauss, 1984), and seeds are drawn at random anyway."""

_MAX_PRICE_STEPS = 200
"""Steps of the prices; one takes about as long as a move along a shortest path."""

_ROUNDING = 1e-12
"""What a path must be shorter by to count, relative to the largest cost: rounding must not close
cycles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Points in clusters."""

    labels: Indices
    """(N,) cluster of each point."""
    inertia: float
    """Sum of squared distances of the points to the means of their clusters."""
    num_iterations: int
    """Assignments made."""


def normalise_rows(rows: Floats) -> Floats:
    """Rows divided by their Euclidean length; rows of zeros stay zero."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    unit: Floats = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return unit


def balanced_sizes(num_points: int, num_clusters: int) -> Indices:
    """Sizes that differ by at most one, the larger ones first.

    Raises:
        AnalysisError: if there are no clusters, or more than points.
    """
    if not 1 <= num_clusters <= num_points:
        raise AnalysisError(
            f"the number of clusters must be from 1 to the number of points, {num_points:,}, found "
            f"{num_clusters:,}: ask for fewer."
        )
    size, larger = divmod(num_points, num_clusters)
    return size + (np.arange(num_clusters) < larger).astype(np.int64)


def balanced_kmeans(
    points: Floats, num_clusters: int, *, seed: int = 0, max_iterations: int = 100
) -> Partition:
    """Cluster points into clusters of equal size.

    Args:
        points: (N, D) float32.
        num_clusters: number of clusters K; if it does not divide N, sizes differ by one.
        seed: of the first centres; the same seed gives the same clusters.
        max_iterations: most assignments; fewer if one changes nothing.

    Raises:
        AnalysisError: if K is not from 1 to N, or a point is not finite.
    """
    balanced_sizes(len(points), num_clusters)
    squares = np.einsum("nd,nd->n", points, points, dtype=np.float64)
    is_finite = np.isfinite(squares)
    if not is_finite.all():
        raise AnalysisError(
            f"every point must be finite, found others such as row {np.argmin(is_finite)}: mend "
            "the weights that the points are."
        )
    centres = points[_choose_seeds(points, num_clusters, np.random.default_rng(seed))]
    prices = np.zeros(num_clusters)
    labels = np.full(len(points), -1)
    num_iterations = 0
    while num_iterations < max_iterations:
        before = labels
        labels, prices = assign_balanced(_costs(points, centres), prices)
        num_iterations += 1
        if np.array_equal(labels, before):
            break
        centres = _means(points, labels, num_clusters)
    # Of the points of a cluster, the squared distances to their mean add up to the sum of their
    # squares less size * |mean|^2.
    sizes = np.bincount(labels)
    between = float(sizes @ np.einsum("kd,kd->k", centres, centres, dtype=np.float64))
    return Partition(
        labels=labels,
        inertia=max(0.0, float(squares.sum()) - between),
        num_iterations=num_iterations,
    )


def assign_balanced(costs: Floats, prices: Doubles | None = None) -> tuple[Indices, Doubles]:
    """Assign points to clusters whose sizes differ by at most one, at the least total cost.

    Args:
        costs: (N, K) finite float32, of each point in each cluster.
        prices: (K,) prices to begin with, such as those of similar costs; zeros if not given.

    Returns:
        (N,) clusters of the points, and (K,) prices: each point is where costs + prices are least.
    """
    num_points, num_clusters = costs.shape
    prices = _approach(costs, np.zeros(num_clusters) if prices is None else prices)
    labels = np.argmin(costs + prices, axis=1)
    # The clusters that are largest anyway get the larger sizes, for a start.
    sizes = np.empty(num_clusters, dtype=np.int64)
    counts = np.bincount(labels, minlength=num_clusters)
    sizes[np.argsort(-counts, kind="stable")] = balanced_sizes(num_points, num_clusters)
    graph = _ClusterGraph(costs, labels, sizes)
    while graph.settle_one() or graph.trade_sizes():
        pass
    return graph.labels, graph.prices()


class _ClusterGraph:
    """An assignment that is optimal for the sizes it has, and what other sizes would cost.

    An edge from cluster a to cluster b stands for the point of a that moves to b at the least cost.
    Moving points along a shortest path from a cluster that is too large to one that is too small
    keeps the assignment optimal for its new sizes (successive shortest paths; Ahuja, Magnanti and
    Orlin, 1993, chapter 9).
    """

    def __init__(self, costs: Floats, labels: Indices, sizes: Indices) -> None:
        num_clusters = len(sizes)
        self.labels = labels
        self._costs = costs
        self._sizes = sizes
        self._rounding = _ROUNDING * float(np.abs(costs).max())
        self._members = [np.flatnonzero(labels == cluster) for cluster in range(num_clusters)]
        self._lengths = np.full((num_clusters, num_clusters), np.inf)
        self._movers = np.zeros((num_clusters, num_clusters), dtype=np.int64)
        for cluster in range(num_clusters):
            self._measure(cluster)

    def settle_one(self) -> bool:
        """Move one point out of clusters that are too large; False if none is."""
        excess = np.array([len(members) for members in self._members]) - self._sizes
        return self._move_one(excess > 0, excess < 0, np.inf)

    def trade_sizes(self) -> bool:
        """Let a larger and a smaller cluster change roles if that costs less; False if not."""
        is_larger = self._sizes > self._sizes.min()
        moved = self._move_one(is_larger, ~is_larger, -self._rounding)
        self._sizes = np.array([len(members) for members in self._members])
        return moved

    def _move_one(self, sources: Mask, targets: Mask, below: float) -> bool:
        """Move points along the shortest path, if that is shorter than `below`."""
        if not sources.any():
            return False
        distances, previous = self._shortest_paths(np.where(sources, 0.0, np.inf))
        end = int(np.argmin(np.where(targets, distances, np.inf)))
        if not distances[end] < below:
            return False
        path = [end]
        while previous[path[-1]] >= 0:
            path.append(int(previous[path[-1]]))
        path.reverse()
        for origin, target in pairwise(path):
            point = self._movers[origin, target]
            self._members[origin] = self._members[origin][self._members[origin] != point]
            self._members[target] = np.append(self._members[target], point)
            self.labels[point] = target
        for cluster in path:
            self._measure(cluster)
        return True

    def prices(self) -> Doubles:
        """Prices at which every point is where costs + prices are least."""
        distances, _ = self._shortest_paths(np.zeros(len(self._sizes)))
        return -distances

    def _shortest_paths(self, distances: Doubles) -> tuple[Doubles, Indices]:
        """Distances from some clusters, and the cluster before each (Bellman and Ford)."""
        previous = np.full(len(distances), -1)
        # The assignment is optimal, so no cycle is shorter than rounding makes it.
        for _ in range(len(distances)):
            through = distances[:, None] + self._lengths
            nearest = np.argmin(through, axis=0)
            reached = through[nearest, np.arange(len(distances))]
            shorter = reached < distances - self._rounding
            if not shorter.any():
                break
            distances = np.where(shorter, reached, distances)
            previous = np.where(shorter, nearest, previous)
        return distances, previous

    def _measure(self, cluster: int) -> None:
        """Find the cheapest moves out of a cluster."""
        members = self._members[cluster]
        if not len(members):
            self._lengths[cluster] = np.inf
            return
        costs = self._costs[members].astype(np.float64)
        moves = costs - costs[:, cluster, None]
        cheapest = np.argmin(moves, axis=0)
        self._movers[cluster] = members[cheapest]
        self._lengths[cluster] = moves[cheapest, np.arange(moves.shape[1])]
        self._lengths[cluster, cluster] = np.inf


def _approach(costs: Floats, prices: Doubles) -> Doubles:
    """Prices at which clusters have nearly their sizes.

    Too large a cluster becomes dearer, too small a one cheaper: steps along the subgradient of the
    dual problem. Each price has a step length of its own that grows as long as the step keeps its
    sign and halves when it turns (Riedmiller and Braun, 1993).
    """
    num_points, num_clusters = costs.shape
    starts = [prices, np.zeros(num_clusters)]
    prices = min(starts, key=lambda start: int(np.abs(_excess(costs, start)).sum()))
    two_least = np.partition(_total(costs, prices), min(1, num_clusters - 1), axis=1)[:, :2]
    steps = np.full(num_clusters, float(np.mean(two_least[:, -1] - two_least[:, 0])))
    signs = np.zeros(num_clusters)
    best, least = prices, np.inf
    for _ in range(_MAX_PRICE_STEPS):
        excess = _excess(costs, prices)
        misplaced = np.abs(excess).sum()
        if misplaced < least:
            best, least = prices, misplaced
        if misplaced <= num_clusters // 4:
            break
        steps *= np.where(np.sign(excess) == signs, 1.2, 0.5)
        signs = np.sign(excess)
        prices = prices + steps * np.clip(2 * excess * num_clusters / num_points, -1, 1)
    return best


def _excess(costs: Floats, prices: Doubles) -> Indices:
    """(K,) points too many in each cluster, if every point is where costs + prices are least."""
    num_points, num_clusters = costs.shape
    counts = np.bincount(np.argmin(_total(costs, prices), axis=1), minlength=num_clusters)
    smallest, largest = num_points // num_clusters, -(-num_points // num_clusters)
    excess: Indices = counts - np.clip(counts, smallest, largest)
    return excess


def _total(costs: Floats, prices: Doubles) -> Floats:
    # In half the bytes of float64; what rounding misplaces is moved afterwards.
    return costs + prices.astype(np.float32)


def _costs(points: Floats, centres: Floats) -> Floats:
    """(N, K) squared distances to the centres, less what all centres have in common."""
    costs: Floats = np.einsum("kd,kd->k", centres, centres) - 2 * (points @ centres.T)
    return costs


def _means(points: Floats, labels: Indices, num_clusters: int) -> Floats:
    # A matrix product is several times faster than sums over gathered rows.
    members = np.zeros((num_clusters, len(points)), dtype=np.float32)
    members[labels, np.arange(len(points))] = 1
    means: Floats = (members @ points) / members.sum(axis=1, keepdims=True)
    return means


def _choose_seeds(points: Floats, count: int, random: np.random.Generator) -> Indices:
    """Points far from each other: greedy k-means++ (Arthur and Vassilvitskii, 2007).

    Each is the best of some candidates that are drawn with probabilities in proportion to their
    squared distance to those chosen so far.
    """
    sketch = points
    if points.shape[1] > _NUM_SKETCHED:
        shape = (points.shape[1], _NUM_SKETCHED)
        sketch = points @ random.standard_normal(shape, dtype=np.float32)
    squares = np.einsum("nd,nd->n", sketch, sketch)

    def distances(candidates: Indices) -> Floats:
        products = sketch @ sketch[candidates].T
        far: Floats = np.maximum(squares[:, None] + squares[candidates] - 2 * products, 0)
        return far

    chosen = random.integers(len(points), size=1)
    nearest = distances(chosen)[:, 0]
    while len(chosen) < count:
        # A point that was chosen has no distance to itself, whatever rounding says.
        nearest[chosen] = 0
        if not nearest.any():
            # No more than `len(chosen)` different points: any others do as well.
            others = np.setdiff1d(np.arange(len(points)), chosen)
            return np.concatenate([chosen, others[: count - len(chosen)]])
        cumulated = np.cumsum(nearest, dtype=np.float64)
        drawn = random.random(2 + int(np.log(count))) * cumulated[-1]
        candidates = np.searchsorted(cumulated, drawn, side="right")
        closer = np.minimum(nearest[:, None], distances(candidates))
        best = int(np.argmin(closer.sum(axis=0)))
        chosen = np.append(chosen, candidates[best])
        nearest = closer[:, best]
    return chosen
