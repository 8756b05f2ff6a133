"""Stages on a real Ray cluster: the same bits, also when actors are killed."""

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from math import nan
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file, save_file

from chaos import is_stage_actor
from ray_app.actors import cluster_nodes, ray_workers
from ray_app.capture import driver
from ray_app.capture.errors import CaptureError
from ray_app.capture.quarantine import Quarantine
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import BatchDone, LocalWorkers, ShardLost
from ray_app.placement import Placement, PlanError, place
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run, begin_run
from ray_app.study import load_study
from storage import create_store, layout, open_store, verify_store

pytestmark = pytest.mark.ray


CAPTURE = {"tokens": 160, "max_length": 24, "batch_tokens": 24, "shard_tokens": 48}


@pytest.fixture
def begin(
    tmp_path: Path, write_study: Callable[..., Path], model_folder: Callable[[str], Path]
) -> Callable[..., Run]:
    def make(store: str, source: Path | None = None) -> Run:
        study = write_study(model={"source": str(source or model_folder("llama"))}, capture=CAPTURE)
        return begin_in(tmp_path / store, study)

    return make


def begin_in(folder: Path, path: Path) -> Run:
    study = load_study(path)
    return begin_run(create_store(folder), study, inspect_model(study), threads=1)


def contents_of(run: Run) -> dict[str, bytes]:
    files = run.store.files
    # A killed writer leaves its temporary file, whose hidden name no reader takes for a table.
    paths = files.list(f"{layout.run_folder(run.id)}/**/[!.]*.*")
    return {path: files.local(path).read_bytes() for path in paths if not path.endswith("run.json")}


def placement(replicas: int, num_layers: int = 2) -> Placement:
    cut = (range(1), range(1, num_layers))
    return Placement(cut=cut, replicas=replicas, threads=1, gpus_per_stage=0)


def test_actors_set_the_samples_aside_that_this_process_does(
    ray_cluster: None,
    tmp_path: Path,
    write_study: Callable[..., Path],
    model_folder: Callable[[str], Path],
) -> None:
    capture = {"tokens": 160, "max_length": 24, "batch_tokens": 24, "shard_tokens": 96}
    model = Path(shutil.copytree(model_folder("llama"), tmp_path / "spoilt"))
    study = load_study(write_study(model={"source": str(model)}, capture=capture))
    draft = begin_run(create_store(tmp_path / "draft"), study, inspect_model(study), threads=1)
    tokens = Counter(
        token
        for shard in draft.shards
        for ids in draft.store.files.get_table(shard.samples.path)["token_ids"].to_pylist()
        for token in set(ids)
    )
    rare = min(tokens, key=lambda token: (tokens[token], token))
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][rare] = nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    runs = [
        begin_run(create_store(tmp_path / name), study, inspect_model(study), threads=1)
        for name in ("here", "there")
    ]
    here, there = runs
    specs = here.stage_specs(placement(1).cut)
    quarantine = Quarantine(max_samples=tokens[rare])
    workers = LocalWorkers(*map(build_stage, specs), quarantine=quarantine)
    driver.capture(here, workers, NoProgress())
    quarantine = Quarantine(max_samples=tokens[rare])
    specs = there.stage_specs(placement(1).cut)
    with ray_workers(specs, placement(1), max_deaths=0, quarantine=quarantine) as actors:
        driver.capture(there, actors, NoProgress())
    assert contents_of(here) == contents_of(there)
    assert there.num_quarantined() == tokens[rare] > 0
    assert verify_store(there.store).problems == []


def test_a_worker_that_dies_while_it_loads_is_replaced(ray_cluster: None, begin: Any) -> None:
    run = begin("loading")
    kill = threading.Thread(target=kill_the_first_actor)
    kill.start()
    with ray_workers(run.stage_specs(placement(1).cut), placement(1), max_deaths=1) as workers:
        kill.join()
        driver.capture(run, workers, NoProgress())
    assert verify_store(run.store).problems == []
    assert run.remaining() == []


def kill_the_first_actor() -> None:
    while not (pids := actor_pids()):
        time.sleep(0.01)
    os.kill(min(pids), signal.SIGKILL)


def actor_pids() -> set[int]:
    return {
        child.pid for child in psutil.Process().children(recursive=True) if is_stage_actor(child)
    }


