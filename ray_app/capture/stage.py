"""A stage: a contiguous range of a model's layers, and what it writes of each shard.

A chain of stages makes the whole model. `Stage.step` runs one batch and returns what the next
stage takes in; every stage reads inputs and padding from the shard's file of samples, so that only
hidden states travel. `Stage.close` ends a shard and `Stage.write` writes its parts: they are
apart so that writing can go on while the next shard is computed. On a CPU, its files are encoded
between two batches, and wait for the disk or the network beside them. Calls must come in the order
of the plan; a stage that was restarted in the middle of a shard says so instead of writing half a
shard.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pyarrow as pa
import torch
from torch import Tensor, nn

from ray_app.capture.errors import CaptureError, ShardInterruptedError
from ray_app.capture.modality import UnreadableError, modality_of
from ray_app.capture.moments import make_accumulator
from ray_app.capture.partial import ShardParts
from ray_app.capture.recorders import Part, SiteKey
from ray_app.capture.shards import Batch, PlannedShard, batches_of
from ray_app.capture.spec import StageSpec
from ray_app.capture.values import ValuesMemory
from ray_app.models.hooks import read_inputs
from ray_app.models.loading import ModelFiles, load_stage, locate_model
from ray_app.models.parts import StageModel
from ray_app.models.sites import confirm_sites
from ray_app.study import ModelSettings
from storage import ActlakeError, FileRecord, StoreFiles, layout

__all__ = [
    "CaptureError",
    "Cores",
    "Stage",
    "StageSpec",
    "build_stage",
    "load_stage_model",
    "locate_planned",
]

_WAITING = 4
"""Files that may wait for the disk while others are encoded."""


def build_stage(spec: StageSpec, *, device: str = "cpu") -> "Stage":
    """Load the layers of a stage and confirm its sites on a probe batch.

    Raises:
        CaptureError: if the weights are not those of the plan.
        ModelError: if the model cannot be loaded or its sites do not behave.
        NativeError: if reductions are compiled and cannot be built here.
    """
    # What cannot be built here is known before the weights are read.
    make_accumulator(1, device, reduction=spec.reduction)
    model = load_stage_model(spec, device=device)
    return Stage(model, spec, StoreFiles(spec.store))


def load_stage_model(spec: StageSpec, *, device: str = "cpu") -> StageModel:
    """The model of a stage, with its sites confirmed; errors as `build_stage`."""
    torch.set_num_threads(spec.threads)
    files = locate_planned(spec.model, spec.fingerprint)
    stage = load_stage(spec.model, files, range(spec.start, spec.stop), device=device)
    confirm_sites(stage.model, list(spec.sites), stage.architecture, run=stage.probe)
    return stage


def locate_planned(settings: ModelSettings, fingerprint: str) -> ModelFiles:
    """The files of a run's model.

    Args:
        settings: which model.
        fingerprint: the weights that the run was planned with.

    Raises:
        CaptureError: if the weights are others now.
        ModelError: if they are not there.
    """
    files = locate_model(settings)
    if files.fingerprint != fingerprint:
        raise CaptureError(
            f"the weights of {settings.source!r} differ from those the run was planned with "
            f"({files.fingerprint[:20]}, planned {fingerprint[:20]}): restore them, or start a new "
            "run."
        )
    return files


class Cores:
    """The cores that a stage has, for its batches and for the files that it encodes.

    The threads of a batch wait for each other after every operation: while one of them has no core,
    the others spin. So a batch has all cores, or waits until no file wants one.
    """

    def __init__(self, count: int) -> None:
        """All of them are free.

        Args:
            count: how many there are.
        """
        self._count = self._free = count
        self._waiting = 0
        self._changed = threading.Condition()

    @contextmanager
    def all(self) -> Iterator[None]:
        """Have all cores until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._free == self._count and not self._waiting)
            self._free = 0
        try:
            yield
        finally:
            self._give(self._count)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Have one core until the block ends; comes before whoever waits for all."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._free > 0)
            self._waiting -= 1
            self._free -= 1
        try:
            yield
        finally:
            self._give(1)

    def _give(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()


class Stage:
    """Runs batches, reduces activations as they appear, and writes the parts of each shard."""

    def __init__(self, model: StageModel, spec: StageSpec, files: StoreFiles) -> None:
        self._model = model
        self._spec = spec
        self._modality = modality_of(model.architecture, compiled=spec.reduction == "compiled")
        self._modules: dict[SiteKey, nn.Module] = {
            (site.site, site.layer): model.model.get_submodule(site.module) for site in spec.sites
        }
        self._files = files
        self._memory = ValuesMemory()
        self._cores = Cores(spec.threads)
        self._open: ShardParts | None = None
        self._closed: dict[tuple[str, int], ShardParts] = {}

    def step(self, shard: PlannedShard, index: int, hidden: Tensor | None = None) -> int | Tensor:
        """Run one batch of a shard.

        Args:
            shard: the shard.
            index: index of the batch; 0 opens the shard and drops any other that was open.
            hidden: (B, P, width) hidden states from the stage before; None for the first stage.

        Returns:
            Hidden states for the next stage, on the CPU; of the last stage, the number of tokens.
            0 in all stages if all samples of the batch were set aside.

        Raises:
            ShardInterruptedError: if the batch is not the next one of the open shard.
            SampleError: if samples of the batch fail.
            CaptureError: if memory ran out.
            DamagedFileError: if the shard's inputs were altered since the run began.
        """
        if index == 0:
            samples = self._files.get_recorded_table(shard.samples)
            with self._enough_memory(shard, "where it begins"):
                self._open = ShardParts(
                    shard,
                    samples,
                    self._spec,
                    modality=self._modality,
                    device=self._model.device,
                    memory=self._memory,
                )
        opened = self._opened(shard, index)
        batch = opened.batches.get(index)
        # Batches that a GPU computes leave the cores to the files.
        with self._cores.all() if self._model.device.type == "cpu" else nullcontext():
            result = 0 if batch is None else self._try(opened, batch, hidden)
        opened.next_batch += 1
        return result

    def close(self, shard: PlannedShard) -> None:
        """End a shard: the next batch may be of another one.

        Raises:
            ShardInterruptedError: if batches are missing.
            SampleError: if an activation or a loss was not finite.
        """
        opened = self._opened(shard, shard.num_batches)
        self._open = None
        # Statistics come first: where a neuron is not finite, they name it.
        opened.check()
        self._closed[shard.key] = opened

    def write(self, shard: PlannedShard) -> list[FileRecord]:
        """Write the parts of a closed shard and describe them; may run beside `step`.

        It must be closed in all stages before one of them writes: if samples fail in one stage,
        none may leave parts that hold them.

        Raises:
            ShardInterruptedError: if the shard is not closed.
            CaptureError: if an activation is too large for the encoding of raw values, or memory
                ran out.
            StoreError: if the store cannot be written.
        """
        closed = self._closed.pop(shard.key, None)
        if closed is None:
            raise _interrupted(shard, "its end")
        with self._enough_memory(shard, "while it was written"):
            with self._cores.one():
                parts = self._parts(closed)
            # Each takes a core while it is encoded, and none while it waits for the disk. What is
            # sent over a network may be held in memory.
            waiting = 0 if self._files.is_remote else _WAITING
            with ThreadPoolExecutor(self._spec.threads + waiting) as pool:
                return list(pool.map(self._put, parts, parts.values()))

    def _parts(self, closed: ShardParts) -> dict[str, Part]:
        """The files of a shard, by path."""
        # All are made before one is written, but for raw values, which are too many.
        run, place = self._spec.run, closed.shard.key
        parts: dict[str, Part] = {}
        for part in closed.parts():
            if part.site is None:
                path = layout.part_path(run, part.table, *place, self._spec.index)
            else:
                path = layout.values_path(run, closed.shard.task, *part.site, closed.shard.shard)
            parts[path] = part
        if self._model.is_last:
            for name, table in closed.prediction_tables().items():
                parts[layout.table_path(run, name, *place)] = Part(table=name, rows=table)
            if closed.set_aside:
                quarantined = Part(table="quarantine", rows=closed.quarantine_table())
                parts[layout.quarantine_path(run, *place)] = quarantined
        return parts

    def _put(self, path: str, part: Part) -> FileRecord:
        core = self._cores.one()
        if isinstance(part.rows, pa.Table):
            return self._files.put_table(path, part.table, part.rows, computing=core)
        return self._files.put_batches(
            path, part.table, part.rows, encoded=part.encoded, computing=core
        )

    def drop(self, shard: PlannedShard) -> None:
        """Forget a shard that is not to be written, because another stage could not close it."""
        self._closed.pop(shard.key, None)

    def finish(self, shard: PlannedShard) -> list[FileRecord]:
        """`close` and `write`."""
        self.close(shard)
        return self.write(shard)

    def _try(self, opened: ShardParts, batch: Batch, hidden: Tensor | None) -> int | Tensor:
        try:
            return self._compute(opened, batch, hidden)
        except ActlakeError:
            raise
        except UnreadableError as error:
            raise opened.failure(batch, error.failing) from error
        except Exception as error:
            if _is_out_of_memory(error):
                raise self._out_of_memory_of(opened.shard, batch) from error
            # What a GPU raises once, it raises for everything that comes after.
            if isinstance(error, torch.AcceleratorError):
                raise
            failing = self._raising_alone(opened.shard, batch, hidden)
            if not failing:
                raise
            raise opened.failure(batch, failing) from error

    def _raising_alone(
        self, shard: PlannedShard, batch: Batch, hidden: Tensor | None
    ) -> dict[int, str]:
        """What the model raises for samples of a batch that are computed alone, by row."""
        failing = {}
        for row, length in enumerate(batch.lengths.tolist()):
            (alone,) = batches_of(batch.rows.slice(row, 1))
            inputs = self._modality.inputs(alone, is_first=self._model.is_first)
            entering = None if hidden is None else hidden[row : row + 1, :length]
            try:
                with torch.inference_mode():
                    self._model.run(inputs, None, entering)
            except Exception as error:
                if _is_out_of_memory(error):
                    raise self._out_of_memory_of(shard, batch) from error
                failing[row] = f"the model raised {type(error).__name__}: {_one_line(error)}"
        return failing

    def _compute(self, opened: ShardParts, batch: Batch, hidden: Tensor | None) -> int | Tensor:
        with torch.inference_mode():
            inputs = self._modality.inputs(batch, is_first=self._model.is_first)
            with read_inputs(self._modules, opened.reader(batch)):
                output = self._model.run(inputs, batch.attention_mask, hidden)
            if not self._model.is_last:
                return output.cpu()
            opened.score(batch, self._modality.score(batch, inputs, output))
        return batch.num_tokens

    @contextmanager
    def _enough_memory(self, shard: PlannedShard, place: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            raise self._out_of_memory(shard, place, setting="capture.shard_tokens") from error

    def _out_of_memory_of(self, shard: PlannedShard, batch: Batch) -> CaptureError:
        # A smaller batch would fit, but sums over another shape round differently, and quantised
        # maps see another range: what a shard holds would depend on who else used the memory.
        num_samples, longest = batch.shape
        place = f"at its batch {batch.index} ({num_samples} samples of at most {longest} tokens)"
        return self._out_of_memory(shard, place, setting="capture.batch_tokens")

    def _out_of_memory(self, shard: PlannedShard, place: str, *, setting: str) -> CaptureError:
        layers = self._model.layers
        return CaptureError(
            f"memory ran out in layers {layers.start} to {layers.stop - 1} on "
            f"{self._model.device}, of shard {shard.shard} of task {shard.task!r} {place}: raise "
            "resources.stages and run the same command again, which keeps the committed shards, or "
            f"lower {setting} and pass --new-run."
        )

    def _opened(self, shard: PlannedShard, next_batch: int) -> ShardParts:
        opened = self._open
        if opened is None or opened.shard.key != shard.key or opened.next_batch != next_batch:
            raise _interrupted(shard, f"batch {next_batch}")
        return opened


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator for CPUs has no error type of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _interrupted(shard: PlannedShard, place: str) -> ShardInterruptedError:
    return ShardInterruptedError(
        f"shard {shard.shard} of task {shard.task!r} was interrupted before {place}: it must be "
        "computed again from its first batch"
    )
