"""``actlake routing``: models whose tokens keep only the experts that a router chooses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from analysis import AnalysisError
from analysis.routing import load_experts, routing_by_share
from analysis.settings import RoutingSettings
from ray_app.ablation.routing import Routers, RoutingEngine, route_experts, routing_specs
from ray_app.ablation.routing_stage import RoutingSpec, build_routing
from ray_app.commands.ablation import Session, say_made
from ray_app.progress import open_progress
from ray_app.validation import explain
from storage import open_store

Rows = list[dict[str, Any]]


def routing(
    store_path: str,
    experts: tuple[str, ...],
    *,
    study: Path | None,
    tokens: int | None,
    reference: str | None,
    options: dict[str, Any],
) -> None:
    """Route tokens to experts, keep the result and print what is kept and what it costs.

    Args:
        store_path: the store.
        experts: ids of analyses that made experts.
        study: a study file with evaluations and resources.
        tokens: counted tokens of each task to evaluate on.
        reference: the task that routers learn from; the run's own if not given.
        options: fields of `RoutingSettings`; None for those not given.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        settings = RoutingSettings.model_validate(given)
    except ValidationError as error:
        raise AnalysisError(f"{explain(error, RoutingSettings)}.") from error
    store = open_store(store_path)
    loaded = load_experts(store, experts, settings.layers)
    session = Session(store, loaded[0].run, study, tokens)
    samples = session.samples()

    @contextmanager
    def open_engine(task: str, routers: Routers) -> Iterator[RoutingEngine]:
        def specs_of(cut: Sequence[range]) -> list[RoutingSpec]:
            return routing_specs(session.run, cut, task, routers)

        with session.workers(specs_of, build_routing) as workers:
            yield RoutingEngine(workers, session.run, samples, task, open_progress)

    made = route_experts(session.run, samples, loaded, settings, open_engine, reference=reference)
    say_made(made)
    _print(routing_by_share(store, made.id))


def _print(rows: Rows) -> None:
    console = Console(highlight=False)
    of_experts = {row["experts"]: row["method"] for row in rows}
    for name, method in of_experts.items():
        click.echo(f"{name}: {method}")
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        (whole, *_) = (row for row in own if row["router"] == "all")
        console.print(
            _by_share(
                f"Mass kept in {task}, % of the most that so many experts hold",
                own,
                lambda row: f"{100 * row['mass_ratio']:.1f}",
            )
        )
        console.print(
            _by_share(
                f"Rise of the loss of {task} (nats), {whole['mean_loss']:.3f} with all experts",
                own,
                lambda row: f"{row['loss_change']:+.3f}",
            )
        )


def _by_share(title: str, rows: Rows, cell: Callable[[dict[str, Any]], str]) -> Table:
    """A table of experts and routers by the share of experts that is kept."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    routed = [row for row in rows if row["router"] != "all"]
    shares = sorted({row["share"] for row in routed})
    for name in ("experts", "router"):
        table.add_column(name, no_wrap=True)
    for share in shares:
        table.add_column(f"{share:.0%}", justify="right", no_wrap=True)
    for experts, router in dict.fromkeys((row["experts"], row["router"]) for row in routed):
        cells = [
            cell(row) for row in routed if (row["experts"], row["router"]) == (experts, router)
        ]
        table.add_row(experts, router, *cells)
    return table
