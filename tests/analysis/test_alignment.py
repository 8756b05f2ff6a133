"""Areas, chance and adjusted mutual information against closed forms and scikit-learn."""

import numpy as np
import pytest
from scipy.stats import hypergeom
from sklearn.metrics import adjusted_mutual_info_score

from analysis.alignment import (
    alignment_curve,
    area,
    best_area,
    mutual_information,
    simulated_areas,
)


def test_curve_and_area_are_those_of_the_paper() -> None:
    curve = alignment_curve(np.array([1, 0, 4, 2]))
    assert curve.tolist() == [0, 4, 6, 7, 7]
    assert area(curve) == (0 + 4 + 6 + 7) / (4 * 7)
    # Fewer neurons than experts: only as many experts as could be needed.
    assert alignment_curve(np.array([0, 2, 0, 0])).tolist() == [0, 2, 2]


@pytest.mark.parametrize("num_selected", [1, 5, 8, 30, 47])
def test_the_best_area_fills_experts_one_by_one(num_selected: int) -> None:
    filled = [min(num_selected, 8 * i) for i in range(7)]
    steps = min(num_selected, 6)
    expected = sum(filled[:steps]) / (steps * num_selected)
    assert best_area(np.full(6, 8), num_selected) == pytest.approx(expected)
    uneven = np.array([7, 9, 8, 8, 7, 9])
    assert (
        best_area(uneven, num_selected)
        >= simulated_areas(tuple(uneven.tolist()), num_selected, 200, 0).max()
    )


def closed_form(sizes: tuple[int, ...], num_selected: int) -> float:
    """The mean area of two selected neurons, or in two experts."""
    total = sum(sizes)
    if num_selected == 2:
        together = sum(size * (size - 1) for size in sizes) / (total * (total - 1))
        return (1 + together) / 4
    held = np.arange(num_selected + 1)
    larger = np.maximum(held, num_selected - held)
    return float(hypergeom.pmf(held, total, num_selected, sizes[0]) @ larger) / (2 * num_selected)


@pytest.mark.parametrize(
    ("sizes", "num_selected"), [((4,) * 8, 2), ((5, 5, 4), 2), ((20, 20), 9), ((21, 20), 30)]
)
def test_simulated_chance_agrees_with_the_closed_form(
    sizes: tuple[int, ...], num_selected: int
) -> None:
    areas = simulated_areas(sizes, num_selected, 4_000, 1)
    error = areas.std() / np.sqrt(len(areas))
    assert abs(areas.mean() - closed_form(sizes, num_selected)) < 4 * error
    assert np.array_equal(areas, simulated_areas.__wrapped__(sizes, num_selected, 4_000, 1))


def test_mutual_information_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(2)
    for num_experts in (2, 3, 7, 20):
        expert = random.permutation(60) % num_experts
        for num_selected in (1, 9, 31, 59):
            selected = np.zeros(60, dtype=int)
            selected[random.choice(60, num_selected, replace=False)] = 1
            sizes = np.bincount(expert)
            held = np.bincount(expert, weights=selected).astype(int)
            found = mutual_information(sizes, held)
            wanted = adjusted_mutual_info_score(expert, selected, average_method="min")
            assert found == pytest.approx(wanted, abs=1e-9)


def test_what_nothing_can_be_told_of_has_no_mutual_information() -> None:
    assert mutual_information(np.array([12]), np.array([5])) is None
    assert mutual_information(np.array([6, 6]), np.array([6, 6])) is None
