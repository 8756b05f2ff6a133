"""All measurements of "Modularity in Transformers" (arXiv 2408.17324) on two small models, offline.

    python studies/demo_full.py demo-store

The small counterparts of studies/mistral-7b-modularity.yaml and vit-cifar20-modularity.yaml:
SmolLM2-135M on six kinds of text and a vision transformer on ten digits, each trained and with
random weights. Every step is a command of actlake that anyone can give; steps whose results are in
the store already are answered from there, so that a stopped demo goes on where it was. At the end
stands what each step took, and STORE/report.html shows it all.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import psutil

from storage import open_store

ACTLAKE = str(Path(sys.executable).with_name("actlake"))
STUDIES = Path(__file__).parent

NEWEST_RUNS = """
select study, init, max_by(run, created) as run from runs
where is_complete and coalesce(quantization, 'none') = 'none' group by all
"""
EXPERTS = "select distinct analysis from cluster_layers where list_contains($runs, run) order by 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counterpart:
    """One of the two models, and sizes that let it be measured in minutes."""

    study: str
    """Name of the study and of its file."""
    capture: tuple[str, ...]
    """Options of the capture."""
    tokens: int
    """Counted tokens of each task that ablated models are evaluated on."""
    cross_tokens: int
    """The same for cross-evaluation, which measures every task for every task."""
    ablation: tuple[str, ...]
    """Options of `ablate`."""
    clusters: int
    """Experts of each layer."""
    projections: tuple[str, ...]
    """Whose rows are clustered."""
    routing: tuple[str, ...]
    """Options of `routing`."""

    @property
    def file(self) -> str:
        """The study file."""
        return str(STUDIES / f"{self.study}.yaml")


SMOLLM2 = Counterpart(
    study="smollm2-demo",
    capture=("--tokens", "1024"),
    tokens=1024,
    cross_tokens=512,
    ablation=("--fractions", "0.01,0.05", "--seeds", "3", "--sites", "mlp"),
    clusters=48,
    projections=("up", "gate"),
    routing=("--layers", "14", "--tokens", "512", "--shares", "0.1,0.3,0.5"),
)
DIGITS = Counterpart(
    study="digits-vit",
    capture=(),
    tokens=1360,
    cross_tokens=680,
    ablation=("--fractions", "0.02,0.05,0.1", "--seeds", "3", "--sites", "mlp"),
    clusters=16,
    projections=("up",),
    routing=("--tokens", "1360", "--shares", "0.1,0.3,0.5"),
)


@dataclass(slots=True)
class Clock:
    """What each step took."""

    rows: list[tuple[str, float, float]] = field(default_factory=list)
    """Name, seconds, seconds of processor time."""

    def run(self, *command: str, shown: str) -> None:
        """Run a command, and say which; the demo ends if it fails."""
        print(f"\n$ {shown}", flush=True)
        start = time.monotonic()
        with subprocess.Popen(command) as process:  # noqa: S603 - our own words
            processor = _watch(process)
        self.rows.append((shown, time.monotonic() - start, processor))
        if process.returncode:
            sys.exit(process.returncode)

    def actlake(self, *arguments: str) -> None:
        """Run a command of actlake."""
        self.run(ACTLAKE, *arguments, shown=" ".join(("actlake", *arguments)))

    def lines(self) -> Iterator[str]:
        """A table."""
        yield f"{'seconds':>8} {'processor':>10}  step"
        for name, seconds, processor in self.rows:
            yield f"{seconds:8.0f} {processor:10.0f}  {name}"
        yield f"{sum(r[1] for r in self.rows):8.0f} {sum(r[2] for r in self.rows):10.0f}  all"


def _watch(process: "subprocess.Popen[bytes]") -> float:
    """Wait for a process; processor time of it and its descendants, looked up twice a second.

    What ends is counted as it was when last seen: Ray's workers are reaped by others.
    """
    seen: dict[int, float] = {}
    has_ended = Event()

    def look() -> None:
        while not has_ended.wait(0.5):
            try:
                family = psutil.Process(process.pid)
                for one in [family, *family.children(recursive=True)]:
                    with one.oneshot():
                        times = one.cpu_times()
                    seen[one.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue  # One of them has just ended.

    watcher = Thread(target=look, daemon=True)
    watcher.start()
    process.wait()
    has_ended.set()
    watcher.join()
    return sum(seen.values())


def main() -> None:
    """Measure both models, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", help="folder of the store")
    store, clock = parser.parse_args().store, Clock()
    for script, folder in (("make_demo_texts", "demo-texts"), ("make_digits_vit", "demo-digits")):
        command = (sys.executable, str(STUDIES / f"{script}.py"), folder)
        clock.run(*command, shown=f"python studies/{script}.py {folder}")
    for one in (SMOLLM2, DIGITS):
        measure(store, one, clock)
    clock.actlake("report", store, "--out", str(Path(store) / "report.html"))
    print("\n" + "\n".join(clock.lines()))


def measure(store: str, one: Counterpart, clock: Clock) -> None:
    """Capture a model and its random twin, and make every measurement of the paper."""
    for twin in ((), ("--set", "model.init=random")):
        clock.actlake("run", one.file, "--store", store, "--new-run", *one.capture, *twin)
    trained, random = (newest_run(store, one.study, init) for init in ("pretrained", "random"))
    clock.actlake("drift", store, trained, random)
    of_trained = (store, "--run", trained)
    evaluation = ("--study", one.file, "--tokens")
    clock.actlake("ablate", *of_trained, *evaluation, str(one.tokens), *one.ablation)
    clock.actlake("crosseval", *of_trained, *evaluation, str(one.cross_tokens))
    clusters = ("--clusters", str(one.clusters))
    for run in (trained, random):
        for projection in one.projections:
            clock.actlake("experts", store, "--run", run, *clusters, "--projection", projection)
    clock.actlake("experts", *of_trained, *clusters, "--method", "random")
    clock.actlake("align", store, *experts_of(store, trained, random), "--fractions", "0.05,0.1")
    clock.actlake("routing", store, *experts_of(store, trained), "--study", one.file, *one.routing)


def newest_run(store: str, study: str, init: str) -> str:
    """The newest complete run of a study, trained or random."""
    rows = open_store(store).table(NEWEST_RUNS).to_pylist()
    return next(str(r["run"]) for r in rows if (r["study"], r["init"]) == (study, init))


def experts_of(store: str, *runs: str) -> list[str]:
    """Ids of all experts of some runs."""
    rows = open_store(store).table(EXPERTS, {"runs": list(runs)}).to_pylist()
    return [str(row["analysis"]) for row in rows]


if __name__ == "__main__":
    main()
