"""A slot: one process that answers one question at a time over a locked connection.

A process, because DuckDB's memory limit does not hold for single values (``repeat('x', 10^9)``),
and because some work cannot be interrupted: the process has a limit of its own, and can be killed.

Frames (`ray_app.service.frames`) go over its standard input and output. The parent is
`ray_app.service.pool`.
"""

import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from analysis import AnalysisError
from ray_app.service.answers import Answer, render_rows
from ray_app.service.frames import pack, read_header
from ray_app.service.guard import QueryRefusedError, check_tree
from ray_app.service.questions import QUESTIONS, NotFoundError
from ray_app.service.settings import ServiceSettings
from storage import (
    ActlakeError,
    QueryError,
    QueryInterruptedError,
    QueryMemoryError,
    QueryReadError,
    Store,
    catalog,
    open_store,
)
from storage.following import Following

__all__ = ["ServedStore", "Slot", "main", "serve"]

_BATCH_ROWS = 1024
_MESSAGE_CHARACTERS = 2000
"""Most characters of an error's message; at most 12 bytes each as JSON."""
_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (QueryRefusedError, "refused"),
    (QueryInterruptedError, "timeout"),
    (QueryMemoryError, "too_large"),
    (MemoryError, "too_large"),
    (QueryReadError, "internal"),
    (QueryError, "syntax"),
    (NotFoundError, "not_found"),
    (AnalysisError, "invalid"),
    (ActlakeError, "internal"),
)
"""What an answer says of each error; the first that fits."""


class ServedStore(Store):
    """A store whose connection is locked and bounded, and follows the store all the same."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__(open_store(settings.store).files)
        self._freshness = settings.freshness_seconds
        self._locked = Following(
            self.files, threads=settings.threads, memory_limit=f"{settings.memory_mb}MB"
        )
        catalog.lock(self._locked.connection, self.files)
        self._locked.refresh()
        self._checked = time.monotonic()

    @property
    def connection(self) -> Any:
        """The connection; it shows what was committed meanwhile."""
        if time.monotonic() - self._checked >= self._freshness:
            self._locked.refresh()
            self._checked = time.monotonic()
        return self._locked.connection

    def interrupt(self) -> None:
        """Stop the query that another thread runs."""
        catalog.interrupt(self._locked.connection)


class Slot:
    """Answers questions of one store, one at a time; only `interrupt` may be called beside."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._store = ServedStore(settings)

    def ask(self, question: str, args: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Answer one question.

        Args:
            question: 'sql', or one of `QUESTIONS`.
            args: its arguments.

        Returns:
            What the headers say, and the body; or the kind and message of an error, and nothing.
        """
        since = time.perf_counter()
        try:
            answer = self._sql(since, **args) if question == "sql" else self._other(question, args)
        except (ActlakeError, MemoryError) as error:
            return _told(error), b""
        except Exception:
            # A bug: its traceback is for the log, and the process goes on with other questions.
            traceback.print_exc()
            message = "the service failed at this; its log says how."
            return {"error": {"kind": "internal", "message": message}}, b""
        return {
            "media_type": answer.media_type,
            "num_rows": answer.num_rows,
            "truncated": answer.truncated,
            "elapsed_ms": answer.elapsed_ms,
        }, answer.body

    def interrupt(self) -> None:
        """Stop the query that runs."""
        self._store.interrupt()

    def _other(self, question: str, args: dict[str, Any]) -> Answer:
        found = QUESTIONS[question](self._store, **args)
        body = json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        return Answer("application/json", body)

    def _sql(
        self, since: float, *, query: str, params: dict[str, Any], form: Any, max_rows: int
    ) -> Answer:
        connection = self._store.connection
        check_tree(catalog.syntax_tree(connection, query))
        with catalog.stream(connection, query, params, batch_rows=_BATCH_ROWS) as rows:
            return render_rows(
                rows, form, max_rows=max_rows, max_bytes=self._settings.max_bytes, since=since
            )


def _told(error: BaseException) -> dict[str, Any]:
    kind = next(kind for known, kind in _KINDS if isinstance(error, known))
    message = str(error) or "the answer needs more memory than a query may take."
    if len(message) > _MESSAGE_CHARACTERS:
        # Messages of DuckDB quote the value that they are about, however long it is.
        message = f"{message[:_MESSAGE_CHARACTERS]} ..."
    return {"error": {"kind": kind, "message": message}}


def _limit_memory(settings: ServiceSettings) -> None:
    """Let this process allocate what it has now, and room for one query and its answer."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        held = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    limit = held + settings.process_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer frames until there are no more; the first holds the settings."""
    first = read_header(requests)
    if first is None:
        return
    settings = ServiceSettings.model_validate(first)
    slot = Slot(settings)
    if sys.platform == "linux":
        _limit_memory(settings)
    replies.write(pack({"ready": True}))
    replies.flush()
    asked = _Asked(requests, slot.interrupt)
    while (frame := asked.next()) is not None:
        header, body = slot.ask(frame["question"], frame["args"])
        asked.done()
        replies.write(pack({"id": frame["id"]} | header, body))
        replies.flush()


class _Asked:
    """Frames as a thread reads them, which sees interruptions while the main thread answers."""

    def __init__(self, requests: BinaryIO, interrupt: Callable[[], None]) -> None:
        self._requests = requests
        self._interrupt = interrupt
        self._changed = threading.Condition()
        self._frame: dict[str, Any] | None = None
        self._answered: int | None = None
        threading.Thread(target=self._keep_reading, daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """The next question, once there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None)
            return self._frame

    def done(self) -> None:
        """The question is answered: an interruption that comes now is too late."""
        with self._changed:
            self._frame = None

    def _keep_reading(self) -> None:
        while (frame := read_header(self._requests)) is not None:
            with self._changed:
                if "interrupt" not in frame:
                    self._frame = frame
                    self._changed.notify()
                elif self._frame is not None and self._frame["id"] == frame["interrupt"]:
                    self._interrupt()
        os._exit(0)  # The parent is gone, whatever the main thread computes.


def main() -> None:
    """Be a slot: what libraries print goes to standard error, replies to standard output alone."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
