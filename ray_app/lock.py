"""One driver per run: a second one is refused while the first is alive.

The driver's record in the run's folder says who drives. It is a plain file that is written whole,
so it works on shared filesystems and object stores alike, and it is never left stuck: a driver of
this machine is dead when its process is gone; one of another machine when its record stops
changing. No clocks of different machines are compared.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

from ray_app.capture.errors import CaptureError
from storage import StoreFiles, layout

__all__ = ["DriverLock", "drive_alone"]

Role = Literal["driver", "compactor"]
_DONE: dict[Role, str] = {"driver": "captured", "compactor": "compacted"}

_SECONDS_BETWEEN_BEATS = 10.0
_BEATS_TO_WAIT = 3
"""A record that does not change for so many beats belongs to a driver that is gone."""
_SECONDS_TO_SETTLE = 0.3
"""Two drivers that start in the same moment both write; then both see who wrote last."""


@contextmanager
def drive_alone(
    files: StoreFiles,
    run: str,
    *,
    role: Role = "driver",
    seconds_between_beats: float = _SECONDS_BETWEEN_BEATS,
) -> Iterator["DriverLock"]:
    """Hold a run for the block.

    Args:
        files: the store's files.
        run: id of the run.
        role: what is done alone; one of each may work at a time.
        seconds_between_beats: how often the record changes while the driver lives.

    Raises:
        CaptureError: if another driver of the run is alive; says where.
    """
    lock = DriverLock(files, run, seconds_between_beats, role)
    lock.acquire()
    stop = threading.Event()
    beating = threading.Thread(target=lock.keep_beating, args=(stop,), daemon=True)
    beating.start()
    try:
        yield lock
    finally:
        stop.set()
        beating.join()
        lock.release()


class DriverLock:
    """The record of who drives a run."""

    def __init__(
        self,
        files: StoreFiles,
        run: str,
        seconds_between_beats: float,
        role: Role = "driver",
    ) -> None:
        self._files = files
        self._run = run
        self._role = role
        self._path = layout.driver_path(run, role)
        self._interval = seconds_between_beats
        self._record: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "host": _host(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "beat": 0,
        }

    def acquire(self) -> None:
        """Take the run over if nobody living drives it.

        Raises:
            CaptureError: if somebody does.
        """
        found = self._read()
        if found is not None and self._is_alive(found):
            raise CaptureError(
                f"the run {self._run!r} is being {_DONE[self._role]} by another process ("
                f"{found['pid']} on {found['host'].split('/')[0]}): wait for it, or end it and run "
                "the same command again."
            )
        self._write()
        time.sleep(_SECONDS_TO_SETTLE)
        self.check()

    def check(self) -> None:
        """Raise CaptureError if another driver took the run over."""
        found = self._read()
        if found is None or found["owner"] != self._record["owner"]:
            raise CaptureError(
                f"another process took over the run {self._run!r}: let it finish, then run the "
                "same command again if shards are left."
            )

    def keep_beating(self, stop: threading.Event) -> None:
        """Change the record again and again until `stop`, or until the run is somebody else's."""
        while not stop.wait(self._interval):
            found = self._read()
            if found is None or found["owner"] != self._record["owner"]:
                return
            self._record["beat"] += 1
            self._write()

    def release(self) -> None:
        """Give the run back, if it is still this driver's."""
        found = self._read()
        if found is not None and found["owner"] == self._record["owner"]:
            self._files.put_json(self._path, {"owner": None})

    def _is_alive(self, found: dict[str, Any]) -> bool:
        if found["host"] == self._record["host"]:
            try:
                process = psutil.Process(found["pid"])
                # A killed driver that nobody has waited for is still listed.
                if process.status() == psutil.STATUS_ZOMBIE:
                    return False
                return bool(process.create_time() == found["started"])
            except psutil.NoSuchProcess:
                return False
        deadline = time.monotonic() + _BEATS_TO_WAIT * self._interval
        while time.monotonic() < deadline:
            time.sleep(self._interval / 4)
            now = self._read()
            if now is None:
                return False
            if now != found:
                return True
        return False

    def _read(self) -> dict[str, Any] | None:
        if not self._files.exists(self._path):
            return None
        record: dict[str, Any] = self._files.get_json(self._path)
        return record if record["owner"] is not None else None

    def _write(self) -> None:
        self._files.put_json(self._path, self._record)


def _host() -> str:
    """The machine, and within it the space in which process ids mean something."""
    space = Path("/proc/self/ns/pid")
    return "/".join([socket.gethostname(), str(space.readlink()) if space.exists() else ""])
