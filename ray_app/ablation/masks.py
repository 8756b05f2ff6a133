"""Ablations: which neurons are removed, and what takes the place of their activations.

A neuron is one coordinate of what an output projection reads, so removing it is a change of that
module's input: with zeros, the model computes what it would with the projection's columns of these
neurons deleted. Layers without a removed neuron are left alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from analysis.selection import Neurons, seed_of
from analysis.settings import Kind
from ray_app.capture.recorders import SiteKey
from ray_app.capture.shards import Batch
from ray_app.models.hooks import edit_inputs

__all__ = ["NUM_BINS", "UNPRUNED", "Ablation", "Histogram", "ablated", "resampled_positions"]

NUM_BINS = 100
"""Bins of the histograms that peaks are read from (Pochinkov et al. 2024, arXiv 2408.17322)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ablation:
    """Neurons that are removed, and how.

    The kinds: ``zero`` puts 0 in the place of an activation, ``mean`` the neuron's mean over the
    counted positions of the reference, ``peak`` the centre of the fullest of 100 equal bins between
    the neuron's least and largest activation there (the lowest of equally full ones), at every
    position, whether it counts or not; ``resample`` the activation of another position: see
    `resampled_positions`.
    """

    kind: Kind
    """What takes the place of an activation."""
    neurons: Neurons
    """(K,) indices of the removed neurons by (site, layer), each at least one."""
    values: Mapping[SiteKey, np.ndarray] = field(default_factory=dict)
    """(K,) float32 in the order of `neurons`; for ``mean`` and ``peak``."""
    seed: int = 0
    """Seed of ``resample``."""

    @classmethod
    def of(
        cls,
        kind: Kind,
        neurons: Neurons,
        *,
        replacements: Mapping[SiteKey, np.ndarray] | None = None,
        seed: int = 0,
    ) -> "Ablation":
        """An ablation whose values are picked from those of all neurons.

        Args:
            kind: what takes the place of an activation.
            neurons: the neurons to remove.
            replacements: (width,) by (site, layer), for ``mean`` and ``peak``.
            seed: seed of ``resample``.
        """
        values = {}
        if replacements is not None:
            values = {
                key: replacements[key][chosen].astype(np.float32) for key, chosen in neurons.items()
            }
        return cls(kind=kind, neurons=neurons, values=values, seed=seed)

    @property
    def num_removed(self) -> int:
        """Number of removed neurons."""
        return sum(map(len, self.neurons.values()))


UNPRUNED = Ablation(kind="zero", neurons={})
"""Removes nothing."""


@contextmanager
def ablated(
    modules: Mapping[SiteKey, nn.Module], ablation: Ablation, batch: Batch
) -> Iterator[None]:
    """Run the block with neurons removed.

    Args:
        modules: output projections of the stage by (site, layer); neurons elsewhere are left to
            other stages.
        ablation: what is removed.
        batch: what the model runs on, which resampling draws its positions from.
    """

    def edit(key: SiteKey, z: Tensor) -> Tensor:
        chosen = torch.from_numpy(ablation.neurons[key].astype(np.int64)).to(z.device)
        if ablation.kind == "zero":
            return z.index_fill(-1, chosen, 0)
        if ablation.kind == "resample":
            # OPT flattens its batch before the MLP: positions are rows either way.
            rows = z.flatten(0, -2)
            source = resampled_positions(batch, seed_of(ablation.seed, *key)).to(z.device)
            replaced = rows.index_select(1, chosen).index_select(0, source)
            return rows.index_copy(1, chosen, replaced).view_as(z)
        values = torch.from_numpy(ablation.values[key]).to(z.device, z.dtype)
        return z.index_copy(-1, chosen, values.expand(*z.shape[:-1], -1))

    touched = {key: modules[key] for key in ablation.neurons.keys() & modules.keys()}
    with edit_inputs(touched, edit):
        yield


def resampled_positions(batch: Batch, seed: int) -> Tensor:
    """(B * P,) int64: the position of the batch that each one takes its activations from.

    The counted positions are put into a random order, and each takes the activations of the next,
    the last one those of the first: every activation is used once, and none stays in its place if
    more than one position counts. Positions that do not count, padding among them, take those of
    any counted one. All removed neurons of a site and layer take theirs from the same position,
    as the ablated model computes them. The order depends on the seed and the batch's samples alone.

    Args:
        batch: the batch, of whose positions one at least counts.
        seed: seed of the (site, layer).
    """
    total = batch.shape[0] * batch.shape[1]
    counted = np.arange(total) if batch.counted is None else batch.counted.numpy()
    random = np.random.default_rng(seed_of(seed, *batch.samples.tolist()))
    source = random.choice(counted, size=total)
    order = random.permutation(counted)
    source[order] = np.roll(order, -1)
    return torch.from_numpy(source)


class Histogram:
    """Counts of a site's activations in 100 equal bins between bounds of each neuron."""

    def __init__(self, lower: np.ndarray, upper: np.ndarray, device: torch.device | str) -> None:
        """Begin with nothing.

        Args:
            lower: (width,) least activation of each neuron.
            upper: (width,) largest one.
            device: where activations will be.
        """
        self._lower = torch.from_numpy(lower.astype(np.float64)).to(device)
        span = torch.from_numpy(upper.astype(np.float64)).to(device) - self._lower
        # A neuron that never changes fills its lowest bin.
        self._scale = torch.where(span > 0, NUM_BINS / span, 0.0)
        self._starts = torch.arange(len(lower), device=device) * NUM_BINS
        self._counts = torch.zeros(len(lower) * NUM_BINS, dtype=torch.int64, device=device)

    def add(self, z: Tensor, counted: Tensor | None) -> None:
        """Count activations.

        Args:
            z: (positions, width), any floating dtype.
            counted: (C,) int64 on the CPU, the positions that count; all if not given.
        """
        rows = z if counted is None else z.index_select(0, counted.to(z.device))
        bins = ((rows.double() - self._lower) * self._scale).long().clamp_(0, NUM_BINS - 1)
        self._counts += torch.bincount((bins + self._starts).flatten(), minlength=len(self._counts))

    def counts(self) -> np.ndarray:
        """(width, 100) int64."""
        found: np.ndarray = self._counts.cpu().numpy().reshape(-1, NUM_BINS)
        return found

    @staticmethod
    def peaks(counts: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """(width,) float64: centres of the fullest bins; of a neuron that never changes, its value.

        Args:
            counts: (width, 100), summed over whatever counted the same neurons.
            lower: (width,) bounds that the bins lie between.
            upper: (width,) the same.
        """
        low, span = lower.astype(np.float64), upper.astype(np.float64) - lower.astype(np.float64)
        # argmax takes the lowest of equally full bins.
        centres: np.ndarray = low + (counts.argmax(1) + 0.5) * span / NUM_BINS
        return centres
