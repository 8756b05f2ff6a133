"""`actlake serve` under load: every answer compared, a slow query beside, a replica killed.

    python benchmarks/service_load.py --seconds 120

The store has statistics of the size of Mistral-7B's MLPs: 32 layers x 14,336 neurons x 10 tasks.
"""

import argparse
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from ray_app.client import Client, ServiceError
from storage import Store, create_store, layout

RUN = "mistral-1"
TASKS = [f"task-{number}" for number in range(10)]
POSITIONS = 1000
SLOW = "select count(*) from range(1000000000000) t(i) where i % 1000003 = 7"


def value(task: int, layer: int, neuron: np.ndarray) -> np.ndarray:
    """The mean activation of neurons, which answers are compared with."""
    return ((neuron * 7919 + layer * 104729 + task * 1299709) % 10_007) / 1000


def write_store(root: Path, *, layers: int, width: int) -> Store:
    store = create_store(root)
    for index, task in enumerate(TASKS):
        parts = [stats(index, layer, width) for layer in range(layers)]
        file = store.files.put_table(
            layout.stats_path(RUN, task, 0, 0), "stats", pa.concat_tables(parts)
        )
        counts = {"num_samples": 1, "num_tokens": POSITIONS, "num_counted": POSITIONS}
        store.commit(run=RUN, task=task, shard=0, counts=counts, files=[file])
    sites = [{"site": "mlp", "layer": n, "width": width, "head_dim": None} for n in range(layers)]
    store.files.put_json(
        layout.run_path(RUN),
        {
            "run": RUN, "study": "load", "created": "2026-01-31 12:00:00", "reference": None,
            "model": {"source": "synthetic", "modality": "language", "num_layers": layers,
                      "num_neurons": layers * width},
            "capture": {"top": 0}, "sites": sites,
            "tasks": [{"task": task, "source": "none", "num_shards": 1} for task in TASKS],
            "shards": [{"task": task, "shard": 0} for task in TASKS],
        },
    )  # fmt: skip
    return store


def stats(task: int, layer: int, width: int) -> pa.Table:
    neuron = np.arange(width)
    z, zeros = value(task, layer, neuron), np.zeros(width)
    return pa.table(
        {
            "shard": np.zeros(width, np.int32), "site": ["mlp"] * width,
            "layer": np.full(width, layer, np.int16), "neuron": neuron.astype(np.int32),
            "head": pa.nulls(width, pa.int16()), "n": np.full(width, POSITIONS), "mean": z,
            "m2": zeros, "abs_sum": POSITIONS * z, "sqrt_sum": POSITIONS * np.sqrt(z),
            "pos_sum": POSITIONS * z, "neg_sum": zeros, "pos_count": POSITIONS * (z > 0),
            "nonzero_count": POSITIONS * (z > 0), "min": z, "max": z,
        }
    )  # fmt: skip


class Load:
    """Clients that ask and compare until they are told to stop."""

    def __init__(self, url: str, token: str, *, layers: int, width: int) -> None:
        self.url, self.token, self.layers, self.width = url, token, layers, width
        self.stop = threading.Event()
        self.seconds: dict[str, list[float]] = {}
        self.failed: list[tuple[float, str]] = []
        self.wrong: list[str] = []
        self.slow = Counter[str]()
        self._questions: list[Callable[[Client, random.Random], bool]] = [
            self.one_neuron, self.one_neuron, self.neuron_page, self.one_layer, self.tasks
        ]  # fmt: skip

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        with Client(self.url, self.token) as client:
            while not self.stop.is_set():
                ask = chance.choice(self._questions)
                since = time.perf_counter()
                try:
                    if not ask(client, chance):
                        self.wrong.append(ask.__name__)
                except ServiceError as error:
                    self.failed.append((time.time(), f"{error.kind} {error.status} {error}"[:120]))
                    continue
                self.seconds.setdefault(ask.__name__, []).append(time.perf_counter() - since)

    def slow_client(self) -> None:
        with Client(self.url, self.token) as client:
            while not self.stop.is_set():
                try:
                    client.sql(SLOW, timeout_seconds=10)
                    self.slow["answered"] += 1
                except ServiceError as error:
                    self.slow[error.kind] += 1

    def one_neuron(self, client: Client, chance: random.Random) -> bool:
        layer, neuron = chance.randrange(self.layers), chance.randrange(self.width)
        query = "select task, abs from neuron_stats where layer = $layer and neuron = $neuron"
        rows = client.sql(query, timeout_seconds=60, layer=layer, neuron=neuron).to_pylist()
        return {row["task"]: row["abs"] for row in rows} == self._expected(layer, neuron)

    def neuron_page(self, client: Client, chance: random.Random) -> bool:
        layer, neuron = chance.randrange(self.layers), chance.randrange(self.width)
        found = client.get(f"/api/runs/{RUN}/neurons/mlp/{layer}/{neuron}")
        shown = {row["task"]: row["abs"] for row in found["statistics"]}
        return shown == self._expected(layer, neuron)

    def one_layer(self, client: Client, chance: random.Random) -> bool:
        layer, task = chance.randrange(self.layers), chance.randrange(len(TASKS))
        query = (
            "select count(*) as n, max(abs) as most from neuron_stats "
            "where task = $task and layer = $layer"
        )
        (row,) = client.sql(query, timeout_seconds=60, task=TASKS[task], layer=layer).to_pylist()
        most = value(task, layer, np.arange(self.width)).max()
        return bool(row["n"] == self.width and np.isclose(row["most"], most, rtol=1e-12))

    def tasks(self, client: Client, chance: random.Random) -> bool:
        found = client.get(f"/api/runs/{RUN}")
        return [task["task"] for task in found["tasks"]] == TASKS

    def _expected(self, layer: int, neuron: int) -> dict[str, float]:
        return {
            task: float(POSITIONS * value(index, layer, np.array([neuron]))[0] / POSITIONS)
            for index, task in enumerate(TASKS)
        }


