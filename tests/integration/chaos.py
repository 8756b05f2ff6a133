"""Kill stage actors, raylets and drivers of captures at random, and compare what is committed.

    python tests/integration/chaos.py --kills 40 --seed 7

A Ray cluster of a head and several nodes is started on this machine, and a study of many small
shards is captured on it with 2 replicas of 2 stages. All the while processes are killed with
SIGKILL, most after some further commits, others at any moment: while a driver starts, while models
load, while actors are replaced. Nodes that lost their raylet are replaced by new ones, and the
command is given again when the driver died. A capture that is complete is compared with one that
ran undisturbed in this process, and the next begins, until there were enough kills. The choice of
victims and moments follows the seed; what a moment meets depends on the machine.

The exit status is 0 if every file of every store was as it must be.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tokenizers
import torch
import transformers
import yaml

from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.models.loading import quiet_transformers
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run, begin_run
from ray_app.study import load_study
from storage import create_store, open_store, verify_store

NUM_NODES = 3
CPUS_PER_NODE = 2
"""Of six CPUs the capture takes four, so that what one node held finds room on the others."""
CUT = [range(2), range(2, 4)]
PATIENCE = 300.0
"""Seconds without a commit after which a capture hangs."""
PROGRAM = "from ray_app.cli import main; main()"
STOPS_BORNE = 5
"""Times that the command may stop by itself, with a reason, after one kill."""


@dataclass(slots=True)
class Report:
    """What happened; printed as JSON at the end."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    drivers: int = 0
    """Drivers that were started."""
    stopped: list[str] = field(default_factory=list)
    """What drivers said that stopped by themselves."""
    recomputed: int = 0
    """Shards that living drivers gave out again."""
    captures: int = 0
    shards: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)


class Cluster:
    """A head without CPUs, which survives, and nodes whose raylets can be killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        options = {"num_cpus": 0, "include_dashboard": False}
        self._ray = RayCluster(initialize_head=True, head_node_args=options)
        self._nodes = [self._add() for _ in range(NUM_NODES)]

    @property
    def address(self) -> str:
        """What drivers need as RAY_ADDRESS."""
        return str(self._ray.address)

    def actors(self) -> list[psutil.Process]:
        """Processes of stage actors, sorted by id."""
        found = [p for node in self._nodes for p in self._workers(node)]
        return sorted((p for p in found if is_stage_actor(p)), key=lambda p: p.pid)

    def kill_raylet(self, index: int) -> str:
        """Kill one node's raylet, and give the cluster a new node."""
        node = self._nodes.pop(index % len(self._nodes))
        held = sum(map(is_stage_actor, self._workers(node)))
        raylet = self._raylet(node)
        raylet.kill()
        self._ray.remove_node(node, allow_graceful=False)
        self._nodes.append(self._add())
        return f"raylet {raylet.pid} with {held} stage actor(s)"

    def end(self) -> None:
        """End all its processes."""
        self._ray.shutdown()

    def _add(self) -> Any:
        return self._ray.add_node(num_cpus=CPUS_PER_NODE, include_dashboard=False)

    def _raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def _workers(self, node: Any) -> list[psutil.Process]:
        return self._raylet(node).children(recursive=True)


def is_stage_actor(process: psutil.Process) -> bool:
    """Whether Ray runs a StageActor in a process; one that just ended is none."""
    try:
        return "StageActor" in " ".join(process.cmdline())
    except psutil.Error:
        return False


class Command:
    """`actlake capture`, given again and again until it succeeds."""

    def __init__(self, study: Path, store: Path, address: str, log: Path) -> None:
        self._arguments = ["capture", str(study), "--store", str(store)]
        self._environment = {**os.environ, "RAY_ADDRESS": address}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Give the command."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *self._arguments],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    @property
    def status(self) -> int | None:
        """Exit status of the driver; None while it lives."""
        assert self._process is not None
        return self._process.poll()

    @property
    def output(self) -> str:
        """What the driver said."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> str:
        """Kill the driver."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return f"driver {self._process.pid}"


