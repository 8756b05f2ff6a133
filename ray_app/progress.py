"""Progress of long work: a live bar on a terminal, plain lines elsewhere, nothing in tests."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

import rich.progress
from rich.console import Console

__all__ = ["LineProgress", "NoProgress", "Progress", "open_progress", "open_steps"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What a driver tells while it works."""

    def advance(self, num_tokens: int) -> None:
        """Some tokens went through the model."""

    def committed(self, task: str) -> None:
        """A shard of a task was committed."""

    def lost(self, task: str, shard: int, num_tokens: int, reason: str) -> None:
        """A shard was interrupted: of its tokens, so many will be told again."""


class NoProgress:
    """Says nothing."""

    def advance(self, num_tokens: int) -> None:
        """Say nothing."""

    def committed(self, task: str) -> None:
        """Say nothing."""

    def lost(self, task: str, shard: int, num_tokens: int, reason: str) -> None:
        """Say nothing."""


class LineProgress:
    """A plain line now and then, for logs."""

    def __init__(
        self,
        *,
        total_tokens: int,
        total_shards: int,
        stream: TextIO,
        seconds_between_lines: float = _SECONDS_BETWEEN_LINES,
        name: str = "capture",
        done: str = "shards committed",
    ) -> None:
        self._name = name
        self._done = done
        self._total_tokens = total_tokens
        self._total_shards = total_shards
        self._stream = stream
        self._interval = seconds_between_lines
        self._start = self._last = time.monotonic()
        self._tokens = 0
        self._shards = 0

    def advance(self, num_tokens: int) -> None:
        """Count tokens, and write a line if the last one is long enough ago."""
        self._tokens += num_tokens
        if time.monotonic() - self._last >= self._interval:
            self._write()

    def committed(self, task: str) -> None:
        """Count a shard, and write a line after the last one."""
        self._shards += 1
        if self._shards == self._total_shards:
            self._write()

    def lost(self, task: str, shard: int, num_tokens: int, reason: str) -> None:
        """Take tokens back, and say why."""
        self._tokens -= num_tokens
        self._stream.write(_lost_line(self._name, task, shard, reason) + "\n")
        self._stream.flush()

    def _write(self) -> None:
        self._last = time.monotonic()
        rate = self._tokens / max(self._last - self._start, 1e-9)
        left = (self._total_tokens - self._tokens) / max(rate, 1e-9)
        self._stream.write(
            f"{self._name}: {self._tokens:,} of {self._total_tokens:,} tokens, "
            f"{self._shards} of {self._total_shards} {self._done}, "
            f"{rate:,.0f} tokens/s, {left:,.0f} s left\n"
        )
        self._stream.flush()


class _BarProgress:
    def __init__(
        self, bar: rich.progress.Progress, total_tokens: int, total_shards: int, name: str
    ) -> None:
        self._bar = bar
        self._name = name
        self._total_shards = total_shards
        self._shards = 0
        self._row = bar.add_task(name, total=total_tokens, rate="", shards=f"0/{total_shards}")

    def advance(self, num_tokens: int) -> None:
        self._bar.advance(self._row, num_tokens)
        speed = self._bar.tasks[0].speed
        self._bar.update(self._row, rate="" if speed is None else f"{speed:,.0f} tokens/s")

    def committed(self, task: str) -> None:
        self._shards += 1
        self._bar.update(self._row, shards=f"{self._shards}/{self._total_shards}")

    def lost(self, task: str, shard: int, num_tokens: int, reason: str) -> None:
        self._bar.advance(self._row, -num_tokens)
        self._bar.console.print(_lost_line(self._name, task, shard, reason), highlight=False)


def _lost_line(name: str, task: str, shard: int, reason: str) -> str:
    return f"{name}: shard {shard} of {task} is computed again from its start, because {reason}"


@contextmanager
def open_progress(
    *, total_tokens: int, total_shards: int, name: str = "capture", done: str = "shards committed"
) -> Iterator[Progress]:
    """A bar on standard error if that is a terminal, else a line every ten seconds.

    Args:
        total_tokens: tokens that will go through the model.
        total_shards: shards, or whatever the work consists of.
        name: what is done.
        done: what is said of the shards that are done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield LineProgress(
            total_tokens=total_tokens,
            total_shards=total_shards,
            stream=sys.stderr,
            name=name,
            done=done,
        )
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TextColumn(f"{{task.fields[shards]}} {done.partition(' ')[0]}"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("left"),
    )
    with rich.progress.Progress(*columns, console=console, speed_estimate_period=60) as bar:
        yield _BarProgress(bar, total_tokens, total_shards, name)


@contextmanager
def open_steps(name: str, *, total: int | None = None, unit: str) -> Iterator[Callable[[], None]]:
    """A counter for work of many like steps: a bar on a terminal, silent elsewhere.

    Args:
        name: what is done.
        total: number of steps, if it is known.
        unit: what is counted.
    """
    console = Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(f"{{task.completed:,.0f}} {unit}"),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        row = bar.add_task(name, total=total)
        yield lambda: bar.advance(row)
