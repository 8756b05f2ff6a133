"""Whether tasks share neurons in the same way in two runs, such as a model and its random twin.

Pochinkov, Jones and Rahman (2024, arXiv 2408.17324) compare the overlap matrices of a trained and a
randomly initialised model by eye. Here the two matrices are correlated over pairs of tasks, and the
correlation is tested by permuting the tasks of one of them (Mantel, 1967): entries of a matrix are
not independent, so the usual test of a correlation would find too much.
"""

from itertools import permutations
from math import factorial

import numpy as np

__all__ = ["MOST_PERMUTATIONS", "mantel_test"]

MOST_PERMUTATIONS = 5040
"""All orders of seven tasks; of more tasks, this many drawn at random."""

_SEED = 0


def mantel_test(
    first: np.ndarray, second: np.ndarray, num_tasks: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Correlate pairs of matrices over tasks, and test it by permuting tasks.

    Args:
        first: (K, P) float64, the values of K matrices at the P = T (T - 1) / 2 pairs of tasks, in
            the order of `np.triu_indices(T, 1)`.
        second: (K, P), the matrices to compare with.
        num_tasks: T.

    Returns:
        (K,) Pearson's correlations, NaN where a matrix has the same value everywhere or there are
        fewer than three tasks; (K,) shares of permutations, the given order among them, that
        correlate as much or more; and their number.
    """
    orders = _orders(num_tasks)
    rows, columns = np.triu_indices(num_tasks, 1)
    pair_of = np.zeros((num_tasks, num_tasks), dtype=np.int64)
    pair_of[rows, columns] = pair_of[columns, rows] = np.arange(len(rows))
    a, b = _standardised(first), _standardised(second)
    correlations = (a * b).sum(1)
    at_least = np.zeros(len(a), dtype=np.int64)
    for order in orders:
        moved = (a * b[:, pair_of[order[rows], order[columns]]]).sum(1)
        # A permutation that changes nothing must count, whatever the order of its sums.
        at_least += moved >= correlations - 1e-9
    p_values = np.where(np.isnan(correlations), np.nan, at_least / len(orders))
    return correlations, p_values, len(orders)


def _orders(num_tasks: int) -> np.ndarray:
    """(orders, tasks) permutations, the identity first."""
    if factorial(num_tasks) <= MOST_PERMUTATIONS:
        return np.array(list(permutations(range(num_tasks))), dtype=np.int64)
    random = np.random.default_rng(_SEED)
    drawn = [random.permutation(num_tasks) for _ in range(MOST_PERMUTATIONS - 1)]
    return np.array([np.arange(num_tasks), *drawn])


def _standardised(values: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1; NaN for rows of equal values, and of fewer than three."""
    if values.shape[1] < 3:
        return np.full(values.shape, np.nan)
    about = values - values.mean(1, keepdims=True)
    length = np.sqrt(np.square(about).sum(1, keepdims=True))
    constant = length <= 1e-12 * np.abs(values).max(1, keepdims=True, initial=0)
    standardised: np.ndarray = about / np.where(constant, np.nan, length)
    return standardised
