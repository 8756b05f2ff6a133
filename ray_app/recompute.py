"""Computing samples of a finished run again, one by one, to check what the store says of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from ray_app.capture.modality import modality_of
from ray_app.capture.shards import Batch, PlannedShard, batches_of
from ray_app.capture.stage import CaptureError, load_stage_model
from ray_app.models.hooks import read_inputs
from ray_app.models.parts import StageModel
from ray_app.run import load_run
from storage import Store
from storage.sqlfiles import load_query

__all__ = ["RecomputeReport", "recompute_samples"]

_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
"""Largest difference that another batch shape may make: of a loss in nats, and of an activation
relative to the largest magnitude that its neuron showed in the shard."""

Extrema = dict[tuple[str, int], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class RecomputeReport:
    """How far samples computed alone are from what was committed in batches."""

    num_samples: int = 0
    """Samples computed."""
    num_tokens: int = 0
    """Their tokens."""
    num_top1_differences: int = 0
    """Predictions whose top-1 correctness differs; near-ties can."""
    largest_loss_difference: float = 0.0
    """Largest difference of a loss, in nats."""
    largest_excess: float = 0.0
    """Farthest that a counted activation lies outside its neuron's extrema, relative to them."""
    problems: list[str] = field(default_factory=list)
    """One sentence per sample beyond tolerance."""


def recompute_samples(
    store: Store, run: str, num_samples: int, *, on_sample: Callable[[], None] = lambda: None
) -> RecomputeReport:
    """Run samples spread evenly over the committed shards through the model, one at a time.

    Every loss must agree with the tables ``tokens`` and ``predictions``, and every counted
    activation must lie within the extrema of its neuron in the table ``stats``.

    Args:
        store: the store.
        run: id of the run.
        num_samples: number of samples; all if the run has fewer.
        on_sample: called after each sample.

    Raises:
        CaptureError: if nothing is committed yet, or the weights are not those of the run.
    """
    query = load_query("ray_app", "spread_samples").text
    samples = store.table(query, {"run": run, "count": num_samples}).to_pylist()
    if not samples:
        raise CaptureError(f"run {run!r} has no committed shards yet: capture first.")
    recorded = load_run(store, run)
    shards = {shard.key: shard for shard in recorded.shards}
    spec = recorded.stage_spec()
    model = load_stage_model(spec)
    modules = {(s.site, s.layer): model.model.get_submodule(s.module) for s in spec.sites}
    tolerance = _TOLERANCES[spec.model.dtype]
    report = RecomputeReport()
    for sample in samples:
        extrema = _extrema(store, run, sample)
        batch = _alone(store, shards[sample["task"], sample["shard"]], sample["sample"])
        loss, top1, excess = _compute(model, modules, batch, extrema)
        difference = float(np.abs(loss - np.array(sample["loss"], dtype=np.float32)).max(initial=0))
        report.num_samples += 1
        report.num_tokens += batch.num_tokens
        report.num_top1_differences += int((top1 != np.array(sample["top1"])).sum())
        report.largest_loss_difference = max(report.largest_loss_difference, difference)
        report.largest_excess = max(report.largest_excess, excess)
        # Written so that NaN is a problem too.
        if not (difference <= tolerance and excess <= tolerance):
            report.problems.append(
                f"sample {sample['sample']} of task {sample['task']!r} differs from what is "
                f"stored: a loss by {difference:.2g} nats, an activation by {excess:.2g} of its "
                f"neuron's range; the largest difference allowed for {spec.model.dtype} is "
                f"{tolerance:g}."
            )
        on_sample()
    return report


def _extrema(store: Store, run: str, sample: dict[str, Any]) -> Extrema:
    query = load_query("ray_app", "shard_extrema").text
    key = {"run": run, "task": sample["task"], "shard": sample["shard"]}
    return {
        (row["site"], row["layer"]): (torch.tensor(row["lowest"]), torch.tensor(row["highest"]))
        for row in store.table(query, key).to_pylist()
    }


def _alone(store: Store, shard: PlannedShard, sample: int) -> Batch:
    rows = store.files.get_table(shard.samples.path)
    (batch,) = batches_of(rows.filter(pc.equal(rows["sample"], sample)))
    return batch


def _compute(
    model: StageModel,
    modules: dict[tuple[str, int], nn.Module],
    batch: Batch,
    extrema: Extrema,
) -> tuple[np.ndarray, np.ndarray, float]:
    modality = modality_of(model.architecture)
    excesses = [0.0]

    def compare(key: tuple[str, int], z: Tensor) -> None:
        rows = z.flatten(0, -2).float()
        if batch.counted is not None:
            rows = rows.index_select(0, batch.counted)
        if len(rows):
            lowest, highest = extrema[key]
            scale = torch.maximum(lowest.abs(), highest.abs()).clamp_min(1e-6)
            outside = torch.maximum(rows.amax(0) - highest, lowest - rows.amin(0)) / scale
            excesses.append(float(outside.max()))

    with torch.inference_mode(), read_inputs(modules, compare):
        inputs = modality.inputs(batch, is_first=True)
        predictions = modality.score(batch, inputs, model.run(inputs, None, None))
    losses = [np.zeros(0, dtype=np.float32), *(p.loss for p in predictions)]
    top1 = [np.zeros(0, dtype=bool), *(p.top1 for p in predictions)]
    return np.concatenate(losses), np.concatenate(top1), float(np.max(excesses))
