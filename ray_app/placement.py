"""Which machines carry a run: how many stages, where the model is cut, and whether that fits."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import psutil
import torch

from ray_app.capture.top import BLOCK_ROWS
from ray_app.facts import ModelFacts
from ray_app.models.sites import SiteLocation
from ray_app.study import CaptureSettings, GpuName, Study, ValuesSettings
from storage import ActlakeError

__all__ = [
    "GPUS",
    "Gpu",
    "Node",
    "Placement",
    "PlanError",
    "gib",
    "host_bytes",
    "local_nodes",
    "num_pairs",
    "place",
    "planned_nodes",
    "stage_bytes",
    "stage_ranges",
]

_PROCESS_BYTES = 1080 << 20
"""Resident memory of a Python process that has imported Ray, torch, transformers, bitsandbytes and
a model's code (measured: 920 MiB), what loading takes beside the weights (60 MiB), and what its
threads keep of encoding files (40 MiB)."""
_STATS_BYTES = 2 * 9 * 8 + 2 * 100
"""Of each neuron: running statistics of the shard that is computed and of the one that is written,
and the latter's rows as a table and as Parquet."""
_SAMPLE_BYTES = 120
"""Of each token of a shard: its id, text and flags as a table, and its rows of table tokens."""
_POOLED_BYTES = 4, 2 * 4
"""Of each pooled value: in a shard that is held, and of the one that is written as a table and as
Parquet."""
_PAIR_BYTES = 8 + 4, 3 * (8 + 4)
"""Of each pair of neurons that is counted: sums of a shard that is held, where activations lie, and
of the one that is written as a matrix, as a table and as Parquet."""
_TOP_BYTES = 2 * 8 + 2 * 12
"""Of each activation that is kept as one of the highest or lowest: value and place in the shard
that is computed and in the one that is written, and the latter's rows as a table and as Parquet."""
_MERGED_BYTES = 24
"""Of each value of a block of which all are better than what is kept: copies of it and its key."""
_VALUE_BYTES = {"float32": 4, "float16": 2, "int8": 4}
"""Of each raw value by its encoding, in a shard that is held; of the one that is written, rows are
made and compressed a few at a time."""
_VALUE_ROOM = 9 / 8
"""Of the memory of a shard's values: what it takes with room for shards that are longer."""
_VALUE_DISK_BYTES = 1.5
"""Of each raw value on disk, at least, if it is kept by a budget."""
_SHORT = 16
"""Tokens of a sample, where samples have not been drawn yet: few datasets have shorter ones."""


class PlanError(ActlakeError):
    """A plan cannot be carried out on these machines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one machine has to give."""

    cpus: float
    """CPU cores."""
    gpus: float
    """GPUs."""
    memory: int
    """Bytes of main memory."""
    gpu_memory: int
    """Bytes of memory of one GPU; 0 if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How a run is spread over actors."""

    cut: tuple[range, ...]
    """The layers of each stage."""
    replicas: int
    """Number of pipelines."""
    threads: int
    """CPU threads of each stage."""
    gpus_per_stage: int
    """GPUs of each stage."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a maker says of a GPU."""

    memory: int
    """Bytes."""
    tflops_half: float
    """Dense teraflops in float16 and bfloat16, summed in float32."""
    tflops_float32: float
    """Teraflops in float32, as torch computes it by default."""


GPUS: dict[GpuName, Gpu] = {
    "T4": Gpu(16 << 30, 65, 8.1),
    "V100": Gpu(32 << 30, 125, 15.7),
    "A10G": Gpu(24 << 30, 70, 31.5),
    "L4": Gpu(24 << 30, 121, 30.3),
    "L40S": Gpu(48 << 30, 362, 91.6),
    "RTX-3090": Gpu(24 << 30, 71, 35.6),
    "RTX-4090": Gpu(24 << 30, 165, 82.6),
    "A100-40GB": Gpu(40 << 30, 312, 19.5),
    "A100-80GB": Gpu(80 << 30, 312, 19.5),
    "H100": Gpu(80 << 30, 989, 67),
}
"""From the makers' data sheets."""


