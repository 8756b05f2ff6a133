"""A capture over two hosts survives the death of one; see two_hosts.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

import two_hosts
from hosts import why_no_hosts
from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import begin_run
from ray_app.study import load_study
from storage import create_store

WORDS = "the lake lies still in the morning and every boat waits for wind from the north".split()


def undisturbed(study_path: Path, root: Path) -> list[str]:
    study = load_study(study_path)
    store = create_store(root)
    run = begin_run(store, study, inspect_model(study), threads=1)
    driver.capture(run, LocalWorkers(build_stage(run.stage_spec())), NoProgress())
    files = store.sql("select filename, sha256 from committed_files order by filename").fetchall()
    return [f"{sha256} {name[len(store.files.root) + 1 :]}" for name, sha256 in files]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_worker_host_dies_and_the_store_is_the_same_as_without_that(
    tmp_path: Path, text_folder: Path, write_study: Callable[..., Path]
) -> None:
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    for number in range(400):
        words = [WORDS[(number + 3 * step) % len(WORDS)] for step in range(10 + number % 50)]
        (text_folder / "prose" / f"{number:04d}.txt").write_text(" ".join(words))
    study = write_study(
        tasks={"prose": {"files": f"{text_folder}/prose/*.txt"}},
        reference=None,
        capture={"tokens": 9600, "max_length": 48, "batch_tokens": 48, "shard_tokens": 64},
        resources={"replicas": 2, "cpus_per_stage": 1},
    )
    models = Path(load_study(study).model.source).parent
    committed = two_hosts.capture_on_two_hosts(study, [models, text_folder], kill_after=40)
    assert committed == undisturbed(study, tmp_path / "undisturbed")
