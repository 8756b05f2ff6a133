"""Hosts on one machine, for tests of clusters: namespaces with addresses, and an object store.

Each host is a network namespace with its own address and a process and mount namespace with its own
/tmp, home and shared memory, as far as Ray can tell a machine of its own. All else is this
machine's: the project and its Python are at the same place in every host. Needs root, and a kernel
that allows namespaces, a bridge and virtual Ethernet pairs.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec

from storage import open_store, verify_store

ROOT = Path(__file__).parents[2]
USER, HOME = "actlake", Path("/tmp/home")
"""The user in each host, who is root by another name, and the home folder."""
PATIENCE = 300.0
"""Seconds after which something that should have happened will not."""
_TOOLS = ("ip", "mount", "nsenter", "tar", "unshare")


class HostsError(RuntimeError):
    """The machine or the cluster did not do what a script needs."""


@dataclass(frozen=True, slots=True)
class Host:
    """A running host."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    """The process that keeps the namespaces; its child is process 1 of the host."""
    init: int
    """Process 1 of the host, as this machine numbers it."""

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs in the host."""
        return ["nsenter", "--target", str(self.init), "--mount", "--pid", "--net", *arguments]

    def run(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """Run a command in the host to its end; its output."""
        return _run(self.command(*arguments), environment=environment)

    def copy(self, path: Path) -> None:
        """Copy a file or folder of this machine to the same place in the host."""
        with subprocess.Popen(["tar", "-cPf", "-", str(path)], stdout=subprocess.PIPE) as packed:
            subprocess.run(self.command("tar", "-xPf", "-"), stdin=packed.stdout, check=True)

    def copy_private(self, paths: Sequence[Path]) -> None:
        """Copy those paths that the host does not share with this machine."""
        for path in paths:
            if path.is_relative_to("/tmp"):
                self.copy(path)

    def kill(self) -> None:
        """Cut the host off, then end everything in it: what a power failure looks like."""
        _run(["ip", "netns", "exec", self.name, "ip", "link", "set", "eth0", "down"])
        os.kill(self.init, signal.SIGKILL)
        self.holder.wait()


class Network:
    """A bridge, the hosts on it, and this machine's address on it."""

    def __init__(self, stack: ExitStack) -> None:
        number = os.getpid() % 9000 + 1000
        self._stack = stack
        self._prefix = f"al{number}"
        self._subnet = f"10.77.{number % 250}"
        self.address = f"{self._subnet}.254"
        bridge = f"{self._prefix}br"
        _run(["ip", "link", "add", bridge, "type", "bridge"])
        stack.callback(_run, ["ip", "link", "del", bridge])
        _run(["ip", "address", "add", f"{self.address}/24", "dev", bridge])
        _run(["ip", "link", "set", bridge, "up"])
        self._bridge = bridge

    def start_host(self, number: int) -> Host:
        """Start a host; it ends with the network."""
        name, address = f"{self._prefix}h{number}", f"{self._subnet}.{number}"
        outside = f"{self._prefix}v{number}"
        inside = ["ip", "netns", "exec", name]
        _run(["ip", "netns", "add", name])
        self._stack.callback(_run, ["ip", "netns", "del", name])
        _run(["ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name])
        # A namespace may outlive its name for a while, and would keep its end of the pair.
        self._stack.callback(_run, ["ip", "link", "del", outside])
        _run(["ip", "link", "set", outside, "master", self._bridge, "up"])
        _run([*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0"])
        _run([*inside, "ip", "link", "set", "eth0", "up"])
        _run([*inside, "ip", "link", "set", "lo", "up"])
        # Leads nowhere; but from its route Ray tells which address is this host's.
        _run([*inside, "ip", "route", "add", "default", "dev", "eth0"])
        mounts = f"{_own_tmp()} && mount -t tmpfs tmpfs /dev/shm && {_own_home()}"
        holder = subprocess.Popen(
            [*inside, "unshare", "--mount", "--propagation", "private", "--pid", "--fork",
             "--kill-child", "--mount-proc", "sh", "-c",
             # Process 1 waits for whatever ends in the host, as Ray expects that somebody does.
             f"{mounts} && echo ready || exit; sleep infinity & wait"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self._stack.callback(end, holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise HostsError(f"host {name} did not start: the kernel refuses its namespaces.")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        return Host(name, address, holder, int(children[0]))


def why_no_hosts(*programs: str) -> str | None:
    """Why this machine cannot play several hosts that use some programs; None if it can."""
    missing = [name for name in (*_TOOLS, *programs) if shutil.which(name) is None]
    if missing:
        return f"hosts need the programs {', '.join(missing)}, which are not installed"
    if os.geteuid() != 0:
        return "hosts need root, to make network namespaces"
    try:
        with ExitStack() as stack:
            Network(stack).start_host(1)
    except (HostsError, subprocess.CalledProcessError) as error:
        return f"the kernel does not allow what hosts need: {error}"
    return None


@contextmanager
def s3_server(address: str, bucket: str) -> Iterator[dict[str, str]]:
    """An S3-compatible server on an address, with a bucket.

    Yields the environment variables that lead to it, which this process has as well meanwhile.
    """
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", address, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT_URL": f"http://{address}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ |= settings
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((address, port)).close()
                break
            except ConnectionRefusedError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise HostsError("the S3 server did not start.") from None
                time.sleep(0.1)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
        yield settings
    finally:
        end(server)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def require_whole(root: str) -> list[str]:
    """SHA-256 of all committed files of a store, by path, as lines.

    Raises:
        HostsError: if the store is damaged, or its run is not complete.
    """
    store = open_store(root)
    report = verify_store(store)
    if report.problems:
        raise HostsError(f"the store is damaged: {report.problems[0]}")
    if store.sql("select bool_and(is_complete) from runs").fetchall() != [(True,)]:
        raise HostsError(f"the run is not complete: {report.num_shards} shards are committed.")
    say(f"verified: {report.num_shards} shards, {report.num_files} files, all whole")
    start = len(store.files.root) + 1
    files = store.sql("select filename, sha256 from committed_files order by filename").fetchall()
    return [f"{sha256} {name[start:]}" for name, sha256 in files]


def say(text: str) -> None:
    """Print a line of the transcript."""
    sys.stdout.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stdout.flush()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, whatever it does."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _own_tmp() -> str:
    """Shell commands that give a host an empty /tmp, but for this project and its Python."""
    commands = ["mount -t tmpfs tmpfs /mnt"]
    for place in sorted({ROOT, Path(sys.prefix)}):
        if place.is_relative_to("/tmp"):
            inside = shlex.quote(f"/mnt/{place.relative_to('/tmp')}")
            commands.append(f"mkdir -p {inside} && mount --bind {shlex.quote(str(place))} {inside}")
    return " && ".join([*commands, "mount --rbind /mnt /tmp"])


def _own_home() -> str:
    """Shell commands that give root another name and home; ssh asks for no environment variable."""
    line = f"{USER}:x:0:0::{HOME}:/bin/bash"
    users = f"(echo {line}; cat /etc/passwd) > /tmp/passwd && mount --bind /tmp/passwd /etc/passwd"
    return f"mkdir -p {HOME} && {users}"


def _run(command: Sequence[str], *, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE
    )
    if done.returncode != 0:
        raise HostsError(f"{' '.join(command)} failed: {(done.stdout + done.stderr).strip()}")
    return done.stdout
