"""``actlake compact`` and ``gc``: fewer files, and none that nobody reads."""

import click

from ray_app.lock import drive_alone
from ray_app.progress import open_steps
from storage import collect_garbage, compact_run, open_store


def compact(store_path: str, run: str | None, *, file_bytes: int) -> None:
    """Put the files of a run together and say what came of it."""
    store = open_store(store_path)
    num_files, num_replaced, before, after = 0, 0, 0, 0
    chosen = store.resolve_run(run)
    with (
        drive_alone(store.files, chosen, role="compactor"),
        open_steps("compact", unit="files") as advance,
    ):
        for made in compact_run(store, chosen, file_bytes=file_bytes):
            num_files += 1
            num_replaced += made.num_replaced
            before += made.bytes_replaced
            after += made.file.bytes
            advance()
    if num_files == 0:
        click.echo("nothing to put together: every file stands alone or is large enough.")
        return
    click.echo(
        f"{num_replaced:,} files ({before / 1e6:,.1f} MB) are now {num_files:,} "
        f"({after / 1e6:,.1f} MB); queries read them from a minute from now on, and `actlake gc` "
        "removes the old ones after a day."
    )


def gc(store_path: str, *, seconds: float, dry_run: bool) -> None:
    """Remove what is left over and say how much it was."""
    found = collect_garbage(open_store(store_path), seconds=seconds, dry_run=dry_run)
    if dry_run:
        for path in found.paths:
            click.echo(path)
    verb = "would be removed" if dry_run else "removed"
    click.echo(
        f"{len(found.paths):,} files ({found.num_bytes / 1e6:,.1f} MB) {verb}; "
        f"{found.num_kept:,} younger ones that nothing names are kept."
    )
