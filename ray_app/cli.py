"""The command line: each command parses, calls one library function, and prints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ray_app import commands
from storage import ActlakeError

__all__ = ["cli", "main"]

Command = TypeVar("Command", bound=Callable[..., Any])


def _study_options(command: Command) -> Command:
    command = click.option(
        "--tokens", type=click.IntRange(min=1), help="Counted tokens of each task."
    )(command)
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY.PATH=VALUE",
        help="Change one setting of the study, such as model.init=random. May be repeated.",
    )(command)


_STORE_OPTION = click.option(
    "--store", required=True, type=click.Path(path_type=Path), help="Folder of the store."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="actlake")
def cli() -> None:
    """actlake: what every neuron of a transformer did, in Parquet, asked with SQL."""


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--store", type=click.Path(path_type=Path), default=Path(), help="Where the store will be."
)
@_study_options
def plan(study: Path, store: Path, overrides: tuple[str, ...], tokens: int | None) -> None:
    """Show what capturing STUDY would read, write and cost, and whether it fits."""
    commands.plan(study, store, commands.with_tokens(overrides, tokens))


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@_STORE_OPTION
@_study_options
@click.option("--new-run", is_flag=True, help="Capture beside a run of an earlier form of STUDY.")
def capture(
    study: Path, store: Path, overrides: tuple[str, ...], tokens: int | None, *, new_run: bool
) -> None:
    """Run the model of STUDY over its tasks and write the store; resumes where it was stopped."""
    commands.capture(study, store, commands.with_tokens(overrides, tokens), new_run=new_run)


def main() -> None:
    """Run the command line; user errors print one sentence and exit with status 2."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("stopped; the same command goes on from the last committed shard.", err=True)
        sys.exit(130)
    except ActlakeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
