"""A capture into an object store gives the very files that one into a folder gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run, begin_run, find_run
from ray_app.study import load_study
from storage import ActlakeError, StoreError, create_store, objects, open_store, verify_store


def begin(root: str, study_path: Path) -> Run:
    study, store = load_study(study_path), create_store(root)
    model = inspect_model(study)
    found = find_run(store, study, model, new_run=False)
    return found or begin_run(store, study, model, threads=1)


def finish(run: Run) -> None:
    driver.capture(run, LocalWorkers(build_stage(run.stage_spec())), NoProgress())


def checksums(root: str) -> dict[str, str]:
    rows = open_store(root).sql("select filename, sha256 from committed_files").fetchall()
    start = len(open_store(root).files.root) + 1
    return {name[start:]: sha256 for name, sha256 in rows}


def test_a_capture_is_byte_identical_to_that_into_a_folder(
    store_root: str, tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    study = write_study()
    finish(begin(str(tmp_path / "folder"), study))
    finish(begin(store_root, study))
    assert checksums(store_root) == checksums(str(tmp_path / "folder"))
    store = open_store(store_root)
    report = verify_store(store)
    assert report.problems == []
    assert report.num_shards == len(store.run_record(store.runs()[0])["shards"]) > 4
    assert store.sql("select is_complete from runs").fetchall() == [(True,)]
    assert begin(store_root, study).remaining() == []


def test_a_connection_lost_in_the_middle_leaves_a_run_that_goes_on(
    s3_bucket: str, write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, study = f"s3://{s3_bucket}/store", write_study()
    run = begin(root, study)
    monkeypatch.setattr(objects, "RETRY_DELAYS", (0.01,))
    put, num_puts = S3FileSystem._pipe_file, 0

    async def lossy(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal num_puts
        num_puts += 1
        if num_puts > 9:  # Two shards of four puts each, and one part of the third shard.
            raise ConnectionResetError("connection reset by peer")
        await put(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(S3FileSystem, "_pipe_file", lossy)
        # Opened again, because a filesystem takes its methods when it is made.
        with pytest.raises(StoreError, match=r"failed 2 times .* run the same command again"):
            finish(begin(root, study))
    assert len(run.shards) - len(run.remaining()) == 2
    finish(begin(root, study))
    assert begin(root, study).remaining() == []
    assert verify_store(open_store(root)).problems == []


def test_inputs_without_their_record_are_no_run_and_are_put_again(
    s3_bucket: str, write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, study = f"s3://{s3_bucket}/store", write_study()
    put = S3FileSystem._pipe_file

    async def killed(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if name.endswith("run.json"):
            raise RuntimeError("killed here")
        await put(self, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(S3FileSystem, "_pipe_file", killed)
        with pytest.raises(RuntimeError, match="killed here"):
            begin(root, study)
    store = open_store(root)
    assert store.files.list("runs/*/samples/*/*.parquet")
    assert store.runs() == []
    with pytest.raises(ActlakeError, match="has no run yet: capture first"):
        store.resolve_run(None)
    finish(begin(root, study))
    assert verify_store(open_store(root)).problems == []
