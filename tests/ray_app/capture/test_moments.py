"""Statistics of neurons equal a float64 two-pass reference, however the positions are split."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_app.capture.moments import (
    CompiledMomentAccumulator,
    MomentAccumulator,
    NativeMomentAccumulator,
)
from storage import create_store, layout
from storage.store import Store

Kind = type[MomentAccumulator]

each_kind = pytest.mark.parametrize("kind", [MomentAccumulator, NativeMomentAccumulator])

SUMS = ("abs_sum", "sqrt_sum", "pos_sum", "neg_sum")


def two_pass(z: torch.Tensor) -> dict[str, np.ndarray]:
    """What table ``stats`` must say of activations (positions, neurons), in float64."""
    values = z.double().numpy()
    mean = values.sum(0) / len(values)
    return {
        "n": np.full(values.shape[1], len(values)),
        "mean": mean,
        "m2": np.square(values - mean).sum(0),
        "abs_sum": np.abs(values).sum(0),
        "sqrt_sum": np.sqrt(np.abs(values)).sum(0),
        "pos_sum": np.maximum(values, 0).sum(0),
        "neg_sum": np.minimum(values, 0).sum(0),
        "pos_count": (values > 0).sum(0),
        "nonzero_count": (values != 0).sum(0),
        "min": values.min(0),
        "max": values.max(0),
    }


def accumulate(blocks: list[torch.Tensor], kind: Kind = MomentAccumulator) -> dict[str, np.ndarray]:
    moments = kind(blocks[0].shape[1])
    for block in blocks:
        moments.add(block)
    assert moments.first_non_finite() is None
    return {name: column.to_numpy() for name, column in moments.columns().items()}


def assert_statistics_agree(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    for name in ("n", "pos_count", "nonzero_count", "min", "max"):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    size = expected["abs_sum"] / expected["n"]
    assert (np.abs(found["mean"] - expected["mean"]) <= 1e-6 * np.abs(expected["mean"])).all() or (
        # A mean that cancels to nearly nothing is known no better than the values that cancel.
        np.abs(found["mean"] - expected["mean"]) <= 1e-12 * size
    ).all()
    std = np.sqrt(expected["m2"] / expected["n"])
    promised = np.abs(expected["mean"]) <= 100 * std
    np.testing.assert_allclose(
        found["m2"][promised], expected["m2"][promised], rtol=1e-4, err_msg="m2"
    )
    for name in SUMS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


@st.composite
def activations(draw: st.DrawFn) -> torch.Tensor:
    """(positions, neurons) of any dtype, with magnitudes, offsets and sparsity of many kinds."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rows = draw(st.integers(1, 700))
    width = draw(st.integers(1, 6))
    largest = 3 if dtype is torch.float16 else 15
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    magnitude = 10.0 ** random.uniform(-largest, largest, width)
    offset = random.choice([0.0, 1.0, -10.0, 99.0], width)
    z = (random.standard_normal((rows, width)) + offset) * magnitude
    z *= random.random((rows, width)) >= random.choice([0.0, 0.5, 1.0], width)
    return torch.from_numpy(np.clip(z, -6e4, 6e4) if dtype is torch.float16 else z).to(dtype)