def serve(
    store: str, folder: Path, replicas: int, slots: int
) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray_app", "serve", store, "--port", str(port), "--replicas",
               str(replicas), "--slots", str(slots),
               "--token-file", str(folder / "token")]  # fmt: skip
    log = (folder / "serve.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    while b"open " not in (folder / "serve.log").read_bytes():
        if process.poll() is not None:
            raise SystemExit((folder / "serve.log").read_text())
        time.sleep(0.5)
    return process, f"http://127.0.0.1:{port}"


def processes(serve: psutil.Process, name: str) -> list[psutil.Process]:
    found = []
    for process in serve.children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def resident(serve: psutil.Process) -> int:
    """Bytes of replicas and their query processes."""
    total = 0
    for name in ("ServeReplica", "ray_app.service.slot"):
        for process in processes(serve, name):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
    return total


def watch(load: Load, root: psutil.Process, seconds: float, kill_after: float | None) -> float:
    """Print memory while the load runs, and kill a replica in the middle; when that was."""
    begun, killed = time.time(), 0.0
    while (passed := time.time() - begun) < seconds:
        done = sum(map(len, load.seconds.values()))
        print(f"{passed:5.0f} s  {done:6,} answers  {resident(root) >> 20:6,} MiB", flush=True)
        if kill_after is not None and not killed and passed >= kill_after:
            victim = processes(root, "ServeReplica")[0]
            killed = time.time()
            victim.kill()
            print(f"killed replica {victim.pid}", flush=True)
        time.sleep(10)
    return killed


def report(load: Load, killed: float, seconds: float) -> None:
    every = np.concatenate([np.array(times) for times in load.seconds.values()])
    for name, times in [*sorted(load.seconds.items()), ("all", every)]:
        p50, p99 = np.percentile(times, [50, 99])
        print(f"{name:<12}{len(times):7,}   p50 {p50:6.2f} s   p99 {p99:6.2f} s")
    lost = [text for at, text in load.failed if killed and at >= killed]
    other = [text for at, text in load.failed if not killed or at < killed]
    print(f"{len(every) / seconds:.1f} answers/s; wrong answers: {len(load.wrong)}")
    print(f"errors before the kill: {len(other)} {Counter(other)}")
    print(f"errors after the kill:  {len(lost)} {Counter(lost)}")
    print(f"slow queries beside: {dict(load.slow)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=14_336)
    parser.add_argument("--kill-after", type=float, help="kill a replica after so many seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write_store(folder / "store", layers=args.layers, width=args.width)
        process, url = serve(store.files.root, folder, args.replicas, args.slots)
        try:
            token = (folder / "token").read_text().strip()
            load = Load(url, token, layers=args.layers, width=args.width)
            print(f"{args.clients} clients, {args.replicas} replicas x {args.slots} processes, "
                  f"{args.layers * args.width:,} neurons x {len(TASKS)} tasks")  # fmt: skip
            with ThreadPoolExecutor(args.clients + 1) as threads:
                sent = [threads.submit(load.client, seed) for seed in range(args.clients)]
                sent.append(threads.submit(load.slow_client))
                try:
                    root = psutil.Process(process.pid)
                    killed = watch(load, root, args.seconds, args.kill_after)
                finally:
                    load.stop.set()
                for one in sent:
                    one.result()
            report(load, killed, args.seconds)
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
