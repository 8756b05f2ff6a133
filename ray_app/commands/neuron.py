"""``actlake neuron``: one neuron's statistics, scores and best examples on a page."""

import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.neuron import NeuronView, open_neuron
from analysis.summary import AnalysisView
from ray_app.commands.text import cut, cut_start, printable
from storage import open_store

_TASK_WIDTH = 12
_INDENT = "    "
_MARKS = "«", "»"


def neuron(
    store_path: str,
    run: str | None,
    *,
    site: str,
    layer: int,
    neuron: int,
    task: str | None,
    count: int | None,
    per_sample: bool,
) -> None:
    """Print what is known of one neuron; the options are those of `NeuronView.examples`."""
    store = open_store(store_path)
    view = open_neuron(store, store.resolve_run(run), site=site, layer=layer, neuron=neuron)
    console = Console(highlight=False)
    head = "" if view.head is None else f", head {view.head}"
    console.print(
        Text(f"{site} neuron {neuron} of {view.width:,} in layer {layer}{head}", style="bold")
    )
    console.print(Text(f"run {view.run}"), soft_wrap=True)
    console.print()
    console.print(_statistics(view))
    scored = view.newest_scores()
    if scored is not None and scored[1]:
        console.print(_scores(*scored))
    examples = view.examples(task=task, count=count, per_sample=per_sample)
    width = shutil.get_terminal_size().columns
    for kind in ("highest", "lowest"):
        of_kind = [row for row in examples if row["kind"] == kind]
        for line in _examples(of_kind, kind, task, width):
            console.print(line, soft_wrap=True)
        if per_sample and len(of_kind) < (count or view.top):
            console.print(Text(f"{_INDENT}All that was kept lies in {len(of_kind)} sample(s)."))
        console.print()
    planned = store.run_record(view.run)["shards"]
    committed = store.committed(view.run)
    if len(committed) < len(planned):
        click.echo(f"{len(committed)} of {len(planned)} shards are committed: all is of these.")


def _statistics(view: NeuronView) -> Table:
    table = _table("Statistics by task", "n", "mean", "std", "mean |z|", "z > 0", "min", "max")
    for row in view.statistics():
        numbers = (f"{row[name]:.4g}" for name in ("mean", "std", "abs"))
        extrema = (f"{row[name]:.4g}" for name in ("min", "max"))
        table.add_row(row["task"], f"{row['n']:,}", *numbers, f"{row['freq']:.1%}", *extrema)
    return table


def _scores(scored: AnalysisView, rows: list[dict[str, Any]]) -> Table:
    title = f"Scores by {scored.metric} against {scored.reference}"
    table = _table(title, "importance", "score", "rank", "of", "in the top")
    for row in rows:
        fractions = ", ".join(f"{fraction:g}" for fraction in row["fractions"]) or "-"
        table.add_row(
            row["task"],
            f"{row['importance']:.4g}",
            f"{row['score']:.4g}",
            f"{row['rank']:,}",
            f"{row['population']:,}",
            fractions,
        )
    return table


def _examples(
    rows: list[dict[str, Any]], kind: str, task: str | None, width: int
) -> Iterator[Text]:
    where = "of all tasks" if task is None else f"of {task}"
    yield Text(f"{kind.capitalize()} activations {where}", style="bold")
    for row in rows:
        place = f"{row['task']}, sample {row['sample']}, position {row['position']}"
        label = "" if row["label"] is None else f", {printable(row['label'])}"
        begin = f"{row['rank']:>3}  {row['value']:.4g}  {place}{label}  "
        yield Text(cut(begin + cut_start(printable(row["source"]), width - len(begin)), width))
        yield _context(row, width)
    for source, number in Counter(row["source"] for row in rows).items():
        if number > 1:
            named = cut_start(printable(source), width // 2)
            yield Text(f"{_INDENT}{number} of them are of one document: {named}", style="italic")


def _context(row: dict[str, Any], width: int) -> Text:
    """The token, marked, in the middle of what is around it."""
    token = _MARKS[0] + _visible(row["token"]) + _MARKS[1]
    room = width - len(_INDENT) - len(token)
    after = cut(_flat(row["after"]), room // 2)
    before = cut_start(_flat(row["before"]), room - len(after))
    return Text.assemble(_INDENT, before, (token, "bold reverse"), after)


def _flat(text: str) -> str:
    """`printable`, with a space where the text begins or ends with one."""
    start = " " if text[:1].isspace() else ""
    end = " " if text[-1:].isspace() and text.strip() else ""
    return start + printable(text) + end


def _visible(token: str) -> str:
    """A token as it is, spaces too, with escapes for characters that a terminal would obey."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in token
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", max_width=_TASK_WIDTH, no_wrap=True, overflow="ellipsis")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
