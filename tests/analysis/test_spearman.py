"""Rank correlations are those of SciPy, of every layer and of all of them together."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from analysis.spearman import correlations_by_stratum, rank_correlation

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.floats(-9, 9)), min_size=3, max_size=40)


@given(PAIRS, st.randoms(use_true_random=False))
def test_it_is_scipys_and_does_not_depend_on_the_order(
    pairs: list[tuple[int, float]], random: np.random.Generator
) -> None:
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    found = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
        return
    assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    random.shuffle(pairs)
    moved_a, moved_b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    assert rank_correlation(moved_a, moved_b) == found


def test_ranks_of_half_a_million_neurons_are_exact() -> None:
    values = np.random.default_rng(0).permutation(500_000).astype(float)
    assert rank_correlation(values, 3 * values) == 1
    assert rank_correlation(values, -values) == -1


def test_layers_are_correlated_alone_and_together() -> None:
    random = np.random.default_rng(1)
    drawn = {(task, layer): random.random((2, 5 + layer)) for task in "xy" for layer in (0, 3)}
    values = pa.table(
        {
            "task": [task for task, _ in drawn],
            "metric": ["abs"] * 4,
            "site": ["mlp"] * 4,
            "layer": pa.array([layer for _, layer in drawn], pa.int16()),
            "pairs": [[{"a": a, "b": b} for a, b in z.T] for z in drawn.values()],
        }
    )
    rows = correlations_by_stratum(values).to_pylist()
    found = {(row["task"], row["layer"]): row["correlation"] for row in rows}
    assert len(rows) == len(found) == 6
    for key, (a, b) in drawn.items():
        assert found[key] == pytest.approx(spearmanr(a, b).statistic)
    for task in "xy":
        a, b = np.concatenate([drawn[task, 0], drawn[task, 3]], axis=1)
        assert found[task, None] == pytest.approx(spearmanr(a, b).statistic)
