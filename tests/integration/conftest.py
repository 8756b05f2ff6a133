"""The `actlake` command as its users meet it: in a process of its own, with a real Ray cluster."""

import fcntl
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import yaml

from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import begin_run
from ray_app.study import load_study
from storage import create_store, open_store

_MARK = "ACTLAKE_TEST_PROCESS"
_PATIENCE = 120.0
"""Seconds after which something that should have happened will not."""


class Command:
    """A running `actlake` command, with all processes that it starts."""

    def __init__(self, arguments: list[str], environment: dict[str, str], *, terminal: bool):
        self._mark = uuid.uuid4().hex
        self._chunks: list[bytes] = []
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self._terminal = ours if terminal else None
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("actlake")), *arguments],
            env={**environment, _MARK: self._mark},
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal if terminal else None,
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(ours,))
        self._reader.start()

    @property
    def output(self) -> str:
        """What the command has printed so far."""
        return b"".join(self._chunks).decode()

    def processes(self) -> list[psutil.Process]:
        """The command's processes that are alive: the driver, Ray's own, and workers."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def workers(self) -> list[psutil.Process]:
        """The processes of its stage actors."""
        return [p for p in self.processes() if "StageActor" in " ".join(p.cmdline())]

    def wait_until(self, happened: Callable[[], object], what: str) -> None:
        """Wait until something has happened while the command runs."""
        deadline = time.monotonic() + _PATIENCE
        while not happened():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {_PATIENCE:.0f} s:\n{self.output}"
            time.sleep(0.01)

    def press_control_c(self) -> None:
        """Type Ctrl-C on the command's terminal."""
        assert self._terminal is not None
        os.write(self._terminal, b"\x03")

    def kill(self) -> None:
        """Send SIGKILL to the driver and all Ray processes of its group, in the midst of work."""
        assert self.process.poll() is None, f"ended before it was killed:\n{self.output}"
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        """The command's exit status, once all its output is read."""
        status = self.process.wait(_PATIENCE)
        self._reader.join(_PATIENCE)
        return status

    def left_behind(self) -> list[psutil.Process]:
        """Its processes that are still alive a while after it ended; Ray's end when they see it."""
        _, alive = psutil.wait_procs(self.processes(), _PATIENCE)
        return alive

    def sweep(self) -> None:
        """End whatever is left of it."""
        for process in self.processes():
            process.kill()
        self.process.wait()
        self._reader.join(_PATIENCE)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return (
                process.environ().get(_MARK) == self._mark
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.Error:
            return False

    def _read(self, descriptor: int) -> None:
        while True:
            try:
                chunk = os.read(descriptor, 1 << 16)
            except OSError:  # A terminal that nobody holds any more cannot be read.
                chunk = b""
            if not chunk:
                os.close(descriptor)
                return
            self._chunks.append(chunk)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="session")
def environment() -> Iterator[dict[str, str]]:
    """Variables under which no command joins a Ray cluster of somebody else."""
    # Paths of Unix sockets must be short: pytest's own folders are too deep.
    folder = tempfile.mkdtemp(prefix="actlake-")
    variables = {**os.environ, "RAY_TMPDIR": folder}
    variables.pop("RAY_ADDRESS", None)
    yield variables
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def actlake(environment: dict[str, str]) -> Iterator[Callable[..., Command]]:
    """Starts `actlake` with the given arguments; `terminal` gives it a terminal to talk to."""
    started: list[Command] = []

    def start(*arguments: object, terminal: bool = False) -> Command:
        started.append(Command([str(a) for a in arguments], environment, terminal=terminal))
        return started[-1]

    yield start
    for command in started:
        command.sweep()


@pytest.fixture(scope="session")
def long_study(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Path:
    """A study of about a hundred small shards, which takes a few seconds."""
    study = {
        "name": "long",
        "model": {"source": str(model_folder("llama"))},
        "tasks": {
            "mail": {"files": "package:email/*.py"},
            "web": {"files": "package:http/*.py"},
            "mixed": {"mixture": ["mail", "web"]},
        },
        "capture": {
            "tokens": 3000,
            "max_length": 24,
            "long_documents": "split",
            "batch_tokens": 48,
            "shard_tokens": 96,
        },
        "resources": {"cpus_per_stage": 1},
    }
    path = tmp_path_factory.mktemp("long") / "long.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


@pytest.fixture
def num_committed() -> Callable[[Path], int]:
    """Gives the number of commit records below a store's folder, which may not exist yet."""
    return lambda store: len(list(store.glob("runs/*/commits/*/*.json")))


@pytest.fixture(scope="session")
def committed_files() -> Callable[[Path], dict[str, bytes]]:
    """Gives the content of all files of a store's runs, by path.

    Of run.json, the time at which the run began is left out: it alone is not in the plan. So are
    hidden files, which a killed writer leaves behind and no reader sees, and the record of who
    drives the run.
    """

    def read(root: Path) -> dict[str, bytes]:
        files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in (root / "runs").rglob("*")
            if path.is_file() and not path.name.startswith(".") and path.name != "driver.json"
        }
        for path, content in files.items():
            if path.endswith("run.json"):
                record = open_store(root).run_record(Path(path).parent.name.removeprefix("run="))
                created = f'"created": "{record["created"]}"'.encode()
                assert created in content
                files[path] = content.replace(created, b"")
        return files

    return read


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
    long_study: Path,
    committed_files: Callable[[Path], dict[str, bytes]],
) -> dict[str, bytes]:
    """Files of the long study, captured without Ray and without a pause."""
    root = tmp_path_factory.mktemp("undisturbed")
    study = load_study(long_study)
    run = begin_run(create_store(root), study, inspect_model(study), threads=1)
    driver.capture(run, LocalWorkers(build_stage(run.stage_spec())), NoProgress())
    return committed_files(root)


@pytest.fixture(scope="session")
def ray_cluster(environment: dict[str, str]) -> Iterator[None]:
    """A Ray cluster of six CPUs in this process, for all tests that need one."""
    ray.init(
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=f"{environment['RAY_TMPDIR']}/in-process",
    )
    yield
    ray.shutdown()
