"""A plan as lines of text that fit a terminal: every count is whole, samples are cut."""

from collections.abc import Iterator
from textwrap import wrap

import torch

from ray_app.commands.text import cut, cut_start, printable
from ray_app.placement import GPUS
from ray_app.plan import Costs, Plan, gib

__all__ = ["plan_lines"]

_COUNTS = ("documents", "empty", "samples", "tokens", "shards")
_KNOWN_WITHOUT_SAMPLES = _COUNTS[2:]
_GAP = 2
_RECKONED = (
    "Counts are reckoned from the study: as many tokens as it asks for, in samples as long as they "
    "may be."
)


def plan_lines(made: Plan, costs: Costs, width: int) -> Iterator[str]:
    """What a plan reads, writes and costs.

    Args:
        made: the plan.
        costs: what it takes.
        width: columns of the terminal; what the tasks' table and samples keep to.
    """
    yield f"plan of {made.study.name}"
    yield ""
    yield from _table(made, width)
    yield ""
    if made.why_outlined is None:
        yield from _samples(made, width)
    else:
        yield from wrap(f"No samples were drawn: {made.why_outlined}. {_RECKONED}", width)
        if made.model.architecture.modality == "image":
            yield "The bytes of images are not known: they come on top of what the store takes."
    yield ""
    model = made.model
    yield (
        f"model   {model.architecture.name}, {model.num_layers} layers, "
        f"{model.num_parameters:,} parameters, {model.num_neurons:,} neurons captured"
    )
    known = "the study" if model.is_outlined else f"its configuration, {model.files.fingerprint}"
    yield cut(f"        measures from {known}", width)
    free = "no bound there" if costs.free_disk is None else f"{gib(costs.free_disk)} are free"
    yield f"store   {costs.num_files:,} files, about {gib(costs.num_bytes)}; {free}"
    for index, thing in enumerate(costs.kept):
        yield f"{'' if index else 'keeps':8}{gib(thing.num_bytes):>11}  {thing.name}"
    if (budget := made.study.capture.budget_gb) is not None:
        most = sum(thing.most_bytes for thing in costs.kept)
        yield f"budget  {most / 1e9:,.3g} GB at the very most, of {budget:g} GB"
    yield from _memory(made, costs)
    yield from _hours(made, costs, width)


def _memory(made: Plan, costs: Costs) -> Iterator[str]:
    resources, num_stages = made.study.resources, len(costs.stages)
    per_stage = resources.gpus_per_stage
    yield (
        f"memory  {costs.replicas} replica(s) of {num_stages} stage(s): {gib(costs.host_bytes)} of "
        f"main memory, {gib(costs.available_memory)} free"
    )
    if per_stage:
        needed, there = per_stage * num_stages * costs.replicas, torch.cuda.device_count()
        named = f" ({resources.gpu}, {gib(GPUS[resources.gpu].memory)})" if resources.gpu else ""
        yield f"        {needed} GPU(s){named}; this machine has {there}"
    for index, stage in enumerate(costs.stages):
        first, last = stage.layers[0], stage.layers[-1]
        line = f"        stage {index}: layers {first}-{last}, {gib(stage.num_bytes)}"
        if per_stage:
            gpus = ", ".join(
                _numbers((replica * num_stages + index) * per_stage, per_stage)
                for replica in range(costs.replicas)
            )
            line += f" of GPU {gpus}, {gib(stage.host_bytes)} of main memory"
        yield line


def _numbers(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _hours(made: Plan, costs: Costs, width: int) -> Iterator[str]:
    hours = costs.hours
    yield f"hours   {hours.capture:.2g} for this capture, and as much for its random twin"
    yield f"        {hours.evaluation:.2g} to evaluate one ablated model on all tasks"
    assumed = f"reckoned as {hours.assumption}; loading and downloads come on top"
    yield from (f"{'':8}{line}" for line in wrap(assumed, width - 8))


def _table(made: Plan, width: int) -> Iterator[str]:
    columns = _COUNTS if made.why_outlined is None else _KNOWN_WITHOUT_SAMPLES
    rows = [
        tuple(getattr(draw, f"num_{column}") for column in columns) for draw in made.tasks.values()
    ]
    total = tuple(map(sum, zip(*rows, strict=True)))
    cells = [columns, *([f"{count:,}" for count in row] for row in (*rows, total))]
    widths = [max(map(len, column)) + _GAP for column in zip(*cells, strict=True)]
    names = ["task", *made.tasks, "all"]
    name_width = min(max(map(len, names)), max(width - sum(widths), 4))
    for name, row in zip(names, cells, strict=True):
        counts = "".join(cell.rjust(size) for cell, size in zip(row, widths, strict=True))
        yield cut(name, name_width).ljust(name_width) + counts
    yield from made.notes()


def _samples(made: Plan, width: int) -> Iterator[str]:
    yield "first samples"
    for name, draw in made.tasks.items():
        yield cut(f"{name}:", width)
        for source, text in draw.examples:
            # The end of a path tells more than its beginning.
            place = cut_start(source, width // 3)
            yield cut(f"  {place} | {printable(text)}", width)
