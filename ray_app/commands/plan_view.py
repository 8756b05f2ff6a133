"""A plan as lines of text that fit a terminal: every count is whole, samples are cut."""

from collections.abc import Iterator

from ray_app.commands.text import cut, cut_start, printable
from ray_app.plan import Costs, Plan, gib

__all__ = ["plan_lines"]

_COUNTS = ("documents", "empty", "samples", "tokens", "shards")
_GAP = 2


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
    yield from _samples(made, width)
    yield ""
    model = made.model
    yield (
        f"model   {model.architecture.name}, {model.num_layers} layers, "
        f"{model.num_parameters:,} parameters, {model.num_neurons:,} neurons captured"
    )
    free = "no bound there" if costs.free_disk is None else f"{gib(costs.free_disk)} are free"
    yield f"store   {costs.num_files:,} files, about {gib(costs.num_bytes)}; {free}"
    for index, thing in enumerate(costs.kept):
        yield f"{'' if index else 'keeps':8}{gib(thing.num_bytes):>11}  {thing.name}"
    if (budget := made.study.capture.budget_gb) is not None:
        most = sum(thing.most_bytes for thing in costs.kept)
        yield f"budget  {most / 1e9:,.3g} GB at the very most, of {budget:g} GB"
    yield (
        f"memory  {costs.replicas} replica(s) of {len(costs.stage_bytes)} stage(s) of at most "
        f"{gib(costs.actor_bytes)}; {gib(costs.available_memory)} are available"
    )


def _table(made: Plan, width: int) -> Iterator[str]:
    rows = [
        (draw.num_documents, draw.num_empty, draw.num_samples, draw.num_tokens, draw.num_shards)
        for draw in made.tasks.values()
    ]
    total = tuple(map(sum, zip(*rows, strict=True)))
    cells = [_COUNTS, *([f"{count:,}" for count in row] for row in (*rows, total))]
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
