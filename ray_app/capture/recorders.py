"""What is kept of the activations of a shard: each recorder makes one table of what it is shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_app.capture.moments import Reduction, make_accumulator
from ray_app.capture.shards import Batch, PlannedShard
from ray_app.models.sites import SiteLocation
from storage.pages import EncodedColumns

__all__ = ["Part", "Recorder", "SiteKey", "StatsRecorder", "neuron_columns"]

SiteKey = tuple[str, int]
"""(site, layer)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of one file that a stage writes of a shard."""

    table: str
    """Name of the table."""
    rows: pa.Table | Iterator[pa.RecordBatch]
    """Columns of the table; row groups one by one where there are too many rows to hold."""
    site: SiteKey | None = None
    """Whose rows they are, in tables with a file for each site and layer."""
    encoded: EncodedColumns | None = None
    """What the files of a shard have in common, as far as it is encoded."""


class Recorder(Protocol):
    """Reduces the activations of one shard in one stage."""

    def add(self, batch: Batch, site: SiteLocation, z: Tensor) -> None:
        """Take one batch's activations of one site and layer.

        Args:
            batch: the batch; batches come in the order of the plan.
            site: where they were read.
            z: (B * P, width) any floating dtype, on the stage's device: the positions of the
                padded batch, sample by sample. Not to be changed, nor kept without a copy.
        """

    def parts(self) -> Iterator[Part]:
        """What is to be written of the shard, once all its batches were added."""


class StatsRecorder:
    """Table ``stats``: sufficient statistics of every neuron."""

    def __init__(
        self,
        shard: PlannedShard,
        sites: Sequence[SiteLocation],
        device: torch.device,
        reduction: Reduction,
    ) -> None:
        """Begin a shard.

        Args:
            shard: the shard.
            sites: those of the stage, ordered by site, then layer.
            device: where activations lie.
            reduction: how they are reduced.

        Raises:
            NativeError: if reductions are compiled and cannot be built here.
        """
        self._shard = shard.shard
        self._sites = sites
        self._moments = {
            (site.site, site.layer): make_accumulator(site.width, device, reduction=reduction)
            for site in sites
        }

    def add(self, batch: Batch, site: SiteLocation, z: Tensor) -> None:
        """See `Recorder.add`."""
        self._moments[site.site, site.layer].add(z, batch.counted)

    def first_non_finite(self) -> tuple[SiteLocation, int] | None:
        """The first neuron whose sums are not finite, if there is one."""
        for site in self._sites:
            neuron = self._moments[site.site, site.layer].first_non_finite()
            if neuron is not None:
                return site, neuron
        return None

    def parts(self) -> Iterator[Part]:
        """One table, ordered by site, layer, neuron."""
        rows = [
            pa.table(
                neuron_columns(self._shard, site) | self._moments[site.site, site.layer].columns()
            )
            for site in self._sites
        ]
        if rows:
            yield Part(table="stats", rows=pa.concat_tables(rows))


def neuron_columns(shard: int, site: SiteLocation) -> dict[str, pa.Array]:
    """Columns that say which neuron a row is of, one row for each neuron of a site and layer."""
    neurons = np.arange(site.width, dtype=np.int32)
    head = pa.nulls(site.width, pa.int16())
    if site.head_dim is not None:
        head = pa.array(neurons // site.head_dim, pa.int16())
    return {
        "shard": pa.array(np.full(site.width, shard, dtype=np.int32)),
        "site": pa.array([site.site] * site.width),
        "layer": pa.array(np.full(site.width, site.layer, dtype=np.int16)),
        "neuron": pa.array(neurons),
        "head": head,
    }