@st.composite
def split_activations(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Activations, and the same rows cut into blocks in some order."""
    z = draw(activations())
    cuts = draw(st.lists(st.integers(0, len(z)), max_size=6).map(sorted))
    edges = [0, *cuts, len(z)]
    blocks = [z[a:b] for a, b in pairwise(edges) if b > a]
    return z, draw(st.permutations(blocks))


@each_kind
@settings(max_examples=150, deadline=None)
@given(case=split_activations())
def test_any_split_in_any_order_gives_the_two_pass_statistics(
    kind: Kind, case: tuple[torch.Tensor, list[torch.Tensor]]
) -> None:
    z, blocks = case
    assert_statistics_agree(accumulate(blocks, kind), two_pass(z))


def test_the_kernel_for_gpus_agrees_too() -> None:
    random = torch.Generator().manual_seed(0)
    z = torch.randn(700, 24, generator=random) * torch.logspace(-3, 3, 24)
    z += torch.linspace(-100, 100, 24) * torch.logspace(-3, 3, 24)
    z[:, 3] = 0
    found = accumulate(list(z.split([1, 128, 300, 271])), CompiledMomentAccumulator)
    assert_statistics_agree(found, two_pass(z))


@pytest.mark.parametrize("width", [1, 17, 1536, 1700])
def test_the_number_of_threads_changes_no_bit(width: int) -> None:
    z = torch.randn(300, width, generator=torch.Generator().manual_seed(width))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(accumulate([z[:7], z[7:]], NativeMomentAccumulator))
    finally:
        torch.set_num_threads(before)
    assert_statistics_agree(found[0], two_pass(z))
    for other in found[1:]:
        for name, column in found[0].items():
            np.testing.assert_array_equal(column, other[name], err_msg=name)


@each_kind
def test_only_counted_positions_count_and_strides_do_not_matter(kind: Kind) -> None:
    z = torch.randn(2, 130, 12, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([0, 3, 4, 131, 259])
    rows = z.flatten(0, 1)
    wanted = two_pass(rows[counted])
    for same in (rows, rows.T.contiguous().T, torch.cat([rows, rows], 1)[:, :12]):
        moments = kind(12)
        moments.add(same, counted)
        moments.add(same, counted[:0])
        found = {name: column.to_numpy() for name, column in moments.columns().items()}
        assert_statistics_agree(found, wanted)


@each_kind
def test_a_first_batch_far_off_costs_later_ones_no_accuracy(kind: Kind) -> None:
    z = torch.randn(4097, 8, generator=torch.Generator().manual_seed(0))
    z[0] = 1000
    assert_statistics_agree(accumulate([z[:1], z[1:]], kind), two_pass(z))
    found = accumulate([z[:1], z[1:]], kind)
    np.testing.assert_allclose(found["m2"], two_pass(z)["m2"], rtol=1e-6)


def test_another_width_is_refused_before_memory_is_read() -> None:
    with pytest.raises(ValueError, match=r"z must be \(positions, 5\), found \(3, 4\)"):
        NativeMomentAccumulator(5).add(torch.zeros(3, 4))


@each_kind
@given(value=st.floats(-(2.0**50), 2.0**50, width=32), rows=st.integers(1, 400))
def test_a_constant_neuron_has_its_value_as_mean_and_no_variance_at_all(
    kind: Kind, value: float, rows: int
) -> None:
    found = accumulate(list(torch.full((rows, 1), value).split(7)), kind)
    assert found["mean"] == value
    assert found["m2"] == 0


@each_kind
def test_the_mean_of_a_million_positions_far_from_zero_keeps_its_variance(kind: Kind) -> None:
    random = torch.Generator().manual_seed(0)
    z = torch.randn(1_000_000, 2, generator=random) + 100
    found = accumulate(list(z.split(1013)), kind)
    np.testing.assert_allclose(found["mean"], z.double().mean(0).numpy(), rtol=1e-12)
    variance = z.double().var(0, unbiased=False).numpy()
    np.testing.assert_allclose(found["m2"] / found["n"], variance, rtol=1e-6)


@each_kind
def test_activations_are_read_and_not_changed(kind: Kind) -> None:
    z = torch.linspace(-1, 1, 600).reshape(300, 2)
    before = z.clone()
    accumulate([z], kind)
    assert torch.equal(z, before)


def test_nothing_added_counts_nothing() -> None:
    columns = MomentAccumulator(3).columns()
    assert columns["n"].to_pylist() == [0, 0, 0]
    assert columns["nonzero_count"].to_pylist() == [0, 0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e20, 3e38])
@each_kind
def test_the_first_neuron_that_is_not_finite_or_too_large_to_square_is_named(
    kind: Kind, value: float
) -> None:
    z = torch.zeros(300, 5)
    z[200, 3] = z[10, 4] = value
    moments = kind(5)
    moments.add(z[:150])
    moments.add(z[150:])
    assert moments.first_non_finite() == 3
    assert kind(5).first_non_finite() is None


def store_shards(folder: Path, shards: list[torch.Tensor]) -> Store:
    """A store whose run 'r' has captured each tensor as one shard of task 't'."""
    store = create_store(folder)
    for index, z in enumerate(shards):
        width = z.shape[1]
        moments = MomentAccumulator(width)
        moments.add(z)
        table = pa.table(
            {
                "shard": pa.array(np.full(width, index)),
                "site": pa.array(["mlp"] * width),
                "layer": pa.array(np.zeros(width, dtype=np.int16)),
                "neuron": pa.array(np.arange(width)),
                "head": pa.nulls(width, pa.int16()),
                **moments.columns(),
            }
        )
        part = store.files.put_table(layout.stats_path("r", "t", index, 0), "stats", table)
        counts = {"num_samples": 1, "num_tokens": len(z), "num_counted": len(z)}
        store.commit(run="r", task="t", shard=index, counts=counts, files=[part])
    return store


@settings(max_examples=20, deadline=None)
@given(split_activations())
def test_shards_merge_in_sql_to_the_statistics_of_one_pass(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[torch.Tensor, list[torch.Tensor]]
) -> None:
    z, blocks = case
    store = store_shards(tmp_path_factory.mktemp("store"), blocks)
    merged = store.sql("from neuron_stats order by neuron").fetchnumpy()
    n, found = len(z), {name: np.asarray(column) for name, column in merged.items()}
    assert_statistics_agree(
        {
            "n": found["n"],
            "mean": found["mean"],
            "m2": np.square(found["std"]) * n,
            "abs_sum": found["abs"] * n,
            "sqrt_sum": found["sqrt"] * n,
            "pos_sum": found["pos"] * n,
            "neg_sum": found["neg"] * n,
            "pos_count": np.rint(found["freq"] * n),
            "nonzero_count": np.rint(found["nonzero"] * n),
            "min": found["min"],
            "max": found["max"],
        },
        two_pass(z),
    )
    rms = np.sqrt(np.square(z.double().numpy()).mean(0))
    np.testing.assert_allclose(found["rms"], rms, rtol=1e-5)
