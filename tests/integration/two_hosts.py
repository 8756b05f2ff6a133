"""Two hosts on one machine: a capture on a Ray cluster whose worker host dies in the middle.

    python tests/integration/two_hosts.py STUDY

The hosts are those of hosts.py. The store is on an S3-compatible server that both reach. The
study's files below /tmp are copied into each host.
"""

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

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
from storage import StoreFiles

_BUCKET = "two-hosts"
_HEAD = ("--head", "--port=6379", "--include-dashboard=false", "--disable-usage-stats")


def capture_on_two_hosts(study: Path, copies: Sequence[Path], *, kill_after: int) -> list[str]:
    """Capture a study over two hosts, kill the worker host, and finish the run.

    Args:
        study: a study of two replicas of one CPU each, so that each host holds one.
        copies: folders that both hosts need.
        kill_after: committed shards after which the worker host dies.

    Returns:
        SHA-256 of all committed files, by path, as lines.

    Raises:
        HostsError: if the run is not complete and whole in the end.
    """
    with ExitStack() as stack:
        network = Network(stack)
        environment = _environment(stack.enter_context(s3_server(network.address, _BUCKET)))
        root = f"s3://{_BUCKET}/store"
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
        stack.callback(end, driver)
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
            stack.callback(end, again)
            if again.wait() != 0:
                raise HostsError("the second capture did not finish the run either.")
        return require_whole(root)


def _prepare(host: Host, token: str, copies: Sequence[Path], environment: dict[str, str]) -> None:
    script = f"mkdir -p ~/.ray && echo {token} > ~/.ray/auth_token && chmod 600 ~/.ray/auth_token"
    host.run("sh", "-c", script, environment=environment)
    host.copy_private(copies)


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
    deadline = time.monotonic() + PATIENCE
    while f"alive {count}" not in (
        found := head.run(sys.executable, "-c", script, environment=environment)
    ):
        if time.monotonic() > deadline:
            raise HostsError(f"{count} nodes did not come together: {found}")


def _wait_for_commits(root: str, count: int, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while _num_commits(root) < count:
        if driver.poll() is not None:
            raise HostsError(f"the driver ended with status {driver.returncode} too early.")
        if time.monotonic() > deadline:
            raise HostsError(f"there are not {count} commits after {PATIENCE:.0f} s.")
        time.sleep(0.2)


def _num_commits(root: str) -> int:
    return len(StoreFiles(root).list("runs/*/commits/*/*.json"))


def _environment(settings: dict[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        **settings,
        "HOME": str(HOME),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        # So that a host that went silent is given up within seconds.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
    }


def main() -> None:
    """Run the script on a study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--copy", type=Path, action="append", default=[])
    parser.add_argument("--kill-after", type=int, default=3, metavar="SHARDS")
    args = parser.parse_args()
    reason = why_no_hosts()
    if reason is not None:
        raise SystemExit(f"not run: {reason}.")
    copies = [path.resolve() for path in args.copy]
    capture_on_two_hosts(args.study.resolve(), copies, kill_after=args.kill_after)


if __name__ == "__main__":
    main()
