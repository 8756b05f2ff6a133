"""Cutting graphs: planted parts found, sizes exact, nothing to gain by an exchange."""

import numpy as np
import pytest

from analysis import AnalysisError
from analysis.graph import split_graph, weight_inside
from analysis.kmeans import balanced_sizes


def test_planted_parts_are_found_with_exact_sizes() -> None:
    random = np.random.default_rng(1)
    planted = random.permutation(np.repeat(np.arange(5), balanced_sizes(63, 5)))
    together = planted[:, None] == planted
    weights = random.poisson(np.where(together, 6.0, 1.0))
    weights = weights + weights.T
    found = split_graph(weights, 5, seed=2)
    assert len(set(zip(found.tolist(), planted.tolist(), strict=True))) == 5
    assert sorted(np.bincount(found), reverse=True) == balanced_sizes(63, 5).tolist()
    assert np.array_equal(found, split_graph(weights, 5, seed=2))


def test_of_any_graph_more_stays_inside_than_by_chance_and_sizes_are_exact() -> None:
    random = np.random.default_rng(0)
    weights = np.triu(random.exponential(size=(41, 41)) * (random.random((41, 41)) < 0.3), 1)
    weights[:, 7] = weights[7] = 0  # A neuron that never fires.
    weights += weights.T
    found = split_graph(weights, 6)
    assert sorted(np.bincount(found), reverse=True) == balanced_sizes(41, 6).tolist()
    by_chance = [weight_inside(weights, random.permutation(found)) for _ in range(500)]
    assert weight_inside(weights, found) > max(by_chance)
    exchanged = found.copy()
    one = int(np.flatnonzero(found == 0)[0])
    for other in np.flatnonzero(found != 0):
        exchanged[:] = found
        exchanged[[one, other]] = found[[other, one]]
        assert weight_inside(weights, exchanged) <= weight_inside(weights, found) + 1e-9


@pytest.mark.parametrize("num_parts", [1, 4, 5])
def test_graphs_without_edges_are_cut_too(num_parts: int) -> None:
    found = split_graph(np.zeros((5, 5)), num_parts)
    assert len(set(found.tolist())) == num_parts


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        (np.ones((3, 2)), r"shape \(3, 2\)"),
        (-np.ones((3, 3)), "-1 among them"),
        (np.triu(np.ones((3, 3))), "not symmetric"),
    ],
)
def test_what_is_no_graph_is_refused(weights: np.ndarray, found: str) -> None:
    with pytest.raises(AnalysisError, match=f"symmetric, finite and not negative, found .*{found}"):
        split_graph(weights, 2)
