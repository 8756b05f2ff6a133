"""``actlake sql``, ``export``, ``views``, ``status`` and ``verify``: reading a store."""

import shutil
import sys
import tempfile
from pathlib import Path

import click

from ray_app.progress import open_steps
from storage import Store, StoreError, open_store, verify_store
from storage.sqlfiles import load_query

_WIDTH_WITHOUT_TERMINAL = 120
_RECAPTURE = "delete the commit record of a damaged shard and run its capture again"


def sql(
    store_path: str, query: str, *, result_format: str, output: Path | None, max_rows: int
) -> None:
    """Answer one query, for eyes or for another program."""
    store = open_store(store_path)
    if result_format == "table":
        show(store, query, max_rows=max_rows)
        return
    if output is None:
        if result_format == "parquet" and sys.stdout.isatty():
            raise click.UsageError("Parquet is not for a terminal: pass --output FILE, or a pipe.")
        _export_to_stdout(store, query, result_format)
        return
    if not output.parent.is_dir():
        raise StoreError(
            f"cannot write --output {output}: there is no folder {output.parent}. Make it first."
        )
    # The temporary name keeps a failing query from leaving half a file behind.
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        store.export(query, temporary, result_format)
        temporary.replace(output)
    except OSError as error:
        raise StoreError(
            f"cannot write --output {output}: {error.strerror}. Give the name of a file."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def show(store: Store, query: str, *, max_rows: int = 40) -> None:
    """Print a query's result as a table that fits the terminal."""
    width = shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns
    click.echo(store.render(query, max_width=width, max_rows=max_rows))


def export(
    store_path: str,
    output: Path,
    *,
    site: str,
    layer: int,
    task: str,
    run: str | None,
    neurons: list[int] | None,
) -> None:
    """Write raw values as positions by neurons."""
    from storage.matrix import export_matrix, select_values

    store = open_store(store_path)
    chosen = select_values(store, site, layer, task, run=run, neurons=neurons)
    rows = export_matrix(store, chosen, output)
    click.echo(f"{rows:,} positions x {len(chosen.neurons):,} neurons in {output}")


def views(store_path: str) -> None:
    """Print the view definitions."""
    click.echo(open_store(store_path).views_sql(), nl=False)


def status(store_path: str) -> None:
    """Print what the store holds and how far each run is."""
    store = open_store(store_path)
    click.echo(f"store {store.files.root}")
    for name in ("status_runs", "status_tasks", "status_analyses"):
        show(store, load_query("storage", name).text, max_rows=1000)


def verify(store_path: str, *, recompute: int | None, run: str | None) -> None:
    """Check every committed file, then the counts, then some samples if asked to."""
    store = open_store(store_path)
    # Told before the files are read, which may take long.
    chosen = store.resolve_run(run) if recompute else None
    with open_steps("verify", unit="files") as advance:
        report = verify_store(store, on_file=lambda path: advance())
    for problem in report.problems:
        click.echo(problem, err=True)
    if report.problems:
        raise StoreError(
            f"{len(report.problems)} problem(s) in {store.files.root}: restore the files from a "
            f"copy, or {_repair(report.problems)}."
        )
    click.echo(
        f"{report.num_files:,} files ({report.num_bytes / 1e6:,.1f} MB) of {report.num_shards:,} "
        "committed shards are whole, and their counts agree."
    )
    if recompute and chosen:
        _recompute(store, chosen, recompute)


def _repair(problems: list[str]) -> str:
    """What mends a store without a copy; a problem begins with the path of what is damaged."""
    repairs = {
        "/samples/": "begin another run with --new-run, since inputs cannot be computed again",
        "/run.json": "begin another run with --new-run, since its record cannot be computed again",
        "analyses/": "delete the folder of a damaged analysis and make it again",
    }
    found = [
        next((repair for mark, repair in repairs.items() if mark in path), _RECAPTURE)
        for path in (problem.partition(": ")[0] for problem in problems)
    ]
    return "; ".join(dict.fromkeys(found))


def _recompute(store: Store, run: str, num_samples: int) -> None:
    from ray_app.recompute import recompute_samples

    with open_steps("recompute", total=num_samples, unit="samples") as advance:
        checked = recompute_samples(store, run, num_samples, on_sample=advance)
    for problem in checked.problems:
        click.echo(problem, err=True)
    if checked.problems:
        raise StoreError(
            f"{len(checked.problems)} of {checked.num_samples} samples computed again do not agree "
            f"with the run {run!r}: its weights, library versions or files changed."
        )
    click.echo(
        f"{checked.num_samples} samples ({checked.num_tokens:,} tokens) computed again one by one "
        f"agree: losses within {checked.largest_loss_difference:.1e} nats, top-1 correctness but "
        f"for {checked.num_top1_differences} tokens, activations within "
        f"{checked.largest_excess:.1e} of their neurons' extrema."
    )


def _export_to_stdout(store: Store, query: str, result_format: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        store.export(query, path, result_format)
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