class Chaos:
    """Captures one study again and again under kills."""

    def __init__(self, folder: Path, cluster: Cluster, study: Path, report: Report) -> None:
        self._folder = folder
        self._cluster = cluster
        self._study = study
        self._report = report
        self._random = random.Random(report.seed)
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """One line of the log."""
        write(f"{time.monotonic() - self._start:7.1f} s  {text}")

    def capture(self, victims: list[str]) -> Path:
        """Capture once; victims are taken from the list until it is empty.

        Returns:
            Root of the complete store.
        """
        store = self._folder / f"capture-{self._report.captures}"
        log = self._folder / "driver.log"
        command = Command(self._study, store, self._cluster.address, log)
        self._start_driver(command)
        try:
            self._kill_while_it_runs(command, store, victims)
        finally:
            command.kill()
        self._report.captures += 1
        return store

    def _kill_while_it_runs(self, command: Command, store: Path, victims: list[str]) -> None:
        records: dict[str, tuple[int, int]] = {}
        while victims:
            stops = len(self._report.stopped)
            if not self._wait(command, store, self._draw_moment(commit_records(store)), stops):
                break
            if self._kill(command, store, victims[0]):
                victims.pop(0)
            self._compare_records(records, commit_records(store))
        self._wait(command, store, lambda: False, len(self._report.stopped))
        self._compare_records(records, commit_records(store))

    def _draw_moment(self, records: dict[str, Any]) -> Callable[[], bool]:
        """A function that says whether it is time for the next kill."""
        pause = time.monotonic() + self._random.uniform(0, 8)
        wanted = len(records) + self._random.randint(1, 8)
        store = self._folder / f"capture-{self._report.captures}"
        if self._random.random() < 0.3:  # Whatever goes on then.
            return lambda: time.monotonic() > pause
        return lambda: len(commit_records(store)) >= wanted

    def _wait(self, command: Command, store: Path, is_time: Callable[[], bool], stops: int) -> bool:
        """Wait for a moment, and keep a driver running; False if the capture is complete first."""
        last, progress = -1, time.monotonic()
        while not is_time():
            if command.status == 0:
                self._note_recomputed(command)
                return False
            if command.status is not None:
                self._note_stop(command)
                if len(self._report.stopped) - stops > STOPS_BORNE:
                    raise RuntimeError(f"the command stops again and again: {command.output}")
                self._start_driver(command)
            if (found := len(commit_records(store))) != last:
                last, progress = found, time.monotonic()
            if time.monotonic() - progress > PATIENCE:
                raise RuntimeError(f"no commit for {PATIENCE:.0f} s: {command.output}")
            time.sleep(0.02)
        return True

    def _kill(self, command: Command, store: Path, kind: str) -> bool:
        """Kill a process of some kind; whether there was one."""
        if kind == "driver":
            self._note_recomputed(command)
            victim = command.kill()
        elif kind == "raylet":
            victim = self._cluster.kill_raylet(self._random.randrange(NUM_NODES))
        else:
            victim = self._kill_actor(command, store)
        if not victim:
            return False
        self._report.kills[kind] += 1
        number = self._report.kills.total()
        self.say(f"kill {number}: {victim}, at {len(commit_records(store))} commits")
        if kind == "driver":
            self._start_driver(command)
        return True

    def _kill_actor(self, command: Command, store: Path) -> str:
        chosen = self._random.random()
        self._wait(command, store, lambda: bool(self._cluster.actors()), len(self._report.stopped))
        actors = self._cluster.actors()
        if not actors:
            return ""  # The capture was complete first.
        actor = actors[int(chosen * len(actors))]
        os.kill(actor.pid, signal.SIGKILL)
        return f"stage actor {actor.pid}, one of {len(actors)}"

    def _start_driver(self, command: Command) -> None:
        command.start()
        self._report.drivers += 1

    def _note_recomputed(self, command: Command) -> None:
        lost = re.findall(r"shard (\d+) of (\w+) is computed again", command.output)
        self._report.recomputed += len(lost)

    def _note_stop(self, command: Command) -> None:
        self._note_recomputed(command)
        lines = command.output.splitlines() or ["nothing"]
        self._report.stopped.append(lines[-1])
        self.say(f"the driver stopped with status {command.status} and said: {lines[-1]}")

    def _compare_records(self, seen: dict[str, Any], now: dict[str, Any]) -> None:
        """No commit record may vanish or be written a second time."""
        for path, stamp in seen.items():
            if now.get(path) != stamp:
                self._report.problems.append(f"{path} was committed twice or lost")
        seen.update(now)


def write(text: str) -> None:
    """Some lines on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def commit_records(store: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of writing) of each commit record."""
    found = {}
    for path in store.glob("runs/*/commits/*/shard-*.json"):
        stat = path.stat()
        found[f"{path.parent.name}/{path.name}"] = stat.st_ino, stat.st_mtime_ns
    return found


