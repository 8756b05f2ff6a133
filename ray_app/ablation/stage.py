"""A stage of a model that is run with neurons removed, and what it measures meanwhile.

It takes the calls of a capture's `Stage`, so the same workers, in this process or on Ray, feed it:
batches in order, then `close`, then `write`, which here gives measurements back and writes nothing.
One loaded model serves all trials; token batches are kept from trial to trial.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from analysis.evaluation import SampleScores
from ray_app.ablation.masks import Ablation, Histogram, ablated
from ray_app.capture.errors import CaptureError, ShardInterruptedError
from ray_app.capture.modality import UnreadableError, modality_of
from ray_app.capture.moments import MomentAccumulator, make_accumulator
from ray_app.capture.recorders import SiteKey
from ray_app.capture.shards import Batch, PlannedShard, batches_of
from ray_app.capture.stage import StageSpec, load_stage_model
from ray_app.models.hooks import read_inputs
from ray_app.models.parts import StageModel
from ray_app.models.prediction import Prediction
from storage import StoreFiles
from storage.schema import TABLES

__all__ = ["EvaluationSpec", "EvaluationStage", "OpenTrial", "Trial", "build_evaluation"]

Measure = Literal["predictions", "histograms", "moments", "inputs", "masses"]
"""The last two are those of `ray_app.ablation.routing_stage`."""

_KEPT_BYTES = 256 << 20
"""Inputs of the model that are kept between trials; decoding images costs more than reading ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec(StageSpec):
    """All that a worker needs to build a stage that evaluates."""

    common: tuple[int, ...] = ()
    """The most common tokens, which some accuracies leave out; see `EvaluationStage`."""
    bounds: Mapping[SiteKey, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Least and largest activation of each neuron, where histograms are asked for."""

    @classmethod
    def of(cls, spec: StageSpec, **more: Any) -> Self:
        """The spec of a capture's stage, and what evaluation needs besides."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(StageSpec)}, **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial(PlannedShard):
    """One shard of samples that is run through one ablated model: the unit of work and retry."""

    serial: int
    """What tells trials of one stage apart."""
    ablation: Ablation
    """What is removed."""
    measure: Measure
    """What is measured: how well samples are predicted, or what neurons do."""
    left_out: tuple[int, ...] = ()
    """Samples that the capture set aside."""

    @classmethod
    def of(cls, shard: PlannedShard, **more: Any) -> Self:
        """A trial over the samples of a shard."""
        return cls(**{f.name: getattr(shard, f.name) for f in fields(PlannedShard)}, **more)


def build_evaluation(spec: EvaluationSpec, *, device: str = "cpu") -> "EvaluationStage":
    """Load the layers of a stage; errors as `build_stage`."""
    return EvaluationStage(load_stage_model(spec, device=device), spec)


class OpenTrial:
    """The trial that is under way."""

    def __init__(self, trial: Trial, readers: dict[SiteKey, Any]) -> None:
        self.trial = trial
        self.readers = readers
        self.next_batch = 0
        self.scores: list[SampleScores] = []


class EvaluationStage:
    """Runs trials and measures.

    Predictions are those of counted positions, as in the view of a task's accuracy. A prediction is
    `uncommon` if the token to be predicted is not among the common ones of the spec.
    """

    def __init__(self, model: StageModel, spec: EvaluationSpec) -> None:
        self._model = model
        self._spec = spec
        self._modality = modality_of(model.architecture, compiled=spec.reduction == "compiled")
        self._modules: dict[SiteKey, nn.Module] = {
            (site.site, site.layer): model.model.get_submodule(site.module) for site in spec.sites
        }
        self._files = StoreFiles(spec.store)
        self._tables: dict[str, pa.Table] = {}
        self._batches: dict[tuple[Any, ...], list[Batch | None]] = {}
        self._inputs: dict[tuple[Any, ...], Tensor] = {}
        self._num_kept = 0
        self._open: OpenTrial | None = None
        self._closed: dict[int, OpenTrial] = {}

    def step(self, trial: Trial, index: int, hidden: Tensor | None = None) -> int | Tensor:
        """Run one batch with neurons removed; arguments and result as `Stage.step`.

        Raises:
            ShardInterruptedError: if the batch is not the next one of the open trial.
            CaptureError: if samples of the batch cannot be read.
            DamagedFileError: if the samples were altered since they were drawn.
        """
        if index == 0:
            self._open = OpenTrial(trial, self._readers(trial))
        opened = self._opened(trial, index)
        batch = self._batches_of(trial)[index]
        result = 0 if batch is None else self._compute(opened, batch, hidden)
        opened.next_batch += 1
        return result

    def close(self, trial: Trial) -> None:
        """End a trial: the next batch may be of another one."""
        opened = self._opened(trial, trial.num_batches)
        self._open = None
        self._closed[trial.serial] = opened

    def write(self, trial: Trial) -> list[Any]:
        """What a closed trial measured in this stage.

        Returns:
            Of predictions, a `SampleScores` from the last stage; of histograms, counts by (site,
            layer); of moments, rows of table ``stats``.

        Raises:
            ShardInterruptedError: if the trial is not closed.
        """
        closed = self._closed.pop(trial.serial, None)
        if closed is None:
            raise _interrupted(trial)
        return self._measured(closed)

    def drop(self, trial: Trial) -> None:
        """Forget a trial, because another stage could not close it."""
        self._closed.pop(trial.serial, None)

    def _compute(self, opened: OpenTrial, batch: Batch, hidden: Tensor | None) -> int | Tensor:
        inputs = self._inputs_of(opened.trial, batch)
        read = {key: self._modules[key] for key in opened.readers}
        with (
            torch.inference_mode(),
            self._edited(opened, batch),
            # Hooks run in the order of attachment: what is read is what is left.
            read_inputs(read, _adding(opened, batch)),
        ):
            output = self._model.run(inputs, batch.attention_mask, hidden)
            if not self._model.is_last:
                return output.cpu()
            if opened.trial.measure == "predictions":
                predictions = self._modality.score(batch, inputs, output)
                opened.scores.append(self._scores(batch, inputs, predictions))
        return batch.num_tokens

    def _edited(self, opened: OpenTrial, batch: Batch) -> AbstractContextManager[None]:
        """While the block runs, the model is that of the trial."""
        return ablated(self._modules, opened.trial.ablation, batch)

    def _measured(self, closed: OpenTrial) -> list[Any]:
        """What `write` gives back of a trial."""
        trial = closed.trial
        if trial.measure == "histograms":
            return [{key: reader.counts() for key, reader in closed.readers.items()}]
        if trial.measure == "moments":
            return [self._stats(trial, closed.readers)]
        return [SampleScores.join(closed.scores)] if self._model.is_last else []

    def _readers(self, trial: Trial) -> dict[SiteKey, Any]:
        """What reads the activations of which site and layer in a trial."""
        device = self._model.device
        if trial.measure == "histograms":
            return {
                key: Histogram(*self._spec.bounds[key], device)
                for key in self._modules.keys() & self._spec.bounds.keys()
            }
        if trial.measure == "moments":
            return {
                (site.site, site.layer): make_accumulator(
                    site.width, device, reduction=self._spec.reduction
                )
                for site in self._spec.sites
            }
        return {}

    def _scores(self, batch: Batch, inputs: Tensor, predictions: list[Prediction]) -> SampleScores:
        rows = batch.rows
        is_language = rows["token_ids"][0].is_valid
        kept, uncommon = [], []
        for row, prediction in enumerate(predictions):
            counts = np.ones(len(prediction.loss), dtype=bool)
            rare = np.zeros_like(counts)  # Classes are neither common nor uncommon.
            if is_language:
                counts = np.array(rows["counted"][row].as_py()[1:], dtype=bool)
                targets = inputs[row, 1 : 1 + len(counts)].cpu().numpy()
                rare = ~np.isin(targets, self._spec.common)
            kept.append(counts)
            uncommon.append(counts & rare)
        return SampleScores.of(
            samples=batch.samples,
            labels=rows["label_id"].fill_null(-1).to_numpy(),
            predictions=[(p.loss, p.top1, p.top10) for p in predictions],
            kept=kept,
            uncommon=uncommon,
        )

    def _stats(self, trial: Trial, readers: dict[SiteKey, MomentAccumulator]) -> pa.Table:
        parts = []
        for site in self._spec.sites:
            size, head_dim = site.width, site.head_dim
            heads = np.arange(size) // head_dim if head_dim else [None] * size
            columns = {
                "shard": pa.array([trial.shard] * size, pa.int32()),
                "site": pa.array([site.site] * size),
                "layer": pa.array([site.layer] * size, pa.int16()),
                "neuron": pa.array(np.arange(size, dtype=np.int32)),
                "head": pa.array(heads, pa.int16()),
            }
            parts.append(pa.table(columns | readers[site.site, site.layer].columns()))
        if not parts:
            return TABLES["stats"].schema.empty_table()
        return pa.concat_tables(parts).cast(TABLES["stats"].schema)

    def _batches_of(self, trial: Trial) -> list[Batch | None]:
        key = (trial.samples.path, trial.task, trial.shard, trial.left_out)
        if key not in self._batches:
            path = trial.samples.path
            if path not in self._tables:
                self._tables[path] = self._files.get_recorded_table(trial.samples)
            rows = self._tables[path]
            if "task" in rows.column_names:  # Evaluation samples of all tasks are in one file.
                is_task = pc.equal(rows["task"], trial.task)
                rows = rows.filter(pc.and_(is_task, pc.equal(rows["shard"], trial.shard)))
            left_out = pa.array(trial.left_out, pa.int32())
            rows = rows.filter(pc.invert(pc.is_in(rows["sample"], left_out)))
            found = {batch.index: batch for batch in batches_of(rows)}
            self._batches[key] = [found.get(index) for index in range(trial.num_batches)]
        return self._batches[key]

    def _inputs_of(self, trial: Trial, batch: Batch) -> Tensor:
        key = (trial.samples.path, trial.task, trial.shard, trial.left_out, batch.index)
        if key in self._inputs:
            return self._inputs[key]
        try:
            inputs = self._modality.inputs(batch, is_first=self._model.is_first)
        except UnreadableError as error:
            row, why = min(error.failing.items())
            raise CaptureError(
                f"the evaluation sample {batch.rows['source'][row]} of task {trial.task!r} cannot "
                f"be read: {why}; take it out of the data and draw anew."
            ) from error
        size = inputs.untyped_storage().nbytes()
        if self._num_kept + size <= _KEPT_BYTES:
            self._num_kept += size
            self._inputs[key] = inputs
        return inputs

    def _opened(self, trial: Trial, next_batch: int) -> OpenTrial:
        opened = self._open
        if opened is None or opened.trial.serial != trial.serial or opened.next_batch != next_batch:
            raise _interrupted(trial)
        return opened


def _adding(opened: OpenTrial, batch: Batch) -> Callable[[SiteKey, Tensor], None]:
    return lambda key, z: opened.readers[key].add(z.flatten(0, -2), batch.counted)


def _interrupted(trial: Trial) -> ShardInterruptedError:
    return ShardInterruptedError(
        f"a trial over shard {trial.shard} of task {trial.task!r} was interrupted: it must be "
        "computed again from its first batch"
    )
