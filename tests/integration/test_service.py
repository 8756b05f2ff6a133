"""`actlake serve` for real: Ray Serve with two replicas, one of which dies, and jobs."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import grpc
import psutil
import pytest

from browser import CHROMIUM, Browser, Page
from ray_app.client import Client, ServiceError
from storage import create_store
from written_runs import importances, write_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

_SECONDS = 240


def _wait_until(happened: Callable[[], object], what: str) -> None:
    end = time.monotonic() + _SECONDS
    while not happened():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.3)


@pytest.fixture
def served(
    tmp_path: Path, write_study: Callable[..., Path]
) -> Iterator[tuple[psutil.Process, str, str]]:
    """The process, the URL and the token of a service with two replicas and jobs."""
    store = create_store(tmp_path / "store")
    write_run(store, "small-1", importances(1))
    study = write_study(capture={"tokens": 60, "max_length": 24, "shard_tokens": 30})
    (tmp_path / "studies").mkdir()
    study.rename(tmp_path / "studies" / "tiny.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "serve.log"
    command = [
        sys.executable, "-m", "ray_app", "serve", store.files.root, "--port", str(port),
        "--replicas", "2", "--slots", "1", "--studies", str(tmp_path / "studies"),
        "--token-file", str(tmp_path / "token"),
    ]  # fmt: skip
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path
        )
    try:
        _wait_until(lambda: process.poll() is not None or b"open " in log.read_bytes(), "it serves")
        assert process.poll() is None, log.read_text()
        token = (tmp_path / "token").read_text().strip()
        assert token in log.read_text()  # Shown at the first start.
        yield psutil.Process(process.pid), f"http://127.0.0.1:{port}", token
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(90)
        _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "the service leaves processes behind"
    assert process.returncode == 0


def _replicas(service: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in service.children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_replicas_and_jobs(
    served: tuple[psutil.Process, str, str], subtests: pytest.Subtests, tmp_path: Path
) -> None:
    service, url, token = served
    with Client(url, token) as client:
        _ports_beyond_the_loopback_want_the_token_of_ray(service)
        _a_killed_replica_loses_only_what_it_was_answering(service, client)
        _a_job_runs_to_its_end(client)
        with subtests.test("a job from the page"):
            if CHROMIUM is None:
                pytest.skip("needs Chromium on the PATH")
            with Browser(tmp_path) as browser:
                _a_job_is_watched_on_the_page(Page(browser, f"{url}/", token), client)
        _a_job_can_be_cancelled(client)
    with Client(url, "wrong") as stranger, pytest.raises(ServiceError, match="token") as refused:
        stranger.get("/api/runs")
    assert refused.value.status == 401


def _a_killed_replica_loses_only_what_it_was_answering(
    service: psutil.Process, client: Client
) -> None:
    _wait_until(lambda: len(_replicas(service)) == 2, "there are two replicas")
    answers: list[float] = []
    lost: list[ServiceError] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(
                    client.sql("select sum(abs) as s from neuron_stats").to_pylist()[0]["s"]
                )
            except ServiceError as error:
                lost.append(error)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    _wait_until(lambda: len(answers) > 20, "answers come")
    victim = _replicas(service)[0]
    victim.kill()
    after = len(answers)
    _wait_until(lambda: len(answers) > after + 20, "the other replica answers")
    _wait_until(lambda: len(_replicas(service)) == 2, "the dead replica is replaced")
    stop.set()
    for thread in asking:
        thread.join()
    expected = sum(z.sum() for z in importances(1).values())
    assert all(answer == pytest.approx(expected) for answer in answers)
    assert len(lost) <= len(asking)


def _ports_beyond_the_loopback_want_the_token_of_ray(service: psutil.Process) -> None:
    _wait_until(lambda: len(_ports_beyond_the_loopback(service)) == 2, "each replica has a port")
    for name, port in _ports_beyond_the_loopback(service):
        assert "ServeReplica" in name
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def _ports_beyond_the_loopback(service: psutil.Process) -> list[tuple[str, int]]:
    """Name of the process, and port."""
    return [
        (process.cmdline()[0], connection.laddr.port)
        for process in service.children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and not ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback
    ]


def _a_job_runs_to_its_end(client: Client) -> None:
    (study,) = client.get("/api/studies")["studies"]
    job = client.submit("capture", study["name"], overrides={"capture.top": "1"})
    states = ("succeeded", "failed", "stopped")
    path = f"/api/jobs/{job['id']}"
    _wait_until(lambda: client.get(path)["job"]["state"] in states, "the job ends")
    ended = client.get(path)["job"]
    log = client.get(f"{path}/log")["text"]
    assert ended["state"] == "succeeded", log
    assert ended["progress"]["done"] == ended["progress"]["total"] > 1
    assert "is complete" in log
    (row,) = client.sql("select top, is_complete from runs where run <> 'small-1'").to_pylist()
    assert row == {"top": 1, "is_complete": True}


def _a_job_is_watched_on_the_page(page: Page, client: Client) -> None:
    page.open("#/jobs")
    page.wait("document.querySelector('.start')")
    page.fill(".start select:has(option[value=analyse])", "capture")
    page.fill(".start textarea", "capture.top=2")
    page.click("Start")
    page.wait("document.querySelector('.log')")
    [job] = [known for known in client.get("/api/jobs")["jobs"] if known["ended"] is None]
    assert page.browser.run("location.hash") == f"#/jobs/{job['id']}"
    page.wait("/succeeded|failed/.test(document.querySelector('dd .tag')?.innerText)", _SECONDS)
    page.wait("document.querySelector('.log').textContent.includes('is complete')")
    assert page.text("dd .tag") == "succeeded"
    total = client.get(f"/api/jobs/{job['id']}")["job"]["progress"]["total"]
    assert page.text(".progress") == f"{total} of {total} shards"
    where = "where top = 2 and is_complete"
    [row] = client.sql(f"select run, num_shards from runs {where}").to_pylist()
    assert row["num_shards"] == total
    page.go(f"#/runs/{row['run']}")
    page.wait(f"document.querySelector('h2')?.innerText === {row['run']!r}")
    assert page.browser.errors == []


def _a_job_can_be_cancelled(client: Client) -> None:
    job = client.submit("capture", "tiny.yaml", tokens=50)
    assert client.cancel(job["id"])["state"] in ("pending", "running", "stopped")
    path = f"/api/jobs/{job['id']}"
    _wait_until(lambda: client.get(path)["job"]["state"] == "stopped", "the job is stopped")
    assert {known["id"] for known in client.get("/api/jobs")["jobs"]} >= {job["id"]}
