"""The plan of a run: which samples form which shard, what it will cost, and whether it fits."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ray_app.capture.shards import PlannedShard
from ray_app.models.loading import ModelFiles, load_config, load_tokenizer, locate_model
from ray_app.models.sites import SiteLocation, empty_model, find_sites
from ray_app.sampling import Encoder, TaskDraw, draw_task, open_all_documents
from ray_app.study import Study, StudyError
from storage import SCHEMA_VERSION, ActlakeError, FileRecord

__all__ = ["Costs", "ModelFacts", "Plan", "PlanError", "identity_of", "inspect_model", "make_plan"]

# Measured on SmolLM2-135M (README, "What it costs"): Parquet bytes per row after zstd.
_STATS_ROW_BYTES = 72
_TOKEN_BYTES = 13
_SAMPLE_TOKEN_BYTES = 7
_PROCESS_BYTES = 750 << 20
"""Resident memory of a Python process that has imported Ray, torch and transformers."""


class PlanError(ActlakeError):
    """A plan cannot be carried out on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What is known of a model without its weights."""

    files: ModelFiles
    """Where it is."""
    architecture: str
    """Class name in transformers."""
    num_layers: int
    """Number of layers."""
    num_parameters: int
    """Number of parameters."""
    vocabulary: int
    """Size of the vocabulary."""
    hidden: int
    """Width of the residual stream."""
    max_positions: int | None
    """Longest sample that the model can read, if it has a bound."""
    sites: tuple[SiteLocation, ...]
    """Sites that the study captures."""

    @property
    def num_neurons(self) -> int:
        """Neurons of all captured sites."""
        return sum(site.width for site in self.sites)


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What carrying out a plan takes."""

    num_files: int
    """Files in the store."""
    num_bytes: int
    """Bytes on disk, estimated."""
    actor_bytes: int
    """Resident memory of one replica, estimated."""
    replicas: int
    """Number of replicas."""
    free_disk: int | None
    """Free bytes where the store is or will be; None on an object store, which has no bound."""
    available_memory: int
    """Memory that this machine can give now."""


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

    def costs(self, free_bytes: int | None) -> Costs:
        """Estimate what the plan takes, and what there is of it.

        Args:
            free_bytes: what the store can still hold; None if it has no bound.
        """
        tokens = sum(draw.num_tokens for draw in self.tasks.values())
        stats_rows = len(self.shards) * self.model.num_neurons
        return Costs(
            num_files=4 * len(self.shards) + 2,
            num_bytes=stats_rows * _STATS_ROW_BYTES + tokens * (_TOKEN_BYTES + _SAMPLE_TOKEN_BYTES),
            actor_bytes=_actor_bytes(self.study, self.model),
            replicas=self.study.resources.replicas,
            free_disk=free_bytes,
            available_memory=psutil.virtual_memory().available,
        )


def inspect_model(study: Study) -> ModelFacts:
    """Read a model's configuration and find its sites, without loading weights.

    Raises:
        ModelError: if the model is not there or its structure is not recognised.
        StudyError: if layers or lengths do not fit the model.
    """
    files = locate_model(study.model)
    config = load_config(study.model, files)
    model = empty_model(config)
    text = config.get_text_config()
    by_hand = {str(site): pattern for site, pattern in study.model.site_modules.items()}
    facts = ModelFacts(
        files=files,
        architecture=type(model).__name__,
        num_layers=text.num_hidden_layers,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        sites=tuple(find_sites(model, config, by_hand=by_hand)),
    )
    _check_against_model(study, facts)
    layers = range(facts.num_layers) if study.capture.layers == "all" else study.capture.layers
    chosen = [s for s in facts.sites if s.layer in layers and s.site in study.capture.sites]
    return replace(facts, sites=tuple(chosen))


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
    encoder = Encoder(load_tokenizer(study.model, model.files), study.capture)
    plan = Plan(study, model)
    streams = open_all_documents(study)
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
    needed = costs.actor_bytes * costs.replicas
    if needed > costs.available_memory:
        raise PlanError(
            f"{costs.replicas} replica(s) need about {gib(needed)} of memory, and "
            f"{gib(costs.available_memory)} are available: lower resources.replicas or "
            "capture.batch_tokens, or choose a narrower model.dtype."
        )


def identity_of(study: Study, model: ModelFacts) -> dict[str, Any]:
    """All settings that affect a run's data, as nested JSON-ready values.

    Resources and analyses are left out: they change how fast a run is and what is made of it.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "seed": study.seed,
        "model": study.model.model_dump(mode="json", exclude_defaults=True)
        | {"fingerprint": model.files.fingerprint},
        "tasks": {
            name: task.model_dump(mode="json", exclude_defaults=True, by_alias=True)
            for name, task in study.tasks.items()
        },
        "capture": study.capture.model_dump(mode="json"),
        "software": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def gib(num_bytes: int) -> str:
    """A size for people."""
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):,.1f} MiB"
    return f"{num_bytes / (1 << 30):,.2f} GiB"


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


def _check_against_model(study: Study, model: ModelFacts) -> None:
    layers = study.capture.layers
    wrong = [] if layers == "all" else [n for n in layers if not 0 <= n < model.num_layers]
    if wrong:
        raise StudyError(
            f"capture.layers must lie in 0..{model.num_layers - 1} for {model.architecture}, "
            f"found {wrong[0]}."
        )
    if model.max_positions is not None and study.capture.max_length > model.max_positions:
        raise StudyError(
            f"capture.max_length must be at most {model.max_positions}, the longest sample that "
            f"{model.architecture} can read, found {study.capture.max_length}."
        )


def _require_samples(name: str, study: Study, draw: TaskDraw) -> None:
    if draw.num_counted > 0:
        return
    task = study.tasks[name]
    why = "after its filter " if task.filter else ""
    raise StudyError(
        f"tasks.{name} has no tokens {why}({draw.num_documents} documents were read, "
        f"{draw.num_empty} of them empty): correct its source{' or filter' if task.filter else ''}."
    )


def _actor_bytes(study: Study, model: ModelFacts) -> int:
    itemsize: int = getattr(torch, study.model.dtype).itemsize
    weights = model.num_parameters * itemsize
    rows = max(study.capture.batch_tokens, study.capture.max_length)
    widest = max(site.width for site in model.sites)
    logits = rows * model.vocabulary * (itemsize + 1)
    hidden = rows * (8 * model.hidden + 4 * widest) * itemsize
    moments = model.num_neurons * 9 * 8
    return _PROCESS_BYTES + weights + logits + hidden + moments
