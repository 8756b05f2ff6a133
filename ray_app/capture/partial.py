"""What a stage holds of the shard that it computes, and the tables that come of it."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_app.capture.errors import CaptureError
from ray_app.capture.moments import Reduction, make_accumulator
from ray_app.capture.shards import Batch, PlannedShard, batches_of
from ray_app.models.prediction import Prediction
from ray_app.models.sites import SiteLocation

__all__ = ["ShardParts", "SiteKey"]

SiteKey = tuple[str, int]
"""(site, layer)."""


class ShardParts:
    """One shard in one stage: its batches, and what was reduced of them so far."""

    def __init__(
        self,
        shard: PlannedShard,
        samples: pa.Table,
        sites: Sequence[SiteLocation],
        device: torch.device,
        reduction: Reduction,
    ) -> None:
        self.shard = shard
        self.samples = samples
        self.batches = list(batches_of(samples))
        self.next_batch = 0
        self.predictions: list[Prediction] = []
        self.moments = {
            (site.site, site.layer): make_accumulator(site.width, device, reduction=reduction)
            for site in sites
        }

    def reader(self, batch: Batch) -> Callable[[SiteKey, Tensor], None]:
        """What the hooks call: add the counted positions of one site to its statistics."""
        counted = batch.counted

        def add(key: SiteKey, z: Tensor) -> None:
            rows = z.flatten(0, -2)
            if counted is not None:
                rows = rows.index_select(0, counted.to(rows.device))
            self.moments[key].add(rows)

        return add

    def stats_table(self, sites: Sequence[SiteLocation]) -> pa.Table:
        """Rows of table ``stats``, ordered by site, layer, neuron."""
        return pa.concat_tables([self._site_table(site) for site in sites])

    def _site_table(self, site: SiteLocation) -> pa.Table:
        moments = self.moments[site.site, site.layer]
        bad = moments.first_non_finite()
        if bad is not None:
            raise CaptureError(
                f"neuron {bad} of site {site.site!r}, layer {site.layer}, is NaN, infinite or too "
                f"large to square in shard {self.shard.shard} of task {self.shard.task!r}: the "
                "dtype may be too narrow for this model; try model.dtype: bfloat16 or float32."
            )
        neurons = np.arange(site.width, dtype=np.int32)
        head = pa.nulls(site.width, pa.int16())
        if site.head_dim is not None:
            head = pa.array(neurons // site.head_dim, pa.int16())
        return pa.table(
            {
                "shard": pa.array(np.full(site.width, self.shard.shard, dtype=np.int32)),
                "site": pa.array([site.site] * site.width),
                "layer": pa.array(np.full(site.width, site.layer, dtype=np.int16)),
                "neuron": pa.array(neurons),
                "head": head,
                **moments.columns(),
            }
        )

    def tokens_table(self) -> pa.Table:
        """Rows of table ``tokens``, samples in the order of computation."""
        for row, prediction in enumerate(self.predictions):
            bad = ~np.isfinite(prediction.loss)
            if bad.any():
                raise CaptureError(
                    f"the loss of sample {self.samples['sample'][row]}, position "
                    f"{bad.argmax() + 1}, of task {self.shard.task!r} is not finite: the model's "
                    "logits overflow; try model.dtype: bfloat16 or float32."
                )
        lengths = self.samples["num_tokens"].to_numpy()
        has_context = np.concatenate([np.arange(length) > 0 for length in lengths])

        def spread(values: list[np.ndarray], dtype: pa.DataType) -> pa.Array:
            column = np.zeros(len(has_context), dtype=values[0].dtype)
            column[has_context] = np.concatenate(values)
            return pa.array(column, dtype, mask=~has_context)

        flat = self.samples.select(["token_ids", "tokens", "is_special", "counted"])
        columns = {
            name: pa.concat_arrays([chunk.flatten() for chunk in flat[name].chunks])
            for name in flat.column_names
        }
        return pa.table(
            {
                "shard": pa.array(np.full(len(has_context), self.shard.shard, dtype=np.int32)),
                "sample": pa.array(np.repeat(self.samples["sample"].to_numpy(), lengths)),
                "position": pa.array(
                    np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
                ),
                "token_id": columns["token_ids"],
                "token": columns["tokens"],
                "is_special": columns["is_special"],
                "counted": columns["counted"],
                "loss": spread([p.loss for p in self.predictions], pa.float32()),
                "top1": spread([p.top1 for p in self.predictions], pa.bool_()),
                "top10": spread([p.top10 for p in self.predictions], pa.bool_()),
            }
        )
