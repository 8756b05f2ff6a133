"""Which neurons of a layer are active together: counts and products of all pairs."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_app.capture.recorders import Part, SiteKey, neuron_columns
from ray_app.capture.shards import Batch, PlannedShard
from ray_app.models.sites import SiteLocation

__all__ = ["CoactivationRecorder"]


class _Pairs:
    """Sums over the positions of one site and layer.

    Deviations from a pivot, the mean of the first batch, are multiplied in float32 and summed in
    float64: a mean far from zero costs the products no accuracy.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self._pivot = torch.zeros(width, dtype=torch.float64, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._product = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._together = torch.zeros(width, width, dtype=torch.int32, device=device)

    def add(self, z: Tensor) -> None:
        """Add activations (positions, width) of any floating dtype."""
        if self.count == 0:
            self._pivot = z.sum(0, dtype=torch.float64) / len(z)
        about = z.float() - self._pivot.float()
        self._sum += about.sum(0, dtype=torch.float64)
        self._product += about.T @ about
        # Whole numbers below 2**24 are exact in float32.
        active = (z > 0).float()
        self._together += (active.T @ active).int()
        self.count += len(z)

    def together(self) -> np.ndarray:
        """(width, width) int32: positions at which both neurons are above zero."""
        return self._together.cpu().numpy()

    def product(self) -> np.ndarray:
        """(width, width) float64: sum of z_a z_b."""
        # The pivot that was subtracted is the rounded one.
        pivot = self._pivot.float().double()
        mixed = torch.outer(pivot, self._sum)
        # What the two orders of a pair are off by is rounding, of blocks that were added otherwise.
        about = (self._product + self._product.T) / 2 + (mixed + mixed.T)
        return (about + self.count * torch.outer(pivot, pivot)).cpu().numpy()


class CoactivationRecorder:
    """Table ``coactivation``, of chosen sites and layers."""

    def __init__(
        self, shard: PlannedShard, sites: Sequence[SiteLocation], device: torch.device
    ) -> None:
        """Begin a shard.

        Args:
            shard: the shard.
            sites: those of the stage that are chosen, ordered by site, then layer.
            device: where activations lie.
        """
        self._shard = shard.shard
        self._sites = sites
        self._pairs: dict[SiteKey, _Pairs] = {
            (site.site, site.layer): _Pairs(site.width, device) for site in sites
        }

    def add(self, batch: Batch, site: SiteLocation, z: Tensor) -> None:
        """See `Recorder.add`."""
        pairs = self._pairs.get((site.site, site.layer))
        if pairs is not None:
            counted = z if batch.counted is None else z.index_select(0, batch.counted.to(z.device))
            pairs.add(counted)

    def parts(self) -> Iterator[Part]:
        """One table, ordered by site, layer, neuron."""
        if self._sites:
            rows = pa.concat_tables([self._site_table(site) for site in self._sites])
            yield Part(table="coactivation", rows=rows)

    def _site_table(self, site: SiteLocation) -> pa.Table:
        pairs, width = self._pairs[site.site, site.layer], site.width
        offsets = pa.array(np.arange(width + 1, dtype=np.int32) * width)

        def lists(matrix: np.ndarray) -> pa.Array:
            return pa.ListArray.from_arrays(offsets, pa.array(matrix.reshape(-1)))

        return pa.table(
            neuron_columns(self._shard, site)
            | {
                "n": pa.array(np.full(width, pairs.count)),
                "together": lists(pairs.together()),
                "product": lists(pairs.product()),
            }
        )
