"""A stage stops with a reason rather than writing something else than was planned."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ray_app.capture.errors import CaptureError, SampleError, ShardInterruptedError
from ray_app.capture.modality import Language
from ray_app.capture.shards import batches_of
from ray_app.capture.stage import Cores, Stage, build_stage
from ray_app.models.parts import StageModel
from ray_app.plan import inspect_model
from ray_app.run import Run, begin_run
from ray_app.study import load_study
from storage import create_store, files
from storage.pages import UnnestingWriter


@pytest.fixture
def run(
    tmp_path: Path, write_study: Callable[..., Path], deep_model_folder: Callable[[str], Path]
) -> Run:
    study = load_study(write_study(model={"source": str(deep_model_folder("llama"))}))
    return begin_run(create_store(tmp_path / "store"), study, inspect_model(study), threads=1)


@pytest.fixture
def stages(run: Run) -> list[Stage]:
    return [build_stage(spec) for spec in run.stage_specs([range(2), range(2, 6)])]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_stops_with_what_to_do(
    run: Run, stages: list[Stage], error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(stages[0]._model, "run", fail)
    with pytest.raises(
        CaptureError,
        match=r"memory ran out in layers 0 to 1 on cpu, of shard 0 of task 'code' at its batch 0 "
        r"\(\d+ samples of at most \d+ tokens\): raise resources.stages and run the same command "
        r".* lower capture.batch_tokens and pass --new-run",
    ):
        stages[0].step(run.shards[0], 0)


def test_memory_may_run_out_where_a_shard_begins_and_where_it_is_written(
    run: Run, stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    stage, shard = stages[0], run.shards[0]
    lower = "raise resources.stages .* lower capture.shard_tokens and pass --new-run"
    with monkeypatch.context() as patch:
        patch.setattr("ray_app.capture.stage.ShardParts", fail)
        with pytest.raises(CaptureError, match=f"shard 0 of task 'code' where it begins: {lower}"):
            stage.step(shard, 0)
    for batch in range(shard.num_batches):
        stage.step(shard, batch)
    stage.close(shard)
    monkeypatch.setattr(files, "_parquet_writer", fail)
    with pytest.raises(CaptureError, match=f"task 'code' while it was written: {lower}"):
        stage.write(shard)
    assert stage._cores._free == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), torch.AcceleratorError("device-side assert")]
)
def test_errors_that_are_no_samples_fault_keep_their_traceback(
    run: Run, stages: list[Stage], error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        # Alone, each sample goes through; but what a GPU raised, it raises again.
        if len(ids) > 1 or isinstance(error, torch.AcceleratorError):
            raise error
        return ids

    monkeypatch.setattr(stages[0]._model, "run", fail)
    with pytest.raises(type(error), match=str(error)):
        stages[0].step(run.shards[0], 0)


def test_an_error_of_the_model_is_that_of_the_samples_that_raise_it_alone(
    run: Run, stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stages[0]._model.run

    def fail(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        if (ids == wanted).all(1).any():
            raise IndexError("index out of\nrange")
        return whole(ids, *args)

    (batch, *_) = batches_of(run.store.files.get_table(run.shards[0].samples.path))
    wanted = Language().inputs(batch, is_first=True)[1]
    monkeypatch.setattr(stages[0]._model, "run", fail)
    with pytest.raises(SampleError, match="sample 1 fails") as caught:
        stages[0].step(run.shards[0], 0)
    (aside,) = caught.value.samples
    assert aside.sample == batch.samples[1]
    assert aside.num_tokens == batch.lengths[1]
    assert aside.error == "the model raised IndexError: index out of range"


def test_a_batch_out_of_order_asks_for_the_first_one(run: Run, stages: list[Stage]) -> None:
    with pytest.raises(
        ShardInterruptedError, match=r"shard 0 of task 'code' was interrupted before batch 1"
    ):
        stages[0].step(run.shards[0], 1)
    with pytest.raises(ShardInterruptedError, match="before its end"):
        stages[0].write(run.shards[0])


def test_a_batch_has_all_cores_and_comes_after_files() -> None:
    cores, order, free = Cores(2), [], threading.Event()

    def batch() -> None:
        with cores.all():
            order.append("batch")

    def file(name: str) -> None:
        with cores.one():
            free.wait(60)
            order.append(name)

    with ThreadPoolExecutor(8) as pool:
        with cores.one():
            calls = [pool.submit(batch), *(pool.submit(file, "file") for _ in range(5))]
            with pytest.raises(TimeoutError):
                calls[0].result(0.1)
        # One file more than cores has begun meanwhile, and none has ended.
        with pytest.raises(TimeoutError):
            calls[0].result(0.1)
        assert order == []
        free.set()
        for call in calls:
            call.result(60)
    assert order == ["file"] * 5 + ["batch"]
    for take in (cores.all, cores.one):
        with pytest.raises(KeyError), take():
            raise KeyError  # They are given back whatever happens.
    batch()
    assert len(order) == 7


@pytest.fixture
def keeping(
    tmp_path: Path, write_study: Callable[..., Path], deep_model_folder: Callable[[str], Path]
) -> tuple[Stage, Run]:
    """The first stage of a run that keeps raw values, with two threads, and the run."""
    path = write_study(model={"source": str(deep_model_folder("llama"))})
    study = load_study(path, ["capture.values={}"])
    run = begin_run(create_store(tmp_path / "kept"), study, inspect_model(study), threads=2)
    return build_stage(run.stage_specs([range(2), range(2, 6)])[0]), run


def test_a_batch_waits_for_files_to_be_encoded_but_not_for_the_disk(
    keeping: tuple[Stage, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, run = keeping
    first, second, *_ = run.shards
    for batch in range(first.num_batches):
        stage.step(first, batch)
    stage.close(first)
    encoding, computed = threading.Event(), threading.Event()
    encode, compute = UnnestingWriter.write_batch, stage._model.run
    waited: list[bool] = []

    def write_batch(*args: Any) -> None:
        assert stage._cores._free < 2
        if not encoding.is_set():
            encoding.set()
            with pytest.raises(TimeoutError):
                next_batch.result(timeout=0.2)
        encode(*args)

    def model(*args: Any) -> Any:
        assert stage._cores._free == 0
        return compute(*args)

    def step() -> None:
        try:
            assert encoding.wait(60)
            stage.step(second, 0)
        finally:
            computed.set()

    monkeypatch.setattr(UnnestingWriter, "write_batch", write_batch)
    monkeypatch.setattr(stage._model, "run", model)
    monkeypatch.setattr("storage.local._sync", lambda path: waited.append(computed.wait(60)))
    with ThreadPoolExecutor() as pool:
        next_batch = pool.submit(step)
        assert stage.write(first)
        next_batch.result(60)
    assert waited
    assert all(waited)
    assert stage._cores._free == 2


def test_batches_that_a_gpu_computes_leave_the_cores_to_files(
    keeping: tuple[Stage, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, run = keeping
    shard = max(run.shards, key=lambda shard: shard.num_batches)
    stage.step(shard, 0)
    with ThreadPoolExecutor(1) as pool:
        with stage._cores.one():
            batch = pool.submit(stage.step, shard, 1)
            with pytest.raises(TimeoutError):
                batch.result(0.2)
        batch.result(60)
        monkeypatch.setattr(StageModel, "device", torch.device("cuda"))
        with stage._cores.one():
            pool.submit(stage.step, shard, 2).result(60)


def test_memory_stays_flat_over_a_thousand_batches(run: Run, stages: list[Stage]) -> None:
    process = psutil.Process()
    shard = max(run.shards, key=lambda shard: shard.num_batches)

    def compute(rounds: int) -> None:
        for _ in islice(repeat(None), rounds):
            for batch in range(shard.num_batches):
                hidden = stages[0].step(shard, batch)
                assert isinstance(hidden, torch.Tensor)
                stages[1].step(shard, batch, hidden)
        for stage in stages:
            stage.finish(shard)

    compute(20)
    before = process.memory_info().rss
    for _ in range(10):
        compute(100 // shard.num_batches + 1)
    assert process.memory_info().rss - before < 16 << 20
