"""A stage: a contiguous range of a model's layers, and what it writes of each shard.

For now one stage holds the whole model. Its calls are those that a chain of stages needs: `step`
runs one batch and returns what the next stage takes in (nothing, after the last), `finish` writes
the shard's parts. Calls must come in the order of the plan; a stage that was restarted in the
middle of a shard says so instead of writing half a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from ray_app.capture.moments import MomentAccumulator
from ray_app.capture.shards import Batch, PlannedShard, batches_of
from ray_app.models.hooks import read_inputs
from ray_app.models.loading import load_model, locate_model
from ray_app.models.prediction import Prediction, score_predictions
from ray_app.models.sites import SiteLocation, confirm_sites
from ray_app.study import ModelSettings
from storage import ActlakeError, FileRecord, StoreFiles, layout

__all__ = ["CaptureError", "Stage", "StageSpec", "build_stage", "load_stage_model"]

SiteKey = tuple[str, int]


class CaptureError(ActlakeError):
    """A capture cannot go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """All that a worker needs to build its stage; small, and the same for every replica."""

    store: str
    """Root of the store."""
    run: str
    """Id of the run."""
    index: int
    """Index of the stage in its pipeline."""
    model: ModelSettings
    """Which model."""
    fingerprint: str
    """The weights that the run was planned with."""
    sites: tuple[SiteLocation, ...]
    """Sites to capture in this stage."""
    threads: int
    """CPU threads; part of what makes results bit-identical."""


def build_stage(spec: StageSpec) -> "Stage":
    """Load the model of a stage and confirm its sites on a probe batch.

    Raises:
        CaptureError: if the weights are not those of the plan.
        ModelError: if the model cannot be loaded or its sites do not behave.
    """
    model = load_stage_model(spec)
    return Stage(model, spec.sites, StoreFiles(spec.store), run=spec.run, index=spec.index)


def load_stage_model(spec: StageSpec) -> nn.Module:
    """The model of a stage, with its sites confirmed; errors as `build_stage`."""
    torch.set_num_threads(spec.threads)
    files = locate_model(spec.model)
    if files.fingerprint != spec.fingerprint:
        raise CaptureError(
            f"the weights of {spec.model.source!r} differ from those the run was planned with "
            f"({files.fingerprint[:20]}, planned {spec.fingerprint[:20]}): restore them, or start "
            "a new run."
        )
    model = load_model(spec.model, files)
    confirm_sites(model, list(spec.sites))
    return model


class Stage:
    """Runs batches, reduces activations as they appear, and writes the parts of each shard."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[SiteLocation],
        files: StoreFiles,
        *,
        run: str,
        index: int = 0,
    ) -> None:
        self._model = model
        self._sites = sorted(sites, key=lambda site: (site.site, site.layer))
        self._modules: dict[SiteKey, nn.Module] = {
            (site.site, site.layer): model.get_submodule(site.module) for site in sites
        }
        self._files = files
        self._run = run
        self._index = index
        self._device = next(model.parameters()).device
        self._open: _OpenShard | None = None

    def step(self, shard: PlannedShard, index: int, hidden: Tensor | None = None) -> int:
        """Run one batch of a shard.

        Args:
            shard: the shard.
            index: index of the batch; 0 opens the shard and drops any other that was open.
            hidden: hidden states from the stage before; None for the first stage.

        Returns:
            Number of tokens of the batch.

        Raises:
            CaptureError: if the batch is not the next one of the open shard.
        """
        if hidden is not None:
            raise CaptureError("this stage holds the whole model and takes no hidden states.")
        if index == 0:
            self._open = _OpenShard(
                shard, self._files.get_table(shard.samples.path), self._sites, self._device
            )
        opened = self._opened(shard, index)
        batch = opened.batches[index]
        with torch.inference_mode(), read_inputs(self._modules, opened.reader(batch)):
            logits = self._forward(batch)
        with torch.inference_mode():
            for row, length in enumerate(batch.lengths.tolist()):
                ids = batch.token_ids[row, :length].to(logits.device)
                opened.predictions.append(score_predictions(logits[row, :length], ids))
        opened.next_batch += 1
        return batch.num_tokens

    def finish(self, shard: PlannedShard) -> list[FileRecord]:
        """Write the shard's parts and describe them.

        Raises:
            CaptureError: if batches are missing, or an activation or a loss was not finite.
        """
        opened = self._opened(shard, shard.num_batches)
        self._open = None
        # Statistics come first: where a neuron is not finite, they name it.
        stats = opened.stats_table(self._sites)
        tokens = opened.tokens_table()
        run, task, number = self._run, shard.task, shard.shard
        return [
            self._files.put_table(layout.tokens_path(run, task, number), "tokens", tokens),
            self._files.put_table(
                layout.stats_path(run, task, number, self._index), "stats", stats
            ),
        ]

    def _opened(self, shard: PlannedShard, next_batch: int) -> "_OpenShard":
        opened = self._open
        if opened is None or opened.shard.key != shard.key or opened.next_batch != next_batch:
            raise CaptureError(
                f"shard {shard.shard} of task {shard.task!r} was interrupted before batch "
                f"{next_batch}: it must be computed again from its first batch."
            )
        return opened

    def _forward(self, batch: Batch) -> Tensor:
        mask = batch.attention_mask
        output = self._model(
            input_ids=batch.token_ids.to(self._device),
            attention_mask=None if mask is None else mask.to(self._device),
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits


class _OpenShard:
    """What a stage holds of the shard that it is computing."""

    def __init__(
        self,
        shard: PlannedShard,
        samples: pa.Table,
        sites: Sequence[SiteLocation],
        device: torch.device,
    ) -> None:
        self.shard = shard
        self.samples = samples
        self.batches = list(batches_of(samples))
        self.next_batch = 0
        self.predictions: list[Prediction] = []
        self.moments = {
            (site.site, site.layer): MomentAccumulator(site.width, device) for site in sites
        }

    def reader(self, batch: Batch) -> Any:
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
