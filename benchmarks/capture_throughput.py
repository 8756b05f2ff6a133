r"""How fast a capture is against a bare forward pass, in this process and on Ray.

    python benchmarks/capture_throughput.py [STUDY] [--task NAME] [--tokens N] [--rounds N] \
        [--set KEY.PATH=VALUE]

Every way computes the same batches. Rounds are interleaved, and a ratio is the median of those
within the rounds, so that a machine that is busy for a while disturbs all ways alike. Captures are
timed to their last commit, start-up excluded. One task of the study is read, up to N counted
tokens, in two shards: writing costs the same for every shard, so shards much smaller than those of
a real capture would measure nothing else. Of images, the bare pass gets pixels that are decoded
already, and the capture decodes them.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ray_app.actors import cluster_nodes, ray_session, ray_workers
from ray_app.capture import driver, modality, partial, stage
from ray_app.capture.moments import can_compile
from ray_app.capture.shards import batches_of
from ray_app.capture.workers import LocalWorkers
from ray_app.models.loading import quiet_transformers
from ray_app.models.parts import StageModel
from ray_app.placement import place
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run, begin_run
from ray_app.study import Study, load_study
from storage import create_store

Way = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", default="studies/smollm2-demo.yaml")
    parser.add_argument("--task", default="cpp")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="as of plan")
    given = parser.parse_args()
    quiet_transformers()
    amount = [f"capture.tokens={given.tokens}", f"capture.shard_tokens={given.tokens // 2}"]
    whole = load_study(given.study, [*amount, "resources.stages=2", *given.overrides])
    one_task = {"tasks": {given.task: whole.tasks[given.task]}, "reference": None, "analyses": []}
    study = whole.model_copy(update=one_task)
    model = inspect_model(study)
    with tempfile.TemporaryDirectory() as folder:
        kinds = ["eager", *(["compiled"] if can_compile() else [])]
        stores = {kind: create_store(Path(folder) / kind) for kind in kinds}
        runs = {
            kind: begin_run(store, study, model, threads=2, reduction=kind)
            for kind, store in stores.items()
        }
        best = runs[kinds[-1]]
        num_tokens = sum(shard.num_tokens for shard in best.shards)
        # The same for all ways: where weights happen to lie in memory makes a few percent.
        weights = stage.load_stage_model(best.stage_spec())
        ways: dict[str, Way] = {"bare forward pass": bare_way(best, weights)}
        ways |= {f"capture, {kind}": capture_way(run, weights) for kind, run in runs.items()}
        seconds = measure(ways, given.rounds)
        report("one process of two threads", seconds, num_tokens)
        breakdown(best, weights)
        pipeline_report(best, weights, study, given.rounds)


def bare_way(run: Run, weights: StageModel) -> Way:
    read = modality.modality_of(weights.architecture).inputs
    batches = [
        (read(batch, is_first=True), batch.attention_mask)
        for shard in run.shards
        for batch in batches_of(run.store.files.get_table(shard.samples.path))
    ]

    def way() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for inputs, attention_mask in batches:
                weights.run(inputs, attention_mask, None)
        return time.perf_counter() - start

    return way


def capture_way(run: Run, weights: StageModel) -> Way:
    whole = stage.Stage(weights, run.stage_spec(), run.store.files)
    return lambda: timed_capture(run, LocalWorkers(whole))


def timed_capture(run: Run, workers: Any) -> float:
    files = run.store.files
    for path in files.list("runs/*/commits/*/*.json"):
        # Replacing large files takes longer than writing new ones, as a capture does.
        for file in files.get_json(path)["files"]:
            if file["table"] != "samples":
                files.local(file["path"]).unlink()
        files.local(path).unlink()
    start = time.perf_counter()
    driver.capture(run, workers, NoProgress())
    return time.perf_counter() - start


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    return times


def report(title: str, seconds: dict[str, list[float]], num_tokens: int) -> None:
    print(f"\n{title}, {num_tokens:,} tokens, {len(next(iter(seconds.values())))} rounds")
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        speed = num_tokens / statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
        print(f"  {name:28} {speed:8.1f} tokens/s   {ratio:.3f} of the first")


def breakdown(run: Run, weights: StageModel) -> None:
    spent = dict.fromkeys(
        ("reading inputs", "reducing activations", "scoring predictions", "writing parts"), 0.0
    )
    kind = type(modality.modality_of(weights.architecture))

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent[name] += time.perf_counter() - start

    def clocked(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock(name):
                return function(*args, **kwargs)

        return call

    reader = partial.ShardParts.reader
    with (
        patch.object(
            partial.ShardParts,
            "reader",
            lambda self, batch: clocked("reducing activations", reader(self, batch)),
        ),
        patch.object(kind, "inputs", clocked("reading inputs", kind.inputs)),
        patch.object(kind, "score", clocked("scoring predictions", kind.score)),
        patch.object(stage.Stage, "write", clocked("writing parts", stage.Stage.write)),
    ):
        way = capture_way(run, weights)
        way()
        spent.update(dict.fromkeys(spent, 0.0))
        total = way()
    print(f"  of the capture's {total:.2f} s:")
    for name, value in spent.items():
        print(f"    {name:30} {value:6.2f} s   {100 * value / total:4.1f} %")


def pipeline_report(run: Run, weights: StageModel, study: Study, rounds: int) -> None:
    """On Ray, as `actlake capture` runs: parts are written beside the next shard's batches."""
    model, num_tokens = inspect_model(study), sum(shard.num_tokens for shard in run.shards)
    for stages, threads in (1, 2), (2, 1):
        resources = study.resources.model_copy(update={"stages": stages})
        placed = study.model_copy(update={"resources": resources})
        cut_run = Run(run.store, run.record | {"threads": threads}, run.shards)
        with ray_session():
            placement = place(placed, model, cluster_nodes(), threads=threads)
            specs = cut_run.stage_specs(placement.cut)
            with ray_workers(specs, placement, max_deaths=0) as pipeline:
                ways: dict[str, Way] = {
                    "bare forward pass": bare_way(run, weights),
                    "capture": functools.partial(timed_capture, cut_run, pipeline),
                }
                seconds = measure(ways, rounds)
        cut = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in placement.cut)
        title = f"on Ray, {stages} stage(s) of {threads} thread(s), layers {cut}"
        report(title, seconds, num_tokens)


if __name__ == "__main__":
    main()
