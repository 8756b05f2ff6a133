"""How well a model predicted tokens or classes: loss, and whether they came first or in ten."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Prediction", "score_predictions", "score_rows"]

_ROWS = 64
"""Positions scored at once: 64 rows of 50,000 logits are 13 MB of scratch memory."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Arrays over what is predicted of one sample: all tokens but the first, or its class."""

    loss: np.ndarray
    """float32: -ln P(what it is), in nats."""
    top1: np.ndarray
    """bool: whether nothing was more probable."""
    top10: np.ndarray
    """bool: whether fewer than ten others were more probable."""


def score_predictions(logits: Tensor, token_ids: Tensor) -> Prediction:
    """Score the prediction of tokens 1..n-1 of one sample; see `score_rows`.

    Args:
        logits: (n, vocabulary), any floating dtype; row p predicts token p + 1.
        token_ids: (n,) int64.
    """
    return score_rows(logits[:-1], token_ids[1:])


def score_rows(logits: Tensor, targets: Tensor) -> Prediction:
    """Score predictions, one per row.

    Equal logits, common in half precision, rank by token id or class, so that the result is the
    same on every machine and a constant model is not called right.

    Args:
        logits: (n, vocabulary or classes), any floating dtype.
        targets: (n,) int64: what is right.
    """
    losses, ranks = [], []
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        values = rows.float()
        right = values.gather(1, wanted[:, None])
        losses.append(values.logsumexp(1) - right[:, 0])
        ranks.append(_ranks(values, right, wanted))
    if len(targets) == 0:
        empty = np.empty(0, dtype=bool)
        return Prediction(np.empty(0, dtype=np.float32), empty, empty)
    rank = torch.cat(ranks).cpu().numpy()
    return Prediction(torch.cat(losses).cpu().numpy(), rank < 1, rank < 10)


def _ranks(values: Tensor, right: Tensor, wanted: Tensor) -> Tensor:
    # Comparing into float32 and summing is several times faster on CPUs than counting booleans;
    # sums of ones are exact far beyond any vocabulary.
    scratch = torch.empty_like(values)
    above = torch.gt(values, right, out=scratch).sum(1)
    level = torch.ge(values, right, out=scratch).sum(1) - above
    for row in (level > 1).nonzero().flatten().tolist():
        above[row] += (values[row, : wanted[row]] == right[row]).sum()
    return above
