"""Stage actors on a Ray cluster do what a stage in this process does, and say what went wrong."""

import shutil
from collections.abc import Callable
from math import nan
from pathlib import Path

import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file, save_file

from ray_app.capture import driver
from ray_app.capture.stage import CaptureError
from ray_app.capture.workers import Workers
from ray_app.progress import NoProgress
from ray_app.run import Run
from storage import verify_store

pytestmark = pytest.mark.ray


def test_an_actor_captures_what_a_stage_in_this_process_does(
    tmp_path: Path,
    write_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    capture_locally: Callable[..., Run],
    committed_files: Callable[[Path], dict[str, bytes]],
    ray_workers: Callable[..., Workers],
) -> None:
    # Phi's rotary embedding turns a part of each head, and its attention and MLP are parallel.
    study = write_study(family="phi")
    capture_locally(study, tmp_path / "local")
    run = begin_locally(study, tmp_path / "actors")
    assert driver.capture(run, ray_workers(run, replicas=1), NoProgress()) == len(run.shards)
    assert committed_files(tmp_path / "actors") == committed_files(tmp_path / "local")


def token_missing_from_the_first_task(run: Run) -> int:
    tokens: dict[str, set[int]] = {}
    for shard in run.shards:
        ids = run.store.files.get_table(shard.samples.path)["token_ids"]
        tokens.setdefault(shard.task, set()).update(pc.list_flatten(ids).to_pylist())
    first, second, *_ = tokens.values()
    return min(second - first)


def test_an_error_of_a_stage_reaches_the_driver_as_it_is_and_keeps_what_is_committed(
    tmp_path: Path,
    write_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    model_folder: Callable[[str], Path],
    ray_workers: Callable[..., Workers],
) -> None:
    token = token_missing_from_the_first_task(begin_locally(write_study(), tmp_path / "sound"))
    model = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    run = begin_locally(write_study(model={"source": str(model)}), tmp_path / "store")
    with pytest.raises(
        CaptureError,
        match=r"in shard \d of task 'mixed' fails, because neuron 0 of site 'attn', layer 0, is",
    ):
        driver.capture(run, ray_workers(run, replicas=1), NoProgress())
    committed = run.store.committed(run.id)
    assert committed >= {shard.key for shard in run.shards if shard.task == "code"}
    assert len(committed) < len(run.shards)
    assert verify_store(run.store).problems == []


def test_more_replicas_than_the_cluster_has_room_for_are_refused(
    write_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    ray_workers: Callable[..., Workers],
) -> None:
    run = begin_locally(write_study())
    with pytest.raises(
        CaptureError,
        match=r"3 replica\(s\) of 1 thread\(s\) need 3 CPUs, and the cluster has 2: lower",
    ):
        ray_workers(run, replicas=3)