def planned_nodes(study: Study) -> list[Node]:
    """The machine of this process, with the GPUs that the study says plans reckon with."""
    nodes = local_nodes()
    if study.resources.gpu is None:
        return nodes
    return [replace(node, gpu_memory=GPUS[study.resources.gpu].memory) for node in nodes]


def local_nodes() -> list[Node]:
    """The machine of this process, as the only one."""
    gpus = torch.cuda.device_count()
    return [
        Node(
            cpus=os.cpu_count() or 1,
            gpus=gpus,
            memory=psutil.virtual_memory().available,
            gpu_memory=torch.cuda.get_device_properties(0).total_memory if gpus else 0,
        )
    ]


def stage_ranges(study: Study, model: ModelFacts, nodes: Sequence[Node]) -> tuple[range, ...]:
    """The layers of each stage.

    With ``stages: auto``, the fewest stages of which each fits its GPUs, or its share of the
    largest machine.

    Raises:
        PlanError: if no number of stages fits.
        ModelError: if the model cannot be cut.
    """
    resources = study.resources
    by_work = resources.gpus_per_stage == 0
    if resources.stages != "auto":
        return tuple(model.sizes.cut(resources.stages, by_work=by_work))
    for num_stages in range(1, model.num_layers + 1):
        cut = model.sizes.cut(num_stages, by_work=by_work)
        largest = max(stage_bytes(study, model, layers, num_stages=num_stages) for layers in cut)
        if largest <= _room(resources.gpus_per_stage, num_stages * resources.replicas, nodes):
            return tuple(cut)
    raise PlanError(
        f"resources.stages: auto finds no number of stages that fits: one layer with what runs "
        f"beside it takes about {gib(largest)}, and {_inventory(nodes)}: add machines, or choose a "
        "narrower model.dtype or model.quantization, or lower capture.batch_tokens."
    )


