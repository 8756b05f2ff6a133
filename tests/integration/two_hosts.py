"""Two hosts on one machine: a capture on a Ray cluster whose worker host dies in the middle.

    python tests/integration/two_hosts.py STUDY

Each host is a network namespace with its own address and a process and mount namespace with its own
/tmp, home and shared memory, as far as Ray can tell a machine of its own. The store is on an
S3-compatible server that both reach. The study's files below /tmp are copied into each host. Needs
root, and a kernel that allows namespaces, a bridge and virtual Ethernet pairs.
"""

import argparse
import os
import secrets
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

from storage import StoreFiles, open_store, verify_store

ROOT = Path(__file__).parents[2]
BUCKET = "two-hosts"
TOOLS = ("ip", "mount", "nsenter", "tar", "unshare")
_HEAD = ("--head", "--port=6379", "--include-dashboard=false", "--disable-usage-stats")
_PATIENCE = 180.0
"""Seconds after which something that should have happened will not."""


class TwoHostsError(RuntimeError):
    """The machine or the cluster did not do what the script needs."""


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

    def run(self, *arguments: str, environment: dict[str, str]) -> str:
        """Run a command in the host to its end; its output."""
        return _run(self.command(*arguments), environment=environment)

    def copy(self, path: Path) -> None:
        """Copy a folder of this machine to the same place in the host."""
        with subprocess.Popen(["tar", "-cPf", "-", str(path)], stdout=subprocess.PIPE) as packed:
            subprocess.run(self.command("tar", "-xPf", "-"), stdin=packed.stdout, check=True)

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
        mounts = f"{_own_tmp()} && mount -t tmpfs tmpfs /dev/shm && mkdir -p /tmp/home"
        holder = subprocess.Popen(
            [*inside, "unshare", "--mount", "--propagation", "private", "--pid", "--fork",
             "--kill-child", "--mount-proc", "sh", "-c",
             f"{mounts} && echo ready && exec sleep infinity"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self._stack.callback(_end, holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise TwoHostsError(f"host {name} did not start: the kernel refuses its namespaces.")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        return Host(name, address, holder, int(children[0]))


def why_not() -> str | None:
    """Why this machine cannot play two hosts; None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"two hosts need the programs {', '.join(missing)}, which are not installed"
    if os.geteuid() != 0:
        return "two hosts need root, to make network namespaces"
    try:
        with ExitStack() as stack:
            Network(stack).start_host(1)
    except (TwoHostsError, subprocess.CalledProcessError) as error:
        return f"the kernel does not allow what two hosts need: {error}"
    return None


def capture_on_two_hosts(study: Path, copies: Sequence[Path], *, kill_after: int) -> list[str]:
    """Capture a study over two hosts, kill the worker host, and finish the run.

    Args:
        study: a study of two replicas of one CPU each, so that each host holds one.
        copies: folders that both hosts need.
        kill_after: committed shards after which the worker host dies.

    Returns:
        SHA-256 of all committed files, by path, as lines.

    Raises:
        TwoHostsError: if the run is not complete and whole in the end.
    """
    with ExitStack() as stack:
        network = Network(stack)
        environment = _environment(stack.enter_context(_s3_server(network.address)))
        root = f"s3://{BUCKET}/store"
        head, worker = network.start_host(1), network.start_host(2)
        token = secrets.token_hex(32)
        for host in (head, worker):
            _prepare(host, token, [*copies, study], environment)
        _start_ray(head, _HEAD, environment)
        _start_ray(worker, [f"--address={head.address}:6379"], environment)
        environment["RAY_ADDRESS"] = f"{head.address}:6379"
        _wait_for_nodes(head, 2, environment)
        say(f"cluster of {head.address} and {worker.address} is up, with token authentication")
        driver = _start_capture(head, study, root, environment)
        stack.callback(_end, driver)
        _wait_for_commits(root, kill_after, driver)
        worker.kill()
        say(f"worker host {worker.address} killed after {_num_commits(root)} commits")
        code = driver.wait()
        say(f"the driver ended with status {code}, {_num_commits(root)} shards committed")
        if code != 0:
            third = network.start_host(3)
            _prepare(third, token, [*copies, study], environment)
            _start_ray(third, [f"--address={head.address}:6379"], environment)
            _wait_for_nodes(head, 2, environment)
            say(f"worker host {third.address} takes its place; the same command again")
            again = _start_capture(head, study, root, environment)
            stack.callback(_end, again)
            if again.wait() != 0:
                raise TwoHostsError("the second capture did not finish the run either.")
        return _require_whole(root)


def say(text: str) -> None:
    """Print a line of the transcript."""
    sys.stdout.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stdout.flush()


def _prepare(host: Host, token: str, copies: Sequence[Path], environment: dict[str, str]) -> None:
    script = f"mkdir -p ~/.ray && echo {token} > ~/.ray/auth_token && chmod 600 ~/.ray/auth_token"
    host.run("sh", "-c", script, environment=environment)
    for path in copies:
        if path.is_relative_to("/tmp"):
            host.copy(path)


def _start_ray(host: Host, arguments: Sequence[str], environment: dict[str, str]) -> None:
    host.run(
        sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--num-cpus=1",
        f"--node-ip-address={host.address}", "--object-store-memory=100000000",
        environment=environment,
    )  # fmt: skip


def _start_capture(
    host: Host, study: Path, root: str, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    script = "from ray_app.cli import main; main()"
    return subprocess.Popen(
        host.command(sys.executable, "-c", script, "capture", str(study), "--store", root),
        env=environment,
    )


def _wait_for_nodes(head: Host, count: int, environment: dict[str, str]) -> None:
    script = (
        "import ray, logging; ray.init(logging_level=logging.ERROR); "
        "print('alive', sum(node['Alive'] for node in ray.nodes()))"
    )
    deadline = time.monotonic() + _PATIENCE
    while f"alive {count}" not in (
        found := head.run(sys.executable, "-c", script, environment=environment)
    ):
        if time.monotonic() > deadline:
            raise TwoHostsError(f"{count} nodes did not come together: {found}")


def _wait_for_commits(root: str, count: int, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while _num_commits(root) < count:
        if driver.poll() is not None:
            raise TwoHostsError(f"the driver ended with status {driver.returncode} too early.")
        if time.monotonic() > deadline:
            raise TwoHostsError(f"there are not {count} commits after {_PATIENCE:.0f} s.")
        time.sleep(0.2)


def _num_commits(root: str) -> int:
    return len(StoreFiles(root).list("runs/*/commits/*/*.json"))


def _require_whole(root: str) -> list[str]:
    store = open_store(root)
    report = verify_store(store)
    if report.problems:
        raise TwoHostsError(f"the store is damaged: {report.problems[0]}")
    if store.sql("select bool_and(is_complete) from runs").fetchall() != [(True,)]:
        raise TwoHostsError(f"the run is not complete: {report.num_shards} shards are committed.")
    say(f"verified: {report.num_shards} shards, {report.num_files} files, all whole")
    start = len(store.files.root) + 1
    files = store.sql("select filename, sha256 from committed_files order by filename").fetchall()
    return [f"{sha256} {name[start:]}" for name, sha256 in files]


def _environment(endpoint: str) -> dict[str, str]:
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
    return os.environ | {
        "HOME": "/tmp/home",
        "PYTHONPATH": str(ROOT),
        "AWS_ENDPOINT_URL": endpoint,
        "RAY_AUTH_MODE": "token",
        # So that a host that went silent is given up within seconds.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
    }


@contextmanager
def _s3_server(address: str) -> Iterator[str]:
    """An S3-compatible server on an address; this process's environment points at it."""
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
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection((address, port)).close()
                break
            except ConnectionRefusedError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise TwoHostsError("the S3 server did not start.") from None
                time.sleep(0.1)
        yield settings["AWS_ENDPOINT_URL"]
    finally:
        _end(server)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _run(command: Sequence[str], *, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=_PATIENCE
    )
    if done.returncode != 0:
        raise TwoHostsError(f"{' '.join(command)} failed: {(done.stdout + done.stderr).strip()}")
    return done.stdout


def main() -> None:
    """Run the script on a study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--copy", type=Path, action="append", default=[])
    parser.add_argument("--kill-after", type=int, default=3, metavar="SHARDS")
    args = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"not run: {reason}.")
    copies = [path.resolve() for path in args.copy]
    capture_on_two_hosts(args.study.resolve(), copies, kill_after=args.kill_after)


def _own_tmp() -> str:
    """Shell commands that give a host an empty /tmp, but for this project and its Python."""
    commands = ["mount -t tmpfs tmpfs /mnt"]
    for place in sorted({ROOT, Path(sys.prefix)}):
        if place.is_relative_to("/tmp"):
            inside = shlex.quote(f"/mnt/{place.relative_to('/tmp')}")
            commands.append(f"mkdir -p {inside} && mount --bind {shlex.quote(str(place))} {inside}")
    return " && ".join([*commands, "mount --rbind /mnt /tmp"])


if __name__ == "__main__":
    main()
