"""The plan of a run: which samples form which shard, what it will cost, and whether it fits."""

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc

from ray_app.capture.shards import PlannedShard
from ray_app.encoders import open_encoder
from ray_app.facts import ModelFacts, inspect_model
from ray_app.hours import Hours, estimate_hours
from ray_app.kept import Kept, Work, kept_things, within_budget
from ray_app.placement import (
    PlanError,
    gib,
    host_bytes,
    planned_nodes,
    stage_bytes,
    stage_ranges,
)
from ray_app.sampling import TaskDraw, draw_task, open_all_documents
from ray_app.study import CaptureSettings, Study, StudyError
from storage import SCHEMA_VERSION, FileRecord

__all__ = [
    "Costs",
    "ModelFacts",
    "Plan",
    "PlanError",
    "StageCosts",
    "check_fits",
    "gib",
    "identity_of",
    "inspect_model",
    "make_plan",
    "outline_plan",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCosts:
    """What the actor of one stage takes."""

    layers: range
    """Its layers."""
    num_bytes: int
    """Memory where it computes, estimated: of its GPUs, or main memory."""
    host_bytes: int
    """Main memory, estimated; the same if it computes on CPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What carrying out a plan takes."""

    kept: tuple[Kept, ...]
    """What is written, thing by thing."""
    stages: tuple[StageCosts, ...]
    """The stages of one replica."""
    hours: Hours
    """How long it takes, roughly."""
    replicas: int
    """Number of replicas."""
    free_disk: int | None
    """Free bytes where the store is or will be; None on an object store, which has no bound."""
    available_memory: int
    """Memory that this machine can give now."""

    @property
    def num_files(self) -> int:
        """Files in the store."""
        return sum(thing.num_files for thing in self.kept)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, estimated."""
        return sum(thing.num_bytes for thing in self.kept)

    @property
    def host_bytes(self) -> int:
        """Main memory of all stages of all replicas."""
        return self.replicas * sum(stage.host_bytes for stage in self.stages)


@dataclass(slots=True)
class Plan:
    """Everything that is decided before a run begins."""

    study: Study
    """The study."""
    model: ModelFacts
    """The model."""
    tasks: dict[str, TaskDraw] = field(default_factory=dict)
    """What each task yielded."""
    shards: list[PlannedShard] = field(default_factory=list)
    """All shards, task by task."""
    why_outlined: str | None = None
    """Why no samples were drawn, so that counts are reckoned; None if they were."""

    def notes(self) -> Iterator[str]:
        """What the study asks for and its documents do not give."""
        for name, draw in self.tasks.items():
            wanted = self.study.tokens_of(name)
            if draw.num_counted < wanted:
                yield (
                    f"note: the documents of {name} end at {draw.num_counted:,} of the {wanted:,} "
                    "counted tokens asked for"
                )
            members = self.study.tasks[name].mixture or ()
            parts = {member: draw.members[member] for member in members}
            if parts and max(parts.values()) - min(parts.values()) > 1:
                found = ", ".join(f"{member} {count}" for member, count in parts.items())
                yield (
                    f"note: {name} is no mixture of equal parts, because documents ran out; "
                    f"those it has are {found}"
                )

    def kept(self) -> CaptureSettings:
        """What the run keeps: what the study asks for, as far as its budget holds it.

        Raises:
            PlanError: if the budget is too small for what must fit.
        """
        # As if each layer were a stage: what is kept must not depend on the machine.
        return within_budget(self.study.capture, self._work(self.model.num_layers))

    def costs(self, free_bytes: int | None) -> Costs:
        """Estimate what the plan takes, and what there is of it.

        Args:
            free_bytes: what the store can still hold; None if it has no bound.

        Raises:
            PlanError: as `kept`.
        """
        study = self.study.model_copy(update={"capture": self.kept()})
        nodes = planned_nodes(study)
        cut = stage_ranges(self.study, self.model, nodes)
        tokens = sum(shard.num_tokens for shard in self.shards)
        return Costs(
            kept=tuple(kept_things(study.capture, self._work(len(cut)))),
            stages=tuple(self._stage_costs(study, layers, len(cut)) for layers in cut),
            hours=estimate_hours(study, self.model, cut, nodes, tokens),
            replicas=self.study.resources.replicas,
            free_disk=free_bytes,
            available_memory=psutil.virtual_memory().available,
        )

    def _work(self, num_stages: int) -> Work:
        return Work(
            model=self.model,
            shards=self.shards,
            num_image_bytes=sum(draw.num_image_bytes for draw in self.tasks.values()),
            num_stages=num_stages,
        )

    def _stage_costs(self, study: Study, layers: range, num_stages: int) -> StageCosts:
        samples = max((shard.num_samples for shard in self.shards), default=0)
        sizes = {"num_stages": num_stages, "shard_samples": samples}
        num_bytes = stage_bytes(study, self.model, layers, **sizes)
        on_gpu = study.resources.gpus_per_stage > 0
        beside = host_bytes(study, self.model, layers, **sizes) if on_gpu else num_bytes
        return StageCosts(layers=layers, num_bytes=num_bytes, host_bytes=beside)


def make_plan(
    study: Study,
    model: ModelFacts,
    *,
    write: Callable[[str, int, pa.Table], FileRecord] | None = None,
    on_task: Callable[[str], None] = lambda task: None,
) -> Plan:
    """Draw all samples and pack them into shards; the same study gives the same plan.

    Args:
        study: the study.
        model: from `inspect_model`.
        write: writes the table ``samples`` of (task, shard) and describes the file; without it
            the samples are counted and dropped.
        on_task: called with the name of each task before it is drawn.

    Raises:
        StudyError: if a task yields nothing.
    """
    encoder = open_encoder(study, model)
    plan = Plan(study, model)
    streams = open_all_documents(study, model.architecture.modality)
    by_task: dict[str, list[PlannedShard]] = {name: [] for name in study.tasks}
    # Mixtures come last because they take what the others leave, and by name so that the order
    # of tasks in the file does not matter.
    for name in sorted(study.tasks, key=lambda name: (study.tasks[name].mixture is not None, name)):
        on_task(name)

        def on_shard(shard: int, table: pa.Table, name: str = name) -> None:
            record = _NOT_WRITTEN if write is None else write(name, shard, table)
            by_task[name].append(_planned(name, shard, table, record))

        plan.tasks[name] = draw_task(name, study, streams[name], encoder, on_shard)
        _require_samples(name, study, plan.tasks[name])
    plan.tasks = {name: plan.tasks[name] for name in study.tasks}
    plan.shards = [shard for shards in by_task.values() for shard in shards]
    return plan


def outline_plan(study: Study, model: ModelFacts, why: str) -> Plan:
    """A plan without samples, from what the study asks for.

    Samples are taken to be as long as they may be. Texts are shorter in truth, so that their shards
    are closed earlier, by up to the length of a sample: such shards are reckoned with. Images are
    all of one length; their bytes are not known.

    Args:
        study: the study.
        model: from `outline_model`.
        why: why no samples are drawn.
    """
    plan = Plan(study, model, why_outlined=why)
    is_text = model.architecture.modality == "language"
    longest = study.capture.max_length if is_text else model.architecture.num_probed
    # What a shard surely holds: whole images, or texts until none as long as allowed fits.
    shard_tokens = study.capture.shard_tokens
    room = shard_tokens - longest + 1 if is_text else shard_tokens // longest * longest
    for name in study.tasks:
        num_samples = ceil(study.tokens_of(name) / longest)
        num_tokens = study.tokens_of(name) if is_text else num_samples * longest
        plan.tasks[name] = TaskDraw(
            num_samples=num_samples,
            num_tokens=num_tokens,
            num_counted=num_tokens,
            num_shards=min(num_samples, ceil(num_tokens / max(room, longest))),
        )
        plan.shards += _even_shards(name, plan.tasks[name], study.capture.batch_tokens)
    return plan


def check_fits(costs: Costs) -> None:
    """Refuse a plan that this machine cannot carry out.

    Raises:
        PlanError: if the disk or the memory is too small.
    """
    if costs.free_disk is not None and costs.num_bytes > costs.free_disk:
        raise PlanError(
            f"the run needs about {gib(costs.num_bytes)} on disk, and {gib(costs.free_disk)} are "
            "free where the store is: choose another store, or lower capture.tokens or the number "
            "of layers, or raise capture.shard_tokens."
        )
    needed = costs.host_bytes
    # On a cluster it is not this machine that carries the model; `place` looks at those that do.
    if needed > costs.available_memory and "RAY_ADDRESS" not in os.environ:
        raise PlanError(
            f"{costs.replicas} replica(s) need about {gib(needed)} of memory, and "
            f"{gib(costs.available_memory)} are available: lower resources.replicas or "
            "capture.batch_tokens, or capture.shard_tokens where raw values are kept, or choose a "
            "narrower model.dtype."
        )


def identity_of(study: Study, model: ModelFacts) -> dict[str, Any]:
    """All settings that affect a run's data, as nested JSON-ready values.

    Resources, analyses and evaluations are left out: they change how fast a run is and what is made
    of it.
    """
    modality = model.architecture.modality
    software = ["torch", "transformers"]
    if modality == "image":
        software += ["timm", "torchvision", "pillow"]
    if study.model.quantization != "none":
        software.append("bitsandbytes")
    special = "include" if study.capture.counts_special(modality) else "exclude"
    return {
        "schema_version": SCHEMA_VERSION,
        "seed": study.seed,
        "model": study.model.model_dump(mode="json", exclude_defaults=True, exclude={"shape"})
        | {"fingerprint": model.files.fingerprint},
        "tasks": {
            name: task.model_dump(
                mode="json", exclude_defaults=True, by_alias=True, exclude={"evaluation"}
            )
            for name, task in study.tasks.items()
        },
        # How many samples may be set aside decides when a run stops, not what it holds.
        "capture": study.capture.model_dump(mode="json", exclude={"max_quarantined"})
        | {"special_tokens": special},
        "software": {name: importlib.metadata.version(name) for name in software},
    }


_NOT_WRITTEN = FileRecord(path="", table="samples", rows=0, bytes=0, sha256="")


def _planned(task: str, shard: int, table: pa.Table, record: FileRecord) -> PlannedShard:
    return PlannedShard(
        task=task,
        shard=shard,
        num_samples=table.num_rows,
        num_tokens=pc.sum(table["num_tokens"]).as_py(),
        num_counted=pc.sum(table["num_counted"]).as_py(),
        num_batches=pc.max(table["batch"]).as_py() + 1,
        samples=record,
    )


def _even_shards(task: str, draw: TaskDraw, batch_tokens: int) -> Iterator[PlannedShard]:
    """Shards that share a task's samples and tokens evenly."""
    for shard in range(draw.num_shards):
        samples, tokens = (
            count * (shard + 1) // draw.num_shards - count * shard // draw.num_shards
            for count in (draw.num_samples, draw.num_tokens)
        )
        yield PlannedShard(
            task=task,
            shard=shard,
            num_samples=samples,
            num_tokens=tokens,
            num_counted=tokens,
            num_batches=ceil(tokens / batch_tokens),
            samples=_NOT_WRITTEN,
        )


def _require_samples(name: str, study: Study, draw: TaskDraw) -> None:
    if draw.num_counted > 0:
        return
    task = study.tasks[name]
    if task.mixture is not None and draw.num_documents == 0:
        raise StudyError(
            f"tasks.{name} has no documents, because its members ({', '.join(task.mixture)}) use "
            "all of theirs themselves: lower capture.tokens, or add documents to them."
        )
    if task.filter and draw.num_documents == 0:
        raise StudyError(f"tasks.{name}: no row passes its filter: correct the filter.")
    why = "after its filter " if task.filter else ""
    raise StudyError(
        f"tasks.{name} has no tokens {why}({draw.num_documents} documents were read, "
        f"{draw.num_empty} of them empty): correct its source{' or filter' if task.filter else ''}."
    )
