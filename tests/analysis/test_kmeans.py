"""Balanced k-means: exact sizes, assignments of least cost, planted clusters found again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from analysis import AnalysisError
from analysis.kmeans import assign_balanced, balanced_kmeans, balanced_sizes, normalise_rows


def same_groups(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two labelings differ in the numbers of their clusters only."""
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 9)).filter(lambda s: s[0] >= s[1]),
    kind=st.sampled_from(["normal", "tied", "one-sided"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_assignment_of_these_sizes_costs_less(
    shape: tuple[int, int], kind: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    costs = random.normal(size=shape).astype(np.float32)
    if kind == "tied":
        costs = np.round(costs)
    if kind == "one-sided":
        costs[:, 0] -= 10
    num_points, num_clusters = shape
    labels, prices = assign_balanced(costs, random.normal(size=num_clusters))
    sizes = np.bincount(labels, minlength=num_clusters)
    assert sorted(sizes, reverse=True) == balanced_sizes(*shape).tolist()
    # The Hungarian method: a column for each place that is taken for certain, one per cluster for
    # a place that may stay free, and rows that stand for nobody and take those.
    places = num_points // num_clusters
    columns = np.concatenate([np.repeat(costs, places, axis=1), costs], axis=1).astype(np.float64)
    nobody = np.zeros((columns.shape[1] - num_points, columns.shape[1]))
    nobody[:, : places * num_clusters] = 1e6
    square = np.concatenate([columns, nobody])
    least = square[linear_sum_assignment(square)].sum()
    paid = costs[np.arange(num_points), labels].sum(dtype=np.float64)
    assert paid == pytest.approx(least, abs=1e-5)
    paid = (costs + prices)[np.arange(num_points), labels]
    assert (paid <= (costs + prices).min(axis=1) + 1e-6).all()


def test_planted_clusters_are_found_with_exact_sizes() -> None:
    random = np.random.default_rng(3)
    planted = random.permutation(np.repeat(np.arange(12), balanced_sizes(500, 12)))
    # Wider than what seeds are chosen in.
    centres = random.normal(size=(12, 200))
    rows = centres[planted] + 0.5 * random.normal(size=(500, 200))
    points = normalise_rows((rows * random.uniform(0.1, 9, size=(500, 1))).astype(np.float32))
    found = balanced_kmeans(points, 12, seed=5)
    assert same_groups(found.labels, planted)
    assert sorted(np.bincount(found.labels).tolist()) == sorted(balanced_sizes(500, 12).tolist())
    means = np.stack([points[planted == c].mean(axis=0, dtype=np.float64) for c in range(12)])
    assert found.inertia == pytest.approx(((points - means[planted]) ** 2).sum(), rel=1e-5)
    again = balanced_kmeans(points, 12, seed=5)
    assert np.array_equal(again.labels, found.labels)


def test_without_structure_sizes_are_exact_and_seeds_differ() -> None:
    points = np.random.default_rng(0).normal(size=(301, 20)).astype(np.float32)
    first, second = (balanced_kmeans(points, 7, seed=seed) for seed in (0, 1))
    assert not same_groups(first.labels, second.labels)
    assert np.bincount(first.labels).tolist() == [43] * 7
    assert first.num_iterations > 2
    total = ((points - points.mean(axis=0)) ** 2).sum()
    assert first.inertia < 0.95 * total


@pytest.mark.parametrize("num_clusters", [1, 2, 6, 7])
def test_points_that_are_all_alike_are_divided_too(num_clusters: int) -> None:
    found = balanced_kmeans(np.ones((7, 3), dtype=np.float32), num_clusters)
    assert np.bincount(found.labels).max() == -(-7 // num_clusters)
    assert found.inertia == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("num_clusters", [0, 8])
def test_more_clusters_than_points_are_refused(num_clusters: int) -> None:
    points = np.ones((7, 3), dtype=np.float32)
    with pytest.raises(
        AnalysisError, match=f"from 1 to the number of points, 7, found {num_clusters}"
    ):
        balanced_kmeans(points, num_clusters)


def test_points_that_are_not_finite_are_refused() -> None:
    points = np.ones((7, 3), dtype=np.float32)
    points[4, 1] = np.inf
    with pytest.raises(AnalysisError, match="such as row 4"):
        balanced_kmeans(points, 2)
