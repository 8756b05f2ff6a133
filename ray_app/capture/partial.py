"""What a stage holds of the shard that it computes, and the tables that come of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ray_app.capture.coactivation import CoactivationRecorder
from ray_app.capture.errors import SampleError
from ray_app.capture.modality import Modality
from ray_app.capture.pooled import PooledRecorder
from ray_app.capture.recorders import Part, Recorder, SiteKey, StatsRecorder
from ray_app.capture.shards import Batch, CheckedShard, PlannedShard, SetAside, batches_of
from ray_app.capture.spec import StageSpec
from ray_app.capture.top import TopRecorder
from ray_app.capture.values import ChosenPositions, ValuesMemory, ValuesRecorder
from ray_app.models.prediction import Prediction
from storage.schema import TABLES

__all__ = ["ShardParts"]

_LARGEST = 2.0**59
"""Magnitude up to which the squared deviations of a block of 128 rows have a finite float32 sum."""
_NOT_FINITE = "is NaN, infinite or too large to square"
_TRY_DTYPE = "the dtype may be too narrow for this model; try model.dtype: bfloat16 or float32"
_OVERFLOW = "is not finite: the model's logits overflow; try model.dtype: bfloat16 or float32"


class ShardParts:
    """One shard in one stage: its batches, and what was reduced of them so far."""

    def __init__(
        self,
        shard: PlannedShard,
        samples: pa.Table,
        spec: StageSpec,
        modality: Modality,
        device: torch.device,
        memory: ValuesMemory,
    ) -> None:
        self.shard = shard
        self._modality = modality
        self._checks = isinstance(shard, CheckedShard)
        self.set_aside = shard.set_aside if isinstance(shard, CheckedShard) else ()
        left_out = pa.array([aside.sample for aside in self.set_aside], pa.int32())
        self.samples = samples.filter(pc.invert(pc.is_in(samples["sample"], left_out)))
        self.batches = {batch.index: batch for batch in batches_of(self.samples)}
        self.next_batch = 0
        self.predictions: list[Prediction] = []
        self._sites = {(site.site, site.layer): site for site in spec.sites}
        # Tables are ordered by site, layer, neuron.
        sites = [self._sites[key] for key in sorted(self._sites)]
        self._stats = StatsRecorder(shard, sites, device, spec.reduction)
        self._recorders: list[Recorder] = [self._stats]
        if spec.capture.pooled:
            indices = self.samples["sample"].to_numpy()
            self._recorders.append(PooledRecorder(shard, sites, indices, spec.capture.pooled))
        if spec.capture.coactivation is not None:
            chosen = [site for site in sites if spec.capture.coactivation.holds(site)]
            self._recorders.append(CoactivationRecorder(shard, chosen, device))
        if spec.capture.top:
            self._recorders.append(
                TopRecorder(shard, sites, self.samples, spec.capture.top, device, spec.reduction)
            )
        values = spec.capture.values
        if values is not None and values.keeps_task(shard.task):
            chosen_positions = ChosenPositions(
                shard, self.batches.values(), seed=spec.seed, share=values.share
            )
            kept = [site for site in sites if values.keeps(site.site, site.layer)]
            self._recorders.append(
                ValuesRecorder(
                    shard,
                    kept,
                    chosen_positions,
                    encoding=values.encoding,
                    reduction=spec.reduction,
                    memory=memory,
                )
            )

    def reader(self, batch: Batch) -> Callable[[SiteKey, Tensor], None]:
        """What the hooks call: give the activations of one site to all recorders."""

        def add(key: SiteKey, z: Tensor) -> None:
            rows = z.flatten(0, -2)
            if self._checks:
                self._check_rows(batch, key, rows)
            for recorder in self._recorders:
                recorder.add(batch, self._sites[key], rows)

        return add

    def score(self, batch: Batch, predictions: Sequence[Prediction]) -> None:
        """Keep how well a batch's samples were predicted.

        Raises:
            SampleError: if the samples are checked and a loss is not finite.
        """
        if self._checks:
            bad = [(row, ~np.isfinite(p.loss)) for row, p in enumerate(predictions)]
            failing = {
                row: f"the loss of {self._modality.place(where.argmax())} {_OVERFLOW}"
                for row, where in bad
                if where.any()
            }
            if failing:
                raise self.failure(batch, failing)
        self.predictions.extend(predictions)

    def failure(self, batch: Batch, failing: Mapping[int, str]) -> SampleError:
        """The error that says which samples of a batch fail.

        Args:
            batch: the batch.
            failing: why, by row of the batch.
        """
        found = []
        for row, error in sorted(failing.items()):
            sample = int(batch.samples[row])
            (known,) = self.samples.filter(pc.equal(self.samples["sample"], sample)).to_pylist()
            facts = {name: known[name] for name in ("source", "num_tokens", "num_counted")}
            found.append(SetAside(sample=sample, error=error, **facts))
        return SampleError(
            f"sample {found[0].sample} fails, because {found[0].error}", tuple(found)
        )

    def check(self) -> None:
        """Look whether everything that was reduced is finite.

        Raises:
            SampleError: if something is not; which sample it was is not known here.
        """
        place = f"shard {self.shard.shard} of task {self.shard.task!r}"
        if (found := self._stats.first_non_finite()) is not None:
            site, neuron = found
            raise SampleError(
                f"neuron {neuron} of site {site.site!r}, layer {site.layer}, {_NOT_FINITE} in "
                f"{place}: {_TRY_DTYPE}."
            )
        for row, prediction in enumerate(self.predictions):
            bad = ~np.isfinite(prediction.loss)
            if bad.any():
                raise SampleError(
                    f"the loss of sample {self.samples['sample'][row]}, "
                    f"{self._modality.place(bad.argmax())}, of task {self.shard.task!r} "
                    f"{_OVERFLOW}."
                )

    def parts(self) -> Iterator[Part]:
        """What all recorders made of the shard."""
        for recorder in self._recorders:
            yield from recorder.parts()

    def prediction_tables(self) -> dict[str, pa.Table]:
        """Tables of the last stage by name: ``tokens``, and those of the modality."""
        further = self._modality.tables(self.samples, self.predictions)
        return {"tokens": self._tokens_table()} | {
            name: pa.table({"shard": self._shard_column(self.samples.num_rows)} | columns)
            for name, columns in further.items()
        }

    def _shard_column(self, num_rows: int) -> pa.Array:
        return pa.array(np.full(num_rows, self.shard.shard, dtype=np.int32))

    def _tokens_table(self) -> pa.Table:
        """Rows of table ``tokens``, samples in the order of computation."""
        if self.samples.num_rows == 0:
            return TABLES["tokens"].schema.empty_table()
        lengths = self.samples["num_tokens"].to_numpy()
        total = int(lengths.sum())
        flat = self.samples.select(["token_ids", "tokens", "is_special", "counted"])
        columns = {
            name: pa.concat_arrays([chunk.flatten() for chunk in flat[name].chunks])
            for name in flat.column_names
        }
        if len(columns["token_ids"]) == 0:  # Positions of images have none.
            columns["token_ids"] = pa.nulls(total, pa.int32())
        return pa.table(
            {
                "shard": self._shard_column(total),
                "sample": pa.array(np.repeat(self.samples["sample"].to_numpy(), lengths)),
                "position": pa.array(
                    np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
                ),
                "token_id": columns["token_ids"],
                "token": columns["tokens"],
                "is_special": columns["is_special"],
                "counted": columns["counted"],
            }
            | self._modality.token_columns(lengths, self.predictions)
        )

    def quarantine_table(self) -> pa.Table:
        """Rows of table ``quarantine``, ordered by sample."""
        columns = ("sample", "source", "error")
        return pa.table(
            {"shard": pa.array([self.shard.shard] * len(self.set_aside), pa.int32())}
            | {name: [getattr(aside, name) for aside in self.set_aside] for name in columns}
        )

    def _check_rows(self, batch: Batch, key: SiteKey, rows: Tensor) -> None:
        if batch.counted is not None:
            rows = rows.index_select(0, batch.counted.to(rows.device))
        # Written so that NaN is not sound either; float16 could not hold the bound.
        sound = rows.float().abs() <= _LARGEST
        if sound.all():
            return
        bad = (~sound.all(1)).nonzero().flatten()
        neurons = (~sound[bad]).int().argmax(1).tolist()
        places = bad.cpu() if batch.counted is None else batch.counted[bad.cpu()]
        failing: dict[int, str] = {}
        for place, neuron in zip(places.tolist(), neurons, strict=True):
            row, position = divmod(place, batch.shape[1])
            failing.setdefault(
                row,
                f"neuron {neuron} of site {key[0]!r}, layer {key[1]}, {_NOT_FINITE} at position "
                f"{position}: {_TRY_DTYPE}",
            )
        raise self.failure(batch, failing)