@pytest.mark.parametrize("modality", ["language", "image"])
def test_killed_actors_are_replaced_and_the_store_comes_out_byte_identical(
    ray_cluster: None,
    tmp_path: Path,
    write_study: Callable[..., Path],
    write_vision_study: Callable[..., Path],
    modality: str,
) -> None:
    everything = {"pooled": ["max", "mean"], "coactivation": {"layers": [0, 1]}}
    if modality == "language":
        study = write_study(capture=CAPTURE | everything)
    else:
        shards = {"tokens": 170, "batch_tokens": 17, "shard_tokens": 34}
        study = write_vision_study("timm", capture=shards | everything)
    undisturbed, disturbed = (begin_in(tmp_path / name, study) for name in ("undisturbed", "store"))
    num_layers = undisturbed.record["model"]["num_layers"]
    two = placement(2, num_layers)
    stages = map(build_stage, undisturbed.stage_specs(two.cut))
    driver.capture(undisturbed, LocalWorkers(*stages), NoProgress())
    with ray_workers(disturbed.stage_specs(two.cut), two, max_deaths=20) as workers:
        killing = Killing(workers, at={2, 6, 11, 17})
        driver.capture(disturbed, killing, NoProgress())
    assert killing.num_killed == 4
    assert killing.num_lost > 0
    assert contents_of(disturbed) == contents_of(undisturbed)


class Killing:
    """Kills a stage actor after certain batches."""

    def __init__(self, workers: Any, at: set[int]) -> None:
        self._workers = workers
        self._at = at
        self.num_killed = 0
        self.num_lost = 0

    def work(self, shards: Any) -> Iterator[Any]:
        num_batches = 0
        for event in self._workers.work(shards):
            self.num_lost += isinstance(event, ShardLost)
            num_batches += isinstance(event, BatchDone)
            if isinstance(event, BatchDone) and num_batches in self._at:
                self._at.discard(num_batches)
                pids = sorted(actor_pids())
                os.kill(pids[num_batches % len(pids)], signal.SIGKILL)
                self.num_killed += 1
                time.sleep(0.2)
            yield event


def test_more_gpus_than_the_cluster_has_are_refused(ray_cluster: None, write_study: Any) -> None:
    study = load_study(write_study(resources={"stages": 2, "gpus_per_stage": 1}))
    with pytest.raises(
        PlanError,
        match=r"2 stage\(s\) x 1 replica\(s\) of 1 GPU\(s\) each need 2 GPUs, and the cluster "
        r"has 6 CPU\(s\) and 0 GPU\(s\) on 1 machine",
    ):
        place(study, inspect_model(study), cluster_nodes())


def token_missing_from_the_first_task(run: Run) -> int:
    tokens: dict[str, set[int]] = {}
    for shard in run.shards:
        ids = run.store.files.get_table(shard.samples.path)["token_ids"]
        tokens.setdefault(shard.task, set()).update(pc.list_flatten(ids).to_pylist())
    first, second, *_ = tokens.values()
    return min(second - first)


def test_an_error_of_a_stage_reaches_the_driver_as_it_is_and_keeps_what_is_committed(
    ray_cluster: None, tmp_path: Path, begin: Any, model_folder: Callable[[str], Path]
) -> None:
    token = token_missing_from_the_first_task(begin("sound"))
    model = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    run = begin("store", source=model)
    with (
        ray_workers(run.stage_specs(placement(1).cut), placement(1), max_deaths=0) as workers,
        pytest.raises(
            CaptureError,
            match=r"in shard \d of task '\w+' fails, because neuron 0 of site 'attn', layer \d, is",
        ),
    ):
        driver.capture(run, workers, NoProgress())
    committed = run.store.committed(run.id)
    *before, _written_beside = [shard.key for shard in run.shards if shard.task == "code"]
    assert committed >= set(before)
    assert len(committed) < len(run.shards)
    assert verify_store(run.store).problems == []


def test_the_command_captures_in_stages_and_resumes(
    tmp_path: Path, write_study: Callable[..., Path], actlake: Callable[..., Any]
) -> None:
    study = write_study(resources={"stages": 2, "cpus_per_stage": 1})
    arguments = ("capture", study, "--store", tmp_path / "store")
    first = actlake(*arguments)
    assert first.wait() == 0, first.output
    assert "1 x 2 stage(s) of LlamaForCausalLM, 1 thread(s) each, loaded in" in first.output
    store = open_store(tmp_path / "store")
    assert verify_store(store).problems == []
    store.files.local(store.files.list("runs/*/commits/*/*.json")[0]).unlink()
    # Another number of stages goes on with the same run; only its parts are other files.
    second = actlake(*arguments, "--set", "resources.stages=1")
    assert second.wait() == 0, second.output
    assert verify_store(store).problems == []
    assert store.sql("select is_complete from runs").fetchall() == [(True,)]
