"""Removing neurons by hooks is deleting their weights, and removing none changes no bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from ray_app.ablation.masks import (
    NUM_BINS,
    UNPRUNED,
    Ablation,
    Histogram,
    ablated,
    resampled_positions,
)
from ray_app.capture.shards import Batch
from ray_app.models.export import delete_neurons
from ray_app.models.loading import load_architecture, load_model, locate_model
from ray_app.models.sites import find_sites
from ray_app.study import ModelSettings

NEURONS = {
    ("attn", 0): np.array([0, 7, 31]),
    ("mlp", 0): np.array([1, 2, 70]),
    ("mlp", 1): np.arange(60),
}


def batch_of(lengths: list[int], counted: list[int] | None = None, first: int = 0) -> Batch:
    """A batch of padded samples, of whose flattened positions some count."""
    return Batch(
        rows=pa.table({}),
        index=0,
        samples=np.arange(first, first + len(lengths)),
        lengths=torch.tensor(lengths),
        attention_mask=None,
        counted=None if counted is None else torch.tensor(counted),
    )


def opened(folder: Path) -> tuple[nn.Module, dict[Any, nn.Module], Callable[[], Tensor]]:
    """A model, its projections, and what it makes of a batch."""
    settings = ModelSettings(source=str(folder))
    files = locate_model(settings)
    architecture = load_architecture(settings, files)
    model = load_model(settings, files)
    modules = {
        (site.site, site.layer): model.get_submodule(site.module)
        for site in find_sites(model, architecture)
    }
    ids = torch.randint(0, 400, (3, 9), generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        with torch.inference_mode():
            return architecture.run(model, ids, None)

    return model, modules, run


# One with a transposed weight and biases, one that flattens its batch, one with neither.
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_hooks_equal_deleted_weights_and_no_neurons_change_no_bit(
    model_folder: Callable[[str], Path], family: str
) -> None:
    _, modules, run = opened(model_folder(family))
    batch = batch_of([9, 9, 9])
    whole = run()
    with ablated(modules, UNPRUNED, batch):
        assert torch.equal(run(), whole)
    with ablated(modules, Ablation(kind="zero", neurons=NEURONS), batch):
        hooked = run()
    assert torch.equal(run(), whole), "hooks must be gone after the block"
    for key, neurons in NEURONS.items():
        delete_neurons(modules[key], neurons, None)
    assert not torch.equal(whole, hooked)
    assert torch.equal(run(), hooked)


def test_means_of_constant_neurons_change_nothing_but_rounding(
    model_folder: Callable[[str], Path],
) -> None:
    model, modules, run = opened(model_folder("opt"))
    # OPT's neurons are relu(W x + b): without their W they are constants of different sizes.
    constants = {}
    for layer, key in enumerate(key for key in NEURONS if key[0] == "mlp"):
        into: Any = model.get_submodule(f"model.decoder.layers.{layer}.fc1")
        values = torch.linspace(-1, 2, len(NEURONS[key]))
        with torch.no_grad():
            into.weight[NEURONS[key]] = 0
            into.bias[NEURONS[key]] = values
        constants[key] = values.relu().numpy()
    whole = run()
    neurons = {key: NEURONS[key] for key in constants}
    ablation = Ablation(kind="mean", neurons=neurons, values=constants)
    with ablated(modules, ablation, batch_of([9, 9, 9])):
        assert torch.allclose(run(), whole, atol=1e-6, rtol=0)
    for key, chosen in neurons.items():
        delete_neurons(modules[key], chosen, constants[key])
    assert torch.allclose(run(), whole, atol=1e-5, rtol=0)


def test_resampling_moves_every_counted_activation_once_and_takes_nothing_from_others() -> None:
    counted = [1, 2, 4, 5, 6, 9]
    batch = batch_of([4, 5], counted)
    source = resampled_positions(batch, 3)
    assert sorted(source[counted].tolist()) == counted
    assert not (source[counted] == torch.tensor(counted)).any()
    assert set(source.tolist()) == set(counted)
    assert torch.equal(source, resampled_positions(batch, 3))
    assert not torch.equal(source, resampled_positions(batch, 4))
    assert not torch.equal(source, resampled_positions(batch_of([4, 5], counted, first=2), 3))

    module = nn.Identity()
    z = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    key = "mlp", 0
    ablation = Ablation(kind="resample", neurons={key: np.array([0, 2])}, seed=1)
    with ablated({key: module}, ablation, batch):
        moved = module(z)
    assert torch.equal(moved[..., 1], z[..., 1])
    rows = (moved[..., 0].flatten() / 3).long()
    assert torch.equal(moved[..., 2].flatten(), z[..., 2].flatten()[rows])
    assert sorted(rows[counted].tolist()) == counted


def test_peaks_are_the_centres_of_the_fullest_bins() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=(500, 4)).astype(np.float32)
    z[:, 1] = -2.5
    z[:, 2] = np.where(np.arange(500) % 2, 1, 3)  # Two bins are equally full: the lower one.
    z[:200, 3] = 0
    lower, upper = z.min(0), z.max(0)
    shards = [Histogram(lower, upper, "cpu") for _ in range(2)]
    shards[0].add(torch.from_numpy(z[:300]), None)
    shards[1].add(torch.from_numpy(z[::-1].copy()), torch.arange(200))
    counts = sum(shard.counts() for shard in shards)
    for neuron in (0, 3):
        column = z[:, neuron].astype(np.float64)
        expected, edges = np.histogram(column, NUM_BINS, (column.min(), column.max()))
        # A value on an edge may fall either way.
        assert np.abs(expected - counts[neuron]).sum() <= 2
        peak = Histogram.peaks(counts, lower, upper)[neuron]
        fullest = expected.argmax()
        assert peak == pytest.approx((edges[fullest] + edges[fullest + 1]) / 2)
    assert Histogram.peaks(counts, lower, upper)[1] == -2.5
    assert Histogram.peaks(counts, lower, upper)[2] == pytest.approx(1.01)
