"""A pool of slots: questions queue for a process, run for a bounded time, and can be taken back."""

import asyncio
import itertools
import json
import logging
import sys
from collections.abc import Coroutine
from typing import Any

from ray_app.service.answers import Answer
from ray_app.service.frames import LENGTHS, MAX_HEADER_BYTES, pack
from ray_app.service.settings import ServiceSettings
from storage import ActlakeError

__all__ = ["Pool", "QuestionError"]

_GRACE_SECONDS = 2.0
"""How long an interrupted question may take to end before its process is killed."""
_START_SECONDS = 60.0
_SECONDS_BETWEEN_STARTS = 2.0

_BODY_SLACK = 4 << 20
"""Bytes of a body beyond `max_bytes`: the frame of an Arrow stream, answers that are no rows."""

_log = logging.getLogger(__name__)


class QuestionError(ActlakeError):
    """A question has no answer; `kind` says why, in the words of the HTTP contract."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Pool:
    """Processes that answer questions of one store; `start` first, `stop` at the end."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._idle: asyncio.Queue[_Process] = asyncio.Queue()
        self._processes: set[_Process] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.waiting = 0
        """Questions that wait for a process."""
        self.restarts = 0
        """Processes that took the place of one that died or was killed."""

    @property
    def busy(self) -> int:
        """Processes that answer a question, or are being replaced."""
        return self._settings.slots - self._idle.qsize()

    async def start(self) -> None:
        """Start all processes.

        Raises:
            QuestionError: if one does not begin: the store cannot be opened.
        """
        made = [_Process(self._settings) for _ in range(self._settings.slots)]
        self._processes |= set(made)
        await asyncio.gather(*(process.start() for process in made))
        for process in made:
            self._idle.put_nowait(process)

    async def stop(self) -> None:
        """End all processes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(process.kill() for process in self._processes))

    async def ask(self, question: str, args: dict[str, Any], *, seconds: float) -> Answer:
        """Have one question answered; if the caller is cancelled, the question is stopped.

        Args:
            question: see `Slot.ask`.
            args: its arguments.
            seconds: how long the answer may take, from when a process has begun with it.

        Raises:
            QuestionError: of kind 'busy' if too many wait or it waited too long, 'timeout' if it
                took too long, 'too_large' if it took too much memory, and those of `Slot.ask`.
        """
        process = await self._free_process()
        if not process.is_alive:
            self._later(self._replace(process))
            return await self.ask(question, args, seconds=seconds)
        try:
            async with asyncio.timeout(seconds):
                header, body = await process.ask(question, args)
        except TimeoutError:
            self._later(self._settle(process))
            raise QuestionError(
                "timeout",
                f"the query was stopped after {seconds:g} s: ask for less, or allow more "
                f"timeout_seconds (at most {self._settings.max_seconds:g}).",
            ) from None
        except asyncio.CancelledError:
            self._later(self._settle(process))
            raise
        except (EOFError, OSError) as error:
            self._later(self._replace(process))
            raise QuestionError(
                "too_large",
                "the query ended its process, as too much memory does: ask for less at a time.",
            ) from error
        return self._received(process, header, body)

    def _received(self, process: "_Process", header: dict[str, Any], body: bytes) -> Answer:
        error = header.get("error")
        if error is not None and error["kind"] == "too_large":
            # What the allocator keeps afterwards would be missing for the next question.
            self._later(self._replace(process))
        else:
            self._idle.put_nowait(process)
        if error is not None:
            raise QuestionError(error["kind"], error["message"])
        return Answer(
            media_type=header["media_type"],
            body=body,
            num_rows=header["num_rows"],
            truncated=header["truncated"],
            elapsed_ms=header["elapsed_ms"],
        )

    async def _free_process(self) -> "_Process":
        if self._idle.empty() and self.waiting >= self._settings.max_waiting:
            raise QuestionError(
                "busy", f"{self.waiting} questions wait already: try again in some seconds."
            )
        self.waiting += 1
        try:
            async with asyncio.timeout(self._settings.max_wait_seconds):
                return await self._idle.get()
        except TimeoutError:
            raise QuestionError(
                "busy",
                f"no process was free for {self._settings.max_wait_seconds:g} s: try again later.",
            ) from None
        finally:
            self.waiting -= 1

    async def _settle(self, process: "_Process") -> None:
        """Stop what a process does and make it idle again, or replace it if it goes on."""
        try:
            async with asyncio.timeout(_GRACE_SECONDS):
                await process.interrupt()
        except (TimeoutError, EOFError, OSError):
            await self._replace(process)
        else:
            self._idle.put_nowait(process)

    async def _replace(self, process: "_Process") -> None:
        self.restarts += 1
        await process.kill()
        while not process.is_alive:
            try:
                await process.start()
            except QuestionError:
                _log.exception("a query process did not start; the next try is in a moment")
                await asyncio.sleep(_SECONDS_BETWEEN_STARTS)
        self._idle.put_nowait(process)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Process:
    """One slot as its parent sees it."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._ids = itertools.count()
        self._asked = -1
        self._process: asyncio.subprocess.Process | None = None
        self._reply: asyncio.Task[tuple[dict[str, Any], bytes]] | None = None

    async def start(self) -> None:
        """Start the process and wait until it has opened the store."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ray_app.service.slot",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._send(json.loads(self._settings.model_dump_json()))
                await self._receive()
        except (TimeoutError, EOFError, OSError) as error:
            await self.kill()
            reason = (
                f"it took more than {_START_SECONDS:g} s, so the machine or the store is too busy"
                if isinstance(error, TimeoutError)
                else "its error is in the log of this process"
            )
            raise QuestionError(
                "internal",
                f"a query process cannot open the store {self._settings.store}: {reason}.",
            ) from error

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    async def ask(self, question: str, args: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """See `Slot.ask`; EOFError or OSError if the process dies."""
        self._asked = next(self._ids)
        # A task of its own: who stops waiting for the reply must not leave half of it unread.
        self._reply = asyncio.create_task(self._receive())
        await self._send({"id": self._asked, "question": question, "args": args})
        return await asyncio.shield(self._reply)

    async def interrupt(self) -> None:
        """Stop the question that was asked last, and wait for its end."""
        await self._send({"interrupt": self._asked})
        if self._reply is not None:
            await asyncio.shield(self._reply)

    async def kill(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reply is not None:
            # Whether it came or not, nobody waits for it any more.
            await asyncio.gather(self._reply, return_exceptions=True)
            self._reply = None

    async def _send(self, header: dict[str, Any]) -> None:
        assert self._process is not None  # noqa: S101 - started by the pool
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(pack(header))
        await self._process.stdin.drain()

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._process is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        stream = self._process.stdout
        lengths = LENGTHS.unpack(await stream.readexactly(LENGTHS.size))
        most = (MAX_HEADER_BYTES, self._settings.max_bytes + _BODY_SLACK)
        if any(length > limit for length, limit in zip(lengths, most, strict=True)):
            # The rest would be taken for the next reply, and a bug of the slot may be anything.
            self._process.kill()
            raise EOFError(f"a reply may have {most} bytes, its slot announces {lengths}.")
        header, body = [await stream.readexactly(length) for length in lengths]
        return json.loads(header), body
