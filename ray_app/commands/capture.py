"""``actlake plan`` and ``actlake capture``."""

import shutil
import time

import click
import torch
from rich.console import Console

from ray_app.actors import cluster_nodes, ray_session, ray_workers
from ray_app.capture import driver
from ray_app.capture.quarantine import Quarantine
from ray_app.commands.plan_view import plan_lines
from ray_app.facts import outline_model
from ray_app.hub import OutOfReachError, why_unreachable
from ray_app.lock import drive_alone
from ray_app.models.loading import quiet_transformers
from ray_app.placement import place
from ray_app.plan import (
    ModelFacts,
    Plan,
    check_fits,
    inspect_model,
    make_plan,
    outline_plan,
)
from ray_app.progress import open_progress
from ray_app.run import Run, begin_run, find_run
from ray_app.study import Study
from storage import Store, StoreFiles, create_store

_WIDTH_WITHOUT_TERMINAL = 120

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def plan(study: Study, store: str, *, outline: bool = False) -> None:
    """Print the plan of a study; refuse one that does not fit.

    Args:
        study: the study.
        store: where the store is or will be.
        outline: draw no samples.
    """
    _prepare()
    made = _outlined(study, "--outline was given") if outline else _planned(study)
    costs = made.costs(StoreFiles(store).free_bytes())
    width = shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns
    for line in plan_lines(made, costs, width):
        click.echo(line)
    check_fits(costs)


def _planned(study: Study) -> Plan:
    """A plan with its samples, or without them if the hub that has them cannot be asked."""
    try:
        return make_plan(study, inspect_model(study), on_task=_say_task)
    except OutOfReachError:
        return _outlined(study, f"the hub cannot be asked ({why_unreachable()})")


def _outlined(study: Study, why: str) -> Plan:
    return outline_plan(study, outline_model(study), why)


def capture(study: Study, store_path: str, *, new_run: bool) -> Run:
    """Begin or resume the run of a study, and finish it."""
    start = time.monotonic()
    _prepare()
    model = inspect_model(study)
    store = create_store(store_path)
    run = find_run(store, study, model, new_run=new_run)
    if run is None or run.remaining():
        with ray_session():
            run = _capture_remaining(store, study, model, run)
    if num_quarantined := run.num_quarantined():
        _console.print(
            f"{num_quarantined} sample(s) failed and were set aside: see `actlake sql "
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
            on_note=_console.print,
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


def _prepare() -> None:
    quiet_transformers()
    # Planning is Python and tokenizer work; torch's threads would only contend with it.
    torch.set_num_threads(1)


def _say_task(task: str) -> None:
    _console.print(f"choosing samples of {task}")
