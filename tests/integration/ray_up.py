"""`ray up cluster.local.yaml`, driven for real: two hosts over ssh, a capture as a job, `ray down`.

    python tests/integration/ray_up.py

The hosts are those of hosts.py, each with an sshd; a third is the desk at which somebody types the
commands of docs/cluster.md. Of cluster.local.yaml only the two addresses are filled in. The store
is on an S3-compatible server, for which the hosts have a ~/actlake.env. After `ray down` the
cluster is started a second time, for an analysis. The machine must not be busy: Ray gives itself
half a minute to start.

One thing is not as on machines of one's own: ~/actlake-env is there already, an environment that
finds the packages of this Python, where `python3 -m venv` and pip would install 6.5 GB from the
network. Its pip may not use the network. So the set-up commands run as they are, but pip has only
the project itself to build and install; a requirement that this Python lacks is an error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import yaml

from chaos import make_model
from hosts import (
    HOME,
    PATIENCE,
    ROOT,
    Host,
    HostsError,
    Network,
    end,
    require_whole,
    s3_server,
    say,
    why_no_hosts,
)

_BUCKET = "ray-up"
_CLUSTER = "--log-style pretty cluster.local.yaml"
_SUBMIT = "ray job submit --log-style pretty --working-dir studies --"
_DECORATION = re.compile(r"\x1b\[[\d;]*m|^[\d-]{10} [\d:,]{12}\s+[A-Z]+ \S+ -- ", re.MULTILINE)
"""Colours, and when and where in Ray a line was logged."""
_PROGRAMS = {
    "pip": (
        "from pip._internal.cli.main import main",
        "main([*sys.argv[1:], '--no-index', '--no-build-isolation'])",
    ),
    "ray": ("from ray.scripts.scripts import main", "main()"),
}
"""Programs of the hosts' environment that its set-up finds there: what they import and call."""


class Terminal:
    """A host at which commands are typed, in its clone of this project."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._environment = {
            **os.environ,
            "HOME": str(HOME),
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": "http://localhost:8265",
        }

    def type(self, line: str) -> str:
        """Run a command to its end, with a transcript; its output."""
        sys.stdout.write(f"$ {line}\n")
        start = time.monotonic()
        with self.start(f"timeout {PATIENCE:.0f} {line}") as process:
            assert process.stdout is not None
            output = ""
            for raw in process.stdout:
                output += (text := _DECORATION.sub("", raw.decode().rstrip()) + "\n")
                sys.stdout.write(text if text.strip() else "")
                sys.stdout.flush()
        say(f"status {process.returncode} after {time.monotonic() - start:.0f} s")
        if process.returncode != 0:
            raise HostsError(f"`{line}` failed with status {process.returncode}.")
        return output

    def start(self, line: str) -> subprocess.Popen[bytes]:
        """Start a command, which ends with the host at the latest."""
        return subprocess.Popen(
            self._host.command("sh", "-c", f"cd ~/actlake && {line}"),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


def why_not() -> str | None:
    """Why this machine cannot play a cluster that is reached over ssh; None if it can."""
    return why_no_hosts("rsync", "ssh", "ssh-keygen", "sshd")


def write_study(folder: Path) -> Path:
    """A study of two replicas, of which each needs all CPUs of a host."""
    make_model(folder / "model")
    study = {
        "name": "ray-up",
        "model": {"source": str(folder / "model")},
        "tasks": {
            "mail": {"files": "package:email/*.py"},
            "web": {"files": "package:http/*.py"},
            "mixed": {"mixture": ["mail", "web"]},
        },
        "reference": "mixed",
        "capture": {
            "tokens": 512,
            "max_length": 64,
            "long_documents": "split",
            "batch_tokens": 64,
            "shard_tokens": 128,
        },
        "resources": {"replicas": 2, "cpus_per_stage": os.cpu_count()},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def drive_ray_up(study: Path, *, again: bool) -> list[str]:
    """Start a cluster of two hosts with Ray's launcher, capture a study on it, and end it.

    Args:
        study: what `write_study` wrote; its folder is copied to both hosts.
        again: whether the cluster is started a second time, for an analysis.

    Returns:
        SHA-256 of all committed files, by path, as lines.

    Raises:
        HostsError: if a command fails, or does not do what it should.
    """
    with ExitStack() as stack:
        network = Network(stack)
        settings = stack.enter_context(s3_server(network.address, _BUCKET))
        head, worker, desk = (network.start_host(number) for number in (1, 2, 3))
        key = _make_key(desk)
        _clone(desk)
        for host in (head, worker):
            _make_environment(host)
            variables = "".join(f"{name}={value}\n" for name, value in settings.items())
            _home(host, "actlake.env").write_text(variables)
            host.copy_private([study.parent])
            _serve_ssh(host, key)
        _fill_in(_home(desk, "actlake/cluster.local.yaml"), head.address, worker.address)
        shutil.copy(study, _home(desk, "actlake/studies"))
        store = f"s3://{_BUCKET}/store"
        terminal = Terminal(desk)
        terminal.type("ray get-auth-token --generate")
        _start_cluster(terminal, head, worker)
        stack.callback(end, terminal.start("ray dashboard cluster.local.yaml"))
        _wait_for_dashboard(desk)
        terminal.type(f"{_SUBMIT} actlake capture {study.name} --store {store}")
        _require_both_hosts(terminal)
        terminal.type(f"ray down --yes {_CLUSTER}")
        _wait_for_end(head)
        if again:
            _wait_for_end(worker)
            _start_cluster(terminal, head, worker)
            terminal.type(f"{_SUBMIT} actlake analyse {store}")
            terminal.type(f"ray down --yes {_CLUSTER}")
            _wait_for_end(head)
        return require_whole(store)


def _home(host: Host, name: str) -> Path:
    """Where this machine finds a file of a host's home folder."""
    return Path(f"/proc/{host.init}/root{HOME}/{name}")


