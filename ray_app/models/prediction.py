"""How well a model predicted tokens or classes: loss, and whether they came first or in ten."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_app.native import load_library

__all__ = ["Prediction", "score_predictions", "score_rows"]

_ROWS = 4
"""Positions scored at once: 4 rows of 50,000 logits are 0.8 MB, which stays in a core's cache."""
_SOURCE = Path(__file__).with_name("prediction.c")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Arrays over what is predicted of one sample: all tokens but the first, or its class."""

    loss: np.ndarray
    """float32: -ln P(what it is), in nats."""
    top1: np.ndarray
    """bool: whether nothing was more probable."""
    top10: np.ndarray
    """bool: whether fewer than ten others were more probable."""


def score_predictions(logits: Tensor, token_ids: Tensor, *, compiled: bool = False) -> Prediction:
    """Score the prediction of tokens 1..n-1 of one sample: token p + 1 by row p; see `score_rows`.

    Args:
        logits: (n, vocabulary).
        token_ids: (n,) int64.
        compiled: as for `score_rows`.
    """
    return score_rows(logits[:-1], token_ids[1:], compiled=compiled)


def score_rows(logits: Tensor, targets: Tensor, *, compiled: bool = False) -> Prediction:
    """Score predictions, one per row.

    Equal logits, common in half precision, rank by token id or class, so that the result is the
    same on every machine and a constant model is not called right.

    Args:
        logits: (n, vocabulary or classes), any floating dtype.
        targets: (n,) int64, on the device of the logits: what is right.
        compiled: on CPUs, whether prediction.c computes it instead of torch's operators; losses
            differ in the last bits.

    Raises:
        NativeError: if prediction.c is to compute it and cannot be built here.
    """
    native = compiled and logits.device.type == "cpu"
    score = _score_native if native else _score_eager
    # More rows at once where nothing is kept of a row but its score.
    size = 64 if native else _ROWS
    parts = [
        score(rows.float(), wanted)
        for rows, wanted in zip(logits.split(size), targets.split(size), strict=True)
        if len(wanted)
    ]
    if not parts:
        empty = np.empty(0, dtype=bool)
        return Prediction(np.empty(0, dtype=np.float32), empty, empty)
    loss, rank = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Prediction(loss, rank < 1, rank < 10)


def _score_eager(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and ranks of the wanted tokens, for float32 logits (rows, vocabulary)."""
    right = values.gather(1, wanted[:, None])
    # Comparing into float32 and summing is several times faster on CPUs than counting booleans;
    # sums of ones are exact far beyond any vocabulary.
    scratch = torch.empty_like(values)
    above = torch.gt(values, right, out=scratch).sum(1)
    level = torch.ge(values, right, out=scratch).sum(1) - above
    return values.logsumexp(1) - right[:, 0], _ranks(values, wanted, above, level)


def _score_native(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocabulary = values.shape
    if int(wanted.min()) < 0 or int(wanted.max()) >= vocabulary:
        raise IndexError(f"token ids must lie in 0..{vocabulary - 1}, found {wanted.tolist()}")
    values, wanted = values.contiguous(), wanted.contiguous()
    loss = torch.empty(rows, dtype=torch.float32)
    above, level = torch.empty(2, rows, dtype=torch.int32)
    _score_rows()(
        values.data_ptr(),
        rows,
        vocabulary,
        wanted.data_ptr(),
        loss.data_ptr(),
        above.data_ptr(),
        level.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, _ranks(values, wanted, above, level)


def _ranks(values: Tensor, wanted: Tensor, above: Tensor, level: Tensor) -> Tensor:
    """Tokens that come before the wanted ones: those above, and equal ones of smaller id."""
    for row in (level > 1).nonzero().flatten().tolist():
        token = wanted[row]
        above[row] += (values[row, :token] == values[row, token]).sum()
    return above


@cache
def _score_rows() -> Any:
    function = load_library(_SOURCE).score_rows
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, number, *[pointer] * 4, ctypes.c_int]
    function.restype = None
    return function
