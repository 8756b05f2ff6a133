"""A run has one living driver; a dead one does not block it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ray_app.capture.errors import CaptureError
from ray_app.lock import DriverLock, drive_alone
from storage import StoreFiles

PATH = "runs/run=r/driver.json"


def test_a_second_driver_is_refused_while_the_first_is_alive(store_root: str) -> None:
    files = StoreFiles(store_root)
    with (
        drive_alone(files, "r"),
        pytest.raises(CaptureError, match=r"'r' is being captured by another process \(\d+ on"),
        drive_alone(files, "r"),
    ):
        pass
    with drive_alone(files, "r"):
        pass


def test_a_killed_driver_does_not_block_its_run(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from ray_app.lock import drive_alone\n"
        "from storage import StoreFiles\n"
        f"with drive_alone(StoreFiles({str(tmp_path)!r}), 'r'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program])
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    files = StoreFiles(tmp_path)
    assert files.get_json(PATH)["owner"] is not None
    # Nobody waits for beats of a process of this machine that is gone, not even if it is still
    # listed, because its parent has not asked how it ended.
    with drive_alone(files, "r", seconds_between_beats=1e6) as lock:
        lock.check()
    assert killed.wait() == -9


def record_of_elsewhere(**changes: Any) -> dict[str, Any]:
    return {
        "owner": "x",
        "host": "elsewhere/pid:[1]",
        "pid": 1,
        "started": 0.0,
        "beat": 0,
    } | changes


def test_a_driver_of_another_machine_is_dead_when_its_record_stays_the_same(
    store_root: str,
) -> None:
    files = StoreFiles(store_root)
    files.put_json(PATH, record_of_elsewhere())
    with drive_alone(files, "r", seconds_between_beats=0.1) as lock:
        lock.check()


def test_a_driver_of_another_machine_is_alive_while_its_record_changes(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path)

    class Elsewhere(DriverLock):
        def _read(self) -> dict[str, Any]:
            record = record_of_elsewhere(beat=time.monotonic())
            files.put_json(PATH, record)
            return record

    with pytest.raises(CaptureError, match=r"process \(1 on elsewhere\): wait for it"):
        Elsewhere(files, "r", 0.1).acquire()


def test_a_driver_whose_run_was_taken_over_is_told_and_leaves_the_record(store_root: str) -> None:
    files = StoreFiles(store_root)
    lock = DriverLock(files, "r", 0.01)
    lock.acquire()
    files.put_json(PATH, record_of_elsewhere(owner="another"))
    with pytest.raises(CaptureError, match="another process took over the run 'r'"):
        lock.check()
    lock.keep_beating(threading.Event())
    lock.release()
    assert files.get_json(PATH)["owner"] == "another"


def test_the_record_changes_while_the_driver_lives(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path)
    with drive_alone(files, "r", seconds_between_beats=0.05):
        deadline = time.monotonic() + 60
        while files.get_json(PATH)["beat"] < 2:
            assert time.monotonic() < deadline, "it never changed"
            time.sleep(0.01)
