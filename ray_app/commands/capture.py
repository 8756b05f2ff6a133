"""``actlake plan`` and ``actlake capture``."""

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ray_app.actors import cluster_nodes, ray_session, ray_workers
from ray_app.capture import driver
from ray_app.capture.quarantine import Quarantine
from ray_app.lock import drive_alone
from ray_app.models.loading import quiet_transformers
from ray_app.placement import place
from ray_app.plan import Costs, ModelFacts, Plan, check_fits, gib, inspect_model, make_plan
from ray_app.progress import open_progress
from ray_app.run import Run, begin_run, find_run
from ray_app.study import Study, load_study
from storage import Store, StoreFiles, create_store

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def load(path: Path, overrides: list[str]) -> Study:
    """Read a study, and make this process ready to plan it."""
    quiet_transformers()
    # Planning is Python and tokenizer work; torch's threads would only contend with it.
    torch.set_num_threads(1)
    return load_study(path, overrides)


def plan(study: Study, store: str) -> None:
    """Print the plan of a study; refuse one that does not fit."""
    made = make_plan(study, inspect_model(study), on_task=_say_task)
    costs = made.costs(StoreFiles(store).free_bytes())
    _print_plan(made, costs)
    check_fits(costs)


def capture(study: Study, store_path: str, *, new_run: bool) -> Run:
    """Begin or resume the run of a study, and finish it."""
    start = time.monotonic()
    store = create_store(store_path)
    model = inspect_model(study)
    run = find_run(store, study, model, new_run=new_run)
    if run is None or run.remaining():
        with ray_session():
            run = _capture_remaining(store, study, model, run)
    if num_quarantined := run.num_quarantined():
        _console.print(
            f"{num_quarantined} sample(s) failed and were set aside: see `actlake query "
            f"{store_path} 'from quarantine'`"
        )
    _console.print(
        f"run [bold]{run.id}[/] is complete in {store.files.root} after "
        f"{time.monotonic() - start:.0f} s"
    )
    return run


def _capture_remaining(store: Store, study: Study, model: ModelFacts, run: Run | None) -> Run:
    begun = None if run is None else int(run.record["threads"])
    placement = place(study, model, cluster_nodes(), threads=begun)
    if run is None:
        run = begin_run(
            store,
            study,
            model,
            threads=placement.threads,
            reduction=study.resources.reduction,
            on_task=_say_task,
        )
    remaining = run.remaining()
    _console.print(
        f"run [bold]{run.id}[/]: {len(run.shards) - len(remaining)} of {len(run.shards)} shards "
        f"committed, {len(remaining)} to do"
    )
    start = time.monotonic()
    specs = run.stage_specs(placement.cut)
    quarantine = Quarantine(
        max_samples=study.capture.max_quarantined, num_samples=run.num_quarantined()
    )
    with (
        drive_alone(store.files, run.id),
        ray_workers(
            specs, placement, max_deaths=study.resources.max_deaths, quarantine=quarantine
        ) as workers,
    ):
        _console.print(
            f"{placement.replicas} x {len(placement.cut)} stage(s) of "
            f"{run.record['model']['architecture']}, {placement.threads} thread(s) each, loaded in "
            f"{time.monotonic() - start:.0f} s"
        )
        total = sum(shard.num_tokens for shard in remaining)
        with open_progress(total_tokens=total, total_shards=len(remaining)) as progress:
            driver.capture(run, workers, progress)
    return run


def _say_task(task: str) -> None:
    _console.print(f"choosing samples of {task}")


def _print_plan(made: Plan, costs: Costs) -> None:
    table = Table(title=f"plan of {made.study.name}")
    for name in ("task", "documents", "samples", "tokens", "shards"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    table.add_column("first sample", no_wrap=True, overflow="ellipsis")
    for name, draw in made.tasks.items():
        counts = (draw.num_documents, draw.num_samples, draw.num_tokens, draw.num_shards)
        first = " ".join(draw.examples[0][1].split())
        table.add_row(name, *(f"{count:,}" for count in counts), first)
    console = Console(highlight=False)
    console.print(table)
    model = made.model
    free = "no bound there" if costs.free_disk is None else f"{gib(costs.free_disk)} are free"
    console.print(
        f"model   {model.architecture}, {model.num_layers} layers, "
        f"{model.num_parameters:,} parameters, {model.num_neurons:,} neurons captured\n"
        f"store   {costs.num_files:,} files, about {gib(costs.num_bytes)}; "
        f"{free}\n"
        f"memory  {costs.replicas} replica(s) of {len(costs.stage_bytes)} stage(s) of at most "
        f"{gib(costs.actor_bytes)}; {gib(costs.available_memory)} are available",
        soft_wrap=True,
    )
