"""A Ray of one's own for the service, on the loopback address, whose job server asks for a token.

It is started as `ray start` does, because only that can choose all ports: a capture that runs on
this machine has a Ray too. Nothing here imports Ray, which reads the token when it is imported.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storage import ActlakeError

__all__ = ["own_ray"]

_LOOPBACK = "127.0.0.1"
_SECONDS_TO_START = 120.0
_SECONDS_TO_STOP = 20.0


@contextmanager
def own_ray() -> Iterator[None]:
    """Run a Ray inside the block, and name it in RAY_ADDRESS; or use what RAY_ADDRESS names.

    Actors and jobs inherit the token with the environment; other users of this machine do not.

    Raises:
        ActlakeError: if Ray does not start; says where its log is.
    """
    if "RAY_ADDRESS" in os.environ:
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="actlake-ray-"))
    head, agent, dashboard = _free_ports(3)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        f"--node-ip-address={_LOOPBACK}", f"--port={head}", f"--dashboard-host={_LOOPBACK}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        "--disable-usage-stats",
    ]  # fmt: skip
    log = folder / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - the words above and numbers
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for the service, which ends Ray when it has ended itself.
            start_new_session=True,
            env=os.environ | {"RAY_TMPDIR": str(folder)},
        )
    try:
        _wait(process, dashboard, log)
        os.environ["RAY_ADDRESS"] = f"{_LOOPBACK}:{head}"
        yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        process.terminate()
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: "subprocess.Popen[bytes]", dashboard: int, log: Path) -> None:
    """Wait until the dashboard listens, which Ray starts last."""
    end = time.monotonic() + _SECONDS_TO_START
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as tried:
            if tried.connect_ex((_LOOPBACK, dashboard)) == 0:
                return
        time.sleep(0.2)
    last = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-500:]
    raise ActlakeError(f"Ray did not start: {last}")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
