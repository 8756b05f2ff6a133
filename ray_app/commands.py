"""What the commands do, as functions that print for people."""

import os
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ray_app.actors import RayWorkers, ray_session
from ray_app.capture import driver
from ray_app.plan import Costs, Plan, check_fits, gib, inspect_model, make_plan
from ray_app.progress import open_progress
from ray_app.run import begin_run, find_run
from ray_app.study import load_study
from storage import create_store

_console = Console(stderr=True)


def with_tokens(overrides: tuple[str, ...], tokens: int | None) -> list[str]:
    """Overrides with the shortcut ``--tokens`` spelt out."""
    return [*overrides, *([] if tokens is None else [f"capture.tokens={tokens}"])]


def plan(study_path: Path, store: Path, overrides: list[str]) -> None:
    """Print the plan of a study; refuse one that does not fit."""
    _quiet()
    study = load_study(study_path, overrides)
    model = inspect_model(study)
    made = make_plan(study, model)
    costs = made.costs(store)
    _print_plan(made, costs)
    check_fits(costs)


def capture(study_path: Path, store_path: Path, overrides: list[str], *, new_run: bool) -> None:
    """Begin or resume the run of a study, and finish it."""
    _quiet()
    study = load_study(study_path, overrides)
    store = create_store(store_path)
    model = inspect_model(study)
    replicas = study.resources.replicas
    threads = study.resources.threads or max(1, (os.cpu_count() or 1) // replicas)
    run = find_run(store, study, model, new_run=new_run)
    if run is None:
        run = begin_run(store, study, model, threads=threads, on_task=_say_task)
    remaining = run.remaining()
    _console.print(
        f"run [bold]{run.id}[/]: {len(run.shards) - len(remaining)} of {len(run.shards)} shards "
        f"committed, {len(remaining)} to do"
    )
    if not remaining:
        return
    start = time.monotonic()
    with ray_session():
        workers = RayWorkers(run.stage_spec(), replicas=replicas)
        _console.print(f"{replicas} model(s) loaded in {time.monotonic() - start:.0f} s")
        total = sum(shard.num_tokens for shard in remaining)
        with open_progress(total_tokens=total, total_shards=len(remaining)) as progress:
            driver.capture(run, workers, progress)


def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def _say_task(task: str) -> None:
    _console.print(f"choosing samples of {task}")


def _print_plan(made: Plan, costs: Costs) -> None:
    table = Table(title=f"plan of {made.study.name}")
    for name in ("task", "documents", "samples", "tokens", "shards", "first sample"):
        table.add_column(name, justify="left" if name in ("task", "first sample") else "right")
    for name, draw in made.tasks.items():
        text = " ".join(draw.examples[0][1].split())
        table.add_row(
            name,
            f"{draw.num_documents:,}",
            f"{draw.num_samples:,}",
            f"{draw.num_tokens:,}",
            f"{draw.num_shards:,}",
            text[:60],
        )
    console = Console()
    console.print(table)
    console.print(
        f"{costs.num_files:,} files, {gib(costs.num_bytes)} of {gib(costs.free_disk)} free; "
        f"{costs.replicas} x {gib(costs.actor_bytes)} memory of "
        f"{gib(costs.available_memory)} available"
    )