def place(
    study: Study, model: ModelFacts, nodes: Sequence[Node], *, threads: int | None = None
) -> Placement:
    """Spread a run over machines.

    Args:
        study: the study.
        model: its model.
        nodes: the machines of the cluster.
        threads: CPU threads of each stage that the run began with; chosen if it has not begun.

    Raises:
        PlanError: if the machines have too few CPUs, GPUs or bytes; says what they have.
        ModelError: if the model cannot be cut.
    """
    resources = study.resources
    cut = stage_ranges(study, model, nodes)
    actors = len(cut) * resources.replicas
    cpus = sum(node.cpus for node in nodes)
    if threads is None:
        widest = int(max(node.cpus for node in nodes))
        threads = resources.cpus_per_stage or max(1, min(int(cpus) // actors, widest))
    named = f"resources: {len(cut)} stage(s) x {resources.replicas} replica(s)"
    if threads * actors > cpus:
        raise PlanError(
            f"{named} of {threads} CPU(s) each need {threads * actors} CPUs, and "
            f"{_inventory(nodes)}: lower resources.stages, resources.replicas or "
            "resources.cpus_per_stage."
        )
    gpus = sum(node.gpus for node in nodes)
    if resources.gpus_per_stage * actors > gpus:
        raise PlanError(
            f"{named} of {resources.gpus_per_stage} GPU(s) each need "
            f"{resources.gpus_per_stage * actors} GPUs, and {_inventory(nodes)}: lower "
            "resources.stages, resources.replicas or resources.gpus_per_stage."
        )
    return Placement(
        cut=cut,
        replicas=resources.replicas,
        threads=threads,
        gpus_per_stage=resources.gpus_per_stage,
    )


def stage_bytes(
    study: Study,
    model: ModelFacts,
    layers: range,
    *,
    num_stages: int = 1,
    shard_samples: int | None = None,
) -> int:
    """Memory that the actor of a stage takes at most: on its GPU if it has one, else in all.

    Args:
        study: the study.
        model: its model.
        layers: those of the stage.
        num_stages: stages of a pipeline. The first may hold a shard for each, closed while others
            are written, and one that is computed.
        shard_samples: samples of the shard that has most; a guess if not given.
    """
    itemsize: int = getattr(torch, study.model.dtype).itemsize
    rows = max(study.capture.batch_tokens, _longest(study, model))
    sites = [site for site in model.sites if site.layer in layers]
    widest = max((site.width for site in model.sites), default=0)
    total = model.sizes.of_stage(layers)
    total += rows * (8 * model.architecture.width + 4 * widest) * itemsize
    num_neurons = sum(site.width for site in sites)
    total += num_neurons * _STATS_BYTES
    if study.capture.top:
        total += num_neurons * 2 * study.capture.top * _TOP_BYTES
        total += min(rows, BLOCK_ROWS) * 2 * widest * _MERGED_BYTES
    if layers.stop == model.num_layers:
        total += rows * model.architecture.num_outputs * (itemsize + 1)
    total += (num_stages + 1) * num_pairs(study.capture, sites) * _PAIR_BYTES[0]
    if study.resources.gpus_per_stage:
        return total
    return total + host_bytes(
        study, model, layers, num_stages=num_stages, shard_samples=shard_samples
    )


def host_bytes(
    study: Study,
    model: ModelFacts,
    layers: range,
    *,
    num_stages: int = 1,
    shard_samples: int | None = None,
) -> int:
    """Main memory that a stage takes beside what lies where it computes; as `stage_bytes`."""
    sites = [site for site in model.sites if site.layer in layers]
    num_neurons = sum(site.width for site in sites)
    held, pairs = num_stages + 1, num_pairs(study.capture, sites)
    # On their way to a GPU, weights pass through main memory.
    total = model.sizes.of_stage(layers) if study.resources.gpus_per_stage else 0
    if shard_samples is None:
        shortest = model.architecture.num_probed if _reads_images(model) else _SHORT
        shard_samples = study.capture.shard_tokens // shortest + 1
    pooled = num_neurons * shard_samples * len(study.capture.pooled)
    total += pooled * (held * _POOLED_BYTES[0] + _POOLED_BYTES[1]) + pairs * _PAIR_BYTES[1]
    values = study.capture.values
    if values is None and study.capture.budget_gb is not None:
        values = _values_of_budget(study, model, study.capture.budget_gb)
    if values is not None:
        kept = sum(site.width for site in sites if values.keeps(site.site, site.layer))
        # A shard is closed by the sample that fills it.
        positions = (study.capture.shard_tokens + _longest(study, model)) * values.share
        total += ceil(held * kept * positions * _VALUE_BYTES[values.encoding] * _VALUE_ROOM)
    return total + _PROCESS_BYTES + study.capture.shard_tokens * _SAMPLE_BYTES


def _values_of_budget(study: Study, model: ModelFacts, budget_gb: float) -> ValuesSettings:
    """At least the raw values that a budget keeps, where samples have not been drawn yet."""
    positions = sum(study.tokens_of(task) for task in study.tasks)
    everything = positions * model.num_neurons * _VALUE_DISK_BYTES
    share = min(1.0, budget_gb * 1e9 / everything)
    # All of them may be kept with all their digits.
    return ValuesSettings(share=share, encoding="float32" if share == 1 else "float16")


def num_pairs(capture: CaptureSettings, sites: Sequence[SiteLocation]) -> int:
    """Pairs of neurons that are counted at some sites, in both orders."""
    chosen = capture.coactivation
    return sum(site.width**2 for site in sites if chosen is not None and chosen.holds(site))


def _longest(study: Study, model: ModelFacts) -> int:
    """Positions of the longest sample."""
    return model.architecture.num_probed if _reads_images(model) else study.capture.max_length


def _reads_images(model: ModelFacts) -> bool:
    return model.architecture.modality == "image"


def gib(num_bytes: int) -> str:
    """A size for people."""
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):,.1f} MiB"
    return f"{num_bytes / (1 << 30):,.2f} GiB"


def _room(gpus_per_stage: int, actors: int, nodes: Sequence[Node]) -> int:
    """Bytes that one of so many actors may take."""
    if gpus_per_stage:
        return gpus_per_stage * max(node.gpu_memory for node in nodes)
    return max(node.memory for node in nodes) // ceil(actors / len(nodes))


def _inventory(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    memory = gib(max(node.memory for node in nodes))
    found = f"the cluster has {cpus:g} CPU(s) and {gpus:g} GPU(s) on {len(nodes)} machine(s)"
    gpu_memory = max(node.gpu_memory for node in nodes)
    return f"{found}, the largest with {memory}" + (
        f", its GPUs with {gib(gpu_memory)}" if gpu_memory else ""
    )
