"""The service's own Ray ends with the service, however that ends; a stand-in for Ray, no Ray."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ray_app.service.own_ray import own_ray
from storage import ActlakeError, create_store

STAND_IN = """
import os, pathlib, signal, socket, subprocess, sys, time
pids, mood, port = sys.argv[1:]
if "stubborn" in mood:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
apart = subprocess.Popen(sleep, start_new_session="ends" not in mood)
children = [subprocess.Popen(sleep), apart]
text = " ".join(str(pid) for pid in [os.getpid(), *(child.pid for child in children)])
pathlib.Path(pids + ".new").write_text(text)
os.rename(pids + ".new", pids)
if "starting" in mood:
    time.sleep(600)
with socket.create_server(("127.0.0.1", int(port))):
    time.sleep(1 if "ends" in mood else 600)
print("the raylet is out of luck")
"""

SERVE = """
import contextlib, sys
from pathlib import Path
from ray_app.commands import serve
from ray_app.service import own_ray

store, stand_in, pids, mood = sys.argv[1:]
own_ray._SECONDS_TO_STOP = 1.0
command = [sys.executable, stand_in, pids, mood]
own_ray._command = lambda dashboard, *others: [*command, str(dashboard)]
serve._serving = lambda settings, host, port, check: contextlib.nullcontext(check)
serve.serve(
    store, host="127.0.0.1", port=0, allowed=(), replicas=100_000, slots=1, memory_mb=64,
    studies=None, token_file=Path(store).parent / "token",
)
"""

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)

Start = Callable[..., tuple[subprocess.Popen[str], list[psutil.Process]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `serve` over a stand-in in some mood; the process, and those of the stand-in."""
    store = create_store(tmp_path / "store").files.root
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "store" / "runs").mkdir()
    (tmp_path / "temporary").mkdir()
    pids = tmp_path / "pids"
    started: list[psutil.Process] = []

    def run(mood: str, *before: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        environment = {"TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": ":".join(sys.path)}
        process = subprocess.Popen(
            [*before, sys.executable, "-c", SERVE, store,
             str(tmp_path / "stand_in.py"), str(pids), mood],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            # Whoever runs the tests may have ignored it, as nohup does.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )  # fmt: skip
        end = time.monotonic() + 30
        while not pids.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        family = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        started.extend([psutil.Process(process.pid), *family])
        return process, family

    yield run
    for one in started:
        if one.is_running():
            one.kill()


def _is_announced(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().startswith("store ")
    assert "token" in process.stdout.readline()


def _nothing_is_left(tmp_path: Path, family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    end = time.monotonic() + 5
    while list((tmp_path / "temporary").iterdir()):
        assert time.monotonic() < end, "the folder of Ray is left"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "mood"),
    [
        *((number, mood) for number in ENDING for mood in ("starting", "up")),
        (signal.SIGTERM, "up and stubborn"),
        (signal.SIGKILL, "starting and stubborn"),
    ],
)
def test_ray_ends_with_the_service(
    start: Start,
    tmp_path: Path,
    number: signal.Signals,
    mood: str,
) -> None:
    process, family = start(mood)
    if "up" in mood:
        _is_announced(process)
    process.send_signal(number)
    output = process.communicate(timeout=20)
    assert process.returncode == (-9 if number == signal.SIGKILL else 0), output
    _nothing_is_left(tmp_path, family)


def test_nohup_goes_on_when_the_terminal_closes(start: Start, tmp_path: Path) -> None:
    process, family = start("up", "nohup")
    _is_announced(process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    _nothing_is_left(tmp_path, family)


def test_a_ray_that_ends_ends_the_service(start: Start, tmp_path: Path) -> None:
    process, family = start("up, ends")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "warning: queries may take" in errors
    assert "Ray ended, its log says: the raylet is out of luck" in errors
    _nothing_is_left(tmp_path, family)


def test_a_ray_of_others_that_is_not_there_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with own_ray() as check:
            check()
    with pytest.raises(ActlakeError, match=f"found nothing at {address} .*refused"), own_ray():
        pass
