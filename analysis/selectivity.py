"""Selectivity: whether pruning hurts the task it is meant for more than another one.

Formulas of the code that goes with Pochinkov and Schoots (2024, arXiv 2403.01267) and with
Pochinkov, Jones and Rahman (2024, arXiv 2408.17324). Both look at a curve: accuracies of the two
tasks without ever larger fractions of neurons.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["selectivity"]


def selectivity(forget: Sequence[float], retain: Sequence[float]) -> dict[str, float | None]:
    """Selectivity of one pruning curve.

    Args:
        forget: accuracy of the task whose neurons are removed: unpruned, then from the smallest
            fraction up.
        retain: accuracy of the other task at the same fractions.

    Returns:
        ``max_difference``: the largest difference of the drops, in percent of the unpruned
        accuracies. ``area``: 2 / 100^2 times the trapezoid area of that difference over the drop of
        `retain`, from no drop to the last fraction: 0 if both drop alike; 1 if `forget` is gone
        before `retain` drops, and that then drops to nothing. ``area_ratio``: the trapezoid area
        under `retain` over `forget`, from the origin through the curve to the unpruned point, over
        half the rectangle of the unpruned accuracies: 1 if both drop alike, up to 2. None where an
        unpruned accuracy is 0.
    """
    x, y = np.asarray(forget, dtype=np.float64), np.asarray(retain, dtype=np.float64)
    if x[0] <= 0 or y[0] <= 0:
        return {"max_difference": None, "area": None, "area_ratio": None}
    drop_forget, drop_retain = (100 * (1 - values / values[0]) for values in (x, y))
    difference = drop_forget - drop_retain
    backwards_x, backwards_y = np.append(x, 0)[::-1], np.append(y, 0)[::-1]
    return {
        "max_difference": float(difference[1:].max()),
        "area": float(2 / 100**2 * np.trapezoid(difference, drop_retain)),
        "area_ratio": float(np.trapezoid(backwards_y, backwards_x) / (0.5 * x[0] * y[0])),
    }
