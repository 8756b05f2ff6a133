"""One value per sample and neuron: activations pooled over the counted positions of each sample."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_app.capture.errors import CaptureError
from ray_app.capture.recorders import Part, SiteKey, neuron_columns
from ray_app.capture.shards import Batch, PlannedShard
from ray_app.models.sites import SiteLocation
from ray_app.study import Pooling

__all__ = ["PooledRecorder"]

_POOL: dict[Pooling, Callable[[Tensor], Tensor]] = {
    "max": lambda z: z.amax(0).float(),
    "mean": lambda z: (z.sum(0, dtype=torch.float64) / len(z)).float(),
}
"""(positions, width) to (width,) float32."""


class PooledRecorder:
    """Table ``pooled``."""

    def __init__(
        self,
        shard: PlannedShard,
        sites: Sequence[SiteLocation],
        samples: np.ndarray,
        pooled: Sequence[Pooling],
    ) -> None:
        """Begin a shard.

        Args:
            shard: the shard.
            sites: those of the stage, ordered by site, then layer.
            samples: (S,) int32 indices of its samples, in the order of computation.
            pooled: what is kept.

        Raises:
            CaptureError: if lists would be too long for Arrow's offsets.
        """
        widest = max((site.width for site in sites), default=0)
        if widest * len(samples) > np.iinfo(np.int32).max:
            raise CaptureError(
                f"shard {shard.shard} of task {shard.task!r} has {len(samples):,} samples, of "
                f"which pooled values of {widest:,} neurons are more than a table can hold: lower "
                "capture.shard_tokens and pass --new-run."
            )
        self._shard = shard.shard
        self._sites = sites
        self._samples = samples
        self._values: dict[SiteKey, dict[Pooling, list[np.ndarray]]] = {
            (site.site, site.layer): {name: [] for name in pooled} for site in sites
        }

    def add(self, batch: Batch, site: SiteLocation, z: Tensor) -> None:
        """See `Recorder.add`."""
        counted = z if batch.counted is None else z.index_select(0, batch.counted.to(z.device))
        # No sample is empty: the plan has none of which no position counts.
        samples = counted.split(batch.rows["num_counted"].to_pylist())
        for name, values in self._values[site.site, site.layer].items():
            values.extend(_POOL[name](rows).cpu().numpy() for rows in samples)

    def parts(self) -> Iterator[Part]:
        """One table, ordered by site, layer, neuron."""
        if self._sites:
            rows = pa.concat_tables([self._site_table(site) for site in self._sites])
            yield Part(table="pooled", rows=rows)

    def _site_table(self, site: SiteLocation) -> pa.Table:
        found, width = self._values[site.site, site.layer], site.width
        samples = np.broadcast_to(self._samples[:, None], (len(self._samples), width))
        offsets = pa.array(np.arange(width + 1, dtype=np.int32) * len(samples))

        def lists(rows: np.ndarray) -> pa.Array:
            """(S, width) as one list for each neuron."""
            return pa.ListArray.from_arrays(offsets, pa.array(rows.T.reshape(-1)))

        columns = {"sample": lists(samples)}
        for name in _POOL:
            columns[name] = pa.nulls(width, pa.list_(pa.float32()))
            if name in found:
                columns[name] = lists(np.array(found[name], dtype=np.float32).reshape(-1, width))
        return pa.table(neuron_columns(self._shard, site) | columns)
