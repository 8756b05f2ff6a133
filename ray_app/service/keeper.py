"""What ends the service's own Ray when the service ends, however that happens.

It starts the command that it is given, and watches its standard input, which only the service holds
the other end of: when that closes, by a signal that no handler sees as well, it ends all that came
of the command, and removes the folder.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading

import psutil

__all__ = ["keep", "main"]

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_AFTER_KILL = 10.0


def keep(command: list[str], folder: str, *, seconds_to_stop: float, lifeline: int) -> None:
    """Run a command until it ends or the lifeline closes; nothing of it is left afterwards.

    Args:
        command: program and arguments.
        folder: removed if the lifeline closed; kept if the command ended, since its log is there.
        seconds_to_stop: how long the command may take to end after SIGTERM.
        lifeline: descriptor to read from, whose end is what is waited for.
    """
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:  # noqa: S603 - our parent's
        while process.poll() is None and not told.is_set():
            if select.select([lifeline], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
                told.set()
        _end(process, seconds_to_stop)
    if told.is_set():
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """End a process and all that it started, those in sessions of their own too."""
    family = _family()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    # What lost its parent is still in this session; what has a session of its own was a descendant.
    left = {*family, *_family()}
    for one in left:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=_SECONDS_AFTER_KILL)


def _family() -> set[psutil.Process]:
    """Descendants of this process, and the other processes of its session.

    What left both, in a session of its own and with a parent that has died, is not found: Ray
    starts a watcher for each such process, which ends it with its parent.
    """
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == os.getsid(0) and process.pid != os.getpid():
                found.add(process)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def main() -> None:
    """Keep a command: FOLDER SECONDS COMMAND..."""
    folder, seconds, *command = sys.argv[1:]
    keep(command, folder, seconds_to_stop=float(seconds), lifeline=sys.stdin.fileno())


if __name__ == "__main__":
    main()