def digests(store: Path) -> dict[str, str]:
    """SHA-256 of every file of a store's runs; of run.json, without the time that it was begun."""
    found = {}
    for path in sorted((store / "runs").rglob("*")):
        if not path.is_file() or path.name.startswith(".") or path.name == "driver.json":
            continue
        content = path.read_bytes()
        if path.name == "run.json":
            content = re.sub(rb'"created": "[^"]*"', b"", content)
        found[path.relative_to(store).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def compare(store: Path, undisturbed: Run, report: Report) -> str:
    """Hold a complete store against the undisturbed one; what was found, for the log."""
    root = Path(undisturbed.store.files.root)
    expected, found = digests(root), digests(store)
    differing = [p for p in expected.keys() | found.keys() if expected.get(p) != found.get(p)]
    report.problems += [f"{store.name}: {path} differs" for path in sorted(differing)]
    opened = open_store(store)
    report.problems += verify_store(opened).problems
    (counted,) = opened.table(
        "select count(*) as rows, count(distinct (task, sample, position)) as tokens from tokens"
    ).to_pylist()
    planned = sum(shard.num_tokens for shard in undisturbed.shards)
    if counted != {"rows": planned, "tokens": planned}:
        report.problems.append(f"{store.name}: {counted} where {planned} tokens were planned")
    report.shards += len(undisturbed.shards)
    report.tokens += counted["tokens"]
    one = hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
    other = hashlib.sha256(json.dumps(sorted(expected.items())).encode()).hexdigest()
    return (
        f"{store.name}: {len(found)} files with hash {one[:16]}, undisturbed {len(expected)} with "
        f"{other[:16]}; {counted['tokens']:,} tokens, {planned:,} planned"
    )


def make_model(folder: Path) -> None:
    """A llama of four layers whose tokens are bytes."""
    quiet_transformers()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {char: index for index, char in enumerate(alphabet, 1)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_study(folder: Path, shards: int) -> Path:
    """A study of about so many shards of 32 batches."""
    make_model(folder / "model")
    study = {
        "name": "chaos",
        "model": {"source": str(folder / "model")},
        "tasks": {
            "mail": {"files": "package:email/*.py"},
            "web": {"files": "package:http/*.py"},
            "mixed": {"mixture": ["mail", "web"]},
        },
        "capture": {
            "tokens": shards * 2048 // 3,
            "max_length": 64,
            "long_documents": "split",
            "batch_tokens": 64,
            "shard_tokens": 2048,
        },
        "resources": {
            "stages": len(CUT), "replicas": 2, "cpus_per_stage": 1,
        },
    }  # fmt: skip
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def capture_undisturbed(study_path: Path, store: Path) -> Run:
    """Capture in this process, in the same stages."""
    study = load_study(study_path)
    run = begin_run(create_store(store), study, inspect_model(study), threads=1)
    workers = LocalWorkers(*map(build_stage, run.stage_specs(CUT)))
    driver.capture(run, workers, NoProgress())
    return run


def draw_victims(kills: int, seed: int) -> list[str]:
    """Kinds of processes in the order in which they die: half of them actors."""
    kinds = ["actor", "driver", "actor", "raylet"] * (kills // 4 + 1)
    victims = kinds[:kills]
    random.Random(seed).shuffle(victims)
    return victims


@contextmanager
def cluster_of_its_own(folder: Path) -> Iterator[Cluster]:
    """A cluster that nobody joins by accident, and that notices dead nodes within seconds."""
    os.environ |= {
        "RAY_TMPDIR": str(folder),
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
    }
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=240, help="shards of one capture, about")
    given = parser.parse_args()
    report = Report(given.seed)
    # Paths of Unix sockets must be short.
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        study = write_study(folder, given.shards)
        undisturbed = capture_undisturbed(study, folder / "undisturbed")
        victims = draw_victims(given.kills, given.seed)
        with cluster_of_its_own(folder / "ray") as cluster:
            chaos = Chaos(folder, cluster, study, report)
            chaos.say(f"undisturbed: {len(undisturbed.shards)} shards; seed {given.seed}")
            while victims:
                chaos.say(compare(chaos.capture(victims), undisturbed, report))
    write(json.dumps({name: getattr(report, name) for name in Report.__slots__}, indent=2))
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
