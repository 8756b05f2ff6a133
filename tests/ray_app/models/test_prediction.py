"""Losses are those of torch, and ties never make a model right by luck."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from ray_app.models.prediction import score_predictions

each_way = pytest.mark.parametrize("compiled", [False, True])


def rank_by_sorting(row: list[float], token: int) -> int:
    """Tokens before this one when all are sorted by falling logit, then by id."""
    return sorted(range(len(row)), key=lambda other: (-row[other], other)).index(token)


@each_way
@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 150),
    vocabulary=st.integers(2, 40),
    levels=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_loss_is_cross_entropy_and_equal_logits_rank_by_token_id(
    compiled: bool, num_tokens: int, vocabulary: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    # Few levels make many ties.
    logits = torch.randint(levels, (num_tokens, vocabulary), generator=random).to(dtype) / 4
    ids = torch.randint(vocabulary, (num_tokens,), generator=random)
    found = score_predictions(logits, ids, compiled=compiled)
    expected = cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
    np.testing.assert_allclose(found.loss, expected.numpy(), rtol=1e-5, atol=1e-5)
    ranks = [
        rank_by_sorting(row, token)
        for row, token in zip(logits[:-1].tolist(), ids[1:].tolist(), strict=True)
    ]
    assert found.top1.tolist() == [rank < 1 for rank in ranks]
    assert found.top10.tolist() == [rank < 10 for rank in ranks]


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_model_is_right_about_the_first_token_ids_only(
    compiled: bool, dtype: torch.dtype
) -> None:
    ids = torch.arange(200)
    found = score_predictions(torch.zeros(200, 200, dtype=dtype), ids, compiled=compiled)
    # Row p predicts token p + 1.
    assert found.top1.tolist() == [False] * 199
    assert found.top10.tolist() == [True] * 9 + [False] * 190
    np.testing.assert_allclose(found.loss, np.log(200), rtol=1e-6)


@each_way
def test_a_sample_of_one_token_predicts_nothing(compiled: bool) -> None:
    found = score_predictions(torch.zeros(1, 5), torch.tensor([2]), compiled=compiled)
    assert found.loss.tolist() == found.top1.tolist() == found.top10.tolist() == []
    assert found.loss.dtype == np.float32


@each_way
@given(
    width=st.integers(1, 70),
    spread=st.floats(0, 150),
    offset=st.floats(-1e4, 1e4),
    seed=st.integers(0, 2**31),
)
def test_losses_are_known_as_well_as_logits_of_their_size_allow(
    compiled: bool, width: int, spread: float, offset: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, width, generator=random) * spread + offset
    logits[:, :-1][torch.rand(9, width - 1, generator=random) < 0.1] = -torch.inf
    ids = torch.full((9,), width - 1)
    found = score_predictions(logits, ids, compiled=compiled)
    expected = cross_entropy(logits[:-1].double(), ids[1:], reduction="none")
    # torch takes the difference of two logits' size in float32, the kernel in float64.
    known_to = 1e-7 if compiled else 1e-6 * (1 + abs(offset) + 5 * spread)
    np.testing.assert_allclose(found.loss, expected.numpy(), rtol=1e-6, atol=known_to)


@each_way
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_loss_of_a_row_that_is_not_finite_is_not_finite(compiled: bool, value: float) -> None:
    logits = torch.zeros(4, 40)
    logits[1, 33] = value
    found = score_predictions(logits, torch.tensor([0, 1, 2, 3]), compiled=compiled)
    assert np.isfinite(found.loss).tolist() == [True, False, True]


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_outside_the_vocabulary_is_refused_before_memory_is_read(token: int) -> None:
    with pytest.raises(IndexError, match=r"token ids must lie in 0\.\.4"):
        score_predictions(torch.zeros(2, 5), torch.tensor([0, token]), compiled=True)


@each_way
def test_logits_are_read_and_not_changed(compiled: bool) -> None:
    logits = torch.randn(70, 11, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    score_predictions(logits, torch.zeros(70, dtype=torch.int64), compiled=compiled)
    assert torch.equal(logits, before)
