"""A Ray of one's own for the service, on the loopback address, which asks for a token.

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storage import ActlakeError

__all__ = ["own_ray"]

_LOOPBACK = "127.0.0.1"
_SECONDS_TO_START = 120.0
_SECONDS_TO_STOP = 60.0
_SECONDS_TO_CONNECT = 10.0
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps Ray from replacing the loopback address by that of the machine, as on macOS and Windows."""


@contextmanager
def own_ray() -> Iterator[Callable[[], None]]:
    """Run a Ray inside the block, and name it in RAY_ADDRESS; or use what RAY_ADDRESS names.

    Actors and jobs inherit the token with the environment; other users of this machine do not.
    Ray ends with the block, and with this process if that is killed (`ray_app.service.keeper`).

    Yields:
        What raises ActlakeError if the Ray of one's own has ended; of another's, it is not asked.

    Raises:
        ActlakeError: if Ray does not start, and says where its log is; or if nothing listens where
            RAY_ADDRESS says.
    """
    if "RAY_ADDRESS" in os.environ:
        _check_listens(os.environ["RAY_ADDRESS"])
        yield lambda: None
        return
    folder = Path(tempfile.mkdtemp(prefix="actlake-ray-"))
    log = folder / "ray.log"
    dashboard, head, agent, clients = _free_ports(4)
    environment = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **_LOOPBACK_ONLY
    }  # fmt: skip
    os.environ |= environment
    keeper = [sys.executable, "-m", "ray_app.service.keeper", str(folder), str(_SECONDS_TO_STOP)]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own words and numbers
                [*keeper, *_command(dashboard, head, agent, clients)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the service, which ends Ray when it has ended itself.
                start_new_session=True,
                env=os.environ | {"RAY_TMPDIR": str(folder)},
            )
        # Leaving it closes the pipe, which tells the keeper, and waits for it.
        stack.enter_context(process)
        _wait(process, dashboard, log)
        os.environ["RAY_ADDRESS"] = f"{_LOOPBACK}:{head}"
        stack.callback(os.environ.pop, "RAY_ADDRESS")
        yield lambda: _check(process, log)


def _check_listens(address: str) -> None:
    """Say at once that no Ray is there, which Ray would try for minutes; words are left to it."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "://" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise ActlakeError(
            f"RAY_ADDRESS must name a Ray that runs, found nothing at {address} "
            f"({error.strerror or error}): start it, or unset RAY_ADDRESS for a Ray of the "
            "service's own."
        ) from error


def _command(dashboard: int, head: int, agent: int, clients: int) -> list[str]:
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        f"--node-ip-address={_LOOPBACK}", f"--port={head}", f"--dashboard-host={_LOOPBACK}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={clients}", "--disable-usage-stats",
    ]  # fmt: skip


def _check(process: "subprocess.Popen[bytes]", log: Path) -> None:
    if process.poll() is not None:
        raise ActlakeError(f"Ray ended, its log says: {_end_of(log)} Start the service again.")


def _end_of(log: Path) -> str:
    """The last words of a log, as one line."""
    return " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-500:]


def _wait(process: "subprocess.Popen[bytes]", dashboard: int, log: Path) -> None:
    """Wait until the dashboard listens, which Ray starts last."""
    end = time.monotonic() + _SECONDS_TO_START
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as tried:
            if tried.connect_ex((_LOOPBACK, dashboard)) == 0:
                return
        time.sleep(0.2)
    raise ActlakeError(f"Ray did not start, its log says: {_end_of(log)}")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