def _make_key(desk: Host) -> str:
    script = f"mkdir -m 700 {HOME}/.ssh && ssh-keygen -q -t ed25519 -N '' -f {HOME}/.ssh/id_ed25519"
    desk.run("sh", "-c", script)
    return _home(desk, ".ssh/id_ed25519.pub").read_text()


def _serve_ssh(host: Host, key: str) -> None:
    _home(host, ".bashrc").touch()
    _home(host, ".ssh").mkdir(mode=0o700)
    _home(host, ".ssh/authorized_keys").write_text(key)
    host.run(
        "sh", "-c",
        "mount -t tmpfs tmpfs /run && mkdir /run/sshd && "
        "ssh-keygen -q -t ed25519 -N '' -f /run/sshd/key && "
        "$(which sshd) -f /dev/null -h /run/sshd/key -o UsePAM=no -E /tmp/sshd.log",
    )  # fmt: skip


def _make_environment(host: Host) -> None:
    """Make ~/actlake-env, as the docstring of this module says."""
    folder = HOME / "actlake-env"
    host.run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    (packages,) = _home(host, "actlake-env").glob("lib/python3*/site-packages")
    (packages / "of-this-python.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name, (imports, calls) in _PROGRAMS.items():
        program = _home(host, f"actlake-env/bin/{name}")
        program.write_text(f"#!{folder}/bin/python\nimport sys\n{imports}\nsys.exit({calls})\n")
        program.chmod(0o755)


def _clone(desk: Host) -> None:
    """Copy this project without what git leaves out: all of it would be read by `ray up`."""
    desk.run(
        "rsync", "--archive", "--exclude=.git", "--filter=:- .gitignore",
        f"{ROOT}/", f"{HOME}/actlake",
    )  # fmt: skip


def _fill_in(path: Path, head: str, worker: str) -> None:
    """Replace the addresses of cluster.local.yaml."""
    text = path.read_text()
    for example, address in (("192.0.2.10", head), ("192.0.2.11", worker)):
        if text.count(example) != 1:
            raise HostsError(f"{path.name} does not name {example} once.")
        text = text.replace(example, address)
    path.write_text(text)


def _start_cluster(terminal: Terminal, head: Host, worker: Host) -> None:
    terminal.type(f"ray up --yes {_CLUSTER}")
    try:
        _wait_until(f"Ray on {worker.address}", lambda: _runs_ray(worker))
        _wait_until("both nodes", lambda: _num_nodes(terminal) == 2)
    except HostsError as error:
        log = head.run("tail", "-n", "50", "/tmp/ray/session_latest/logs/monitor.log")
        raise HostsError(f"{error} The autoscaler's log ends so:\n{log}") from error


def _wait_for_end(host: Host) -> None:
    start = time.monotonic()
    _wait_until(f"the end of Ray on {host.address}", lambda: not _runs_ray(host))
    say(f"Ray on {host.address} has ended, {time.monotonic() - start:.0f} s later")


def _wait_until(what: str, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise HostsError(f"waited {PATIENCE:.0f} s for {what}, in vain.")
        time.sleep(0.5)


def _runs_ray(host: Host) -> bool:
    names = host.run("sh", "-c", "cat /proc/[0-9]*/comm || true").split()
    return not {"gcs_server", "raylet"}.isdisjoint(names)


def _num_nodes(terminal: Terminal) -> int:
    status = terminal.type(f"ray exec {_CLUSTER} 'RAY_AUTH_MODE=token ray status'")
    return sum(int(count) for count in re.findall(r"^ (\d+) local\.cluster\.node", status, re.M))


def _wait_for_dashboard(desk: Host) -> None:
    desk.run("bash", "-c", "until (: > /dev/tcp/localhost/8265) 2> /dev/null; do sleep 0.1; done")


def _require_both_hosts(terminal: Terminal) -> None:
    listed = terminal.type("ray list actors --filter class_name=StageActor --format json")
    nodes = {actor["node_id"] for actor in json.loads(listed)}
    if len(nodes) != 2:
        raise HostsError(f"the stages ran on {len(nodes)} host(s), not on both.")


def main() -> None:
    """Run the script, the long form."""
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"not run: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        drive_ray_up(write_study(Path(folder)), again=True)


if __name__ == "__main__":
    main()
