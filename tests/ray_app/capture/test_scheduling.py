"""However a run is cut, replicated and interrupted, it commits the same files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_app.capture import driver
from ray_app.capture.errors import CaptureError
from ray_app.capture.scheduling import Scheduler
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers, ShardLost
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run, begin_run
from ray_app.study import load_study
from storage import Store, create_store, layout, verify_store

CUTS: dict[int, list[range]] = {
    1: [range(6)],
    2: [range(2), range(2, 6)],
    3: [range(1), range(1, 4), range(4, 6)],
    5: [range(1), range(1, 2), range(2, 3), range(3, 5), range(5, 6)],
}


@pytest.fixture
def begin(
    tmp_path: Path, write_study: Callable[..., Path], deep_model_folder: Callable[[str], Path]
) -> Callable[..., Run]:
    """Begins a run of a deep model in a store of its own."""

    def make(store: str, *, family: str = "llama", **model: Any) -> Run:
        attention = "eager" if family in ("gemma2", "gpt_neo") else "sdpa"
        source = str(deep_model_folder(family))
        path = write_study(model={"source": source, "attention": attention, **model})
        study = load_study(path)
        return begin_run(create_store(tmp_path / store), study, inspect_model(study), threads=1)

    return make


def pipelines_of(
    run: Run, cut: Sequence[range], replicas: int, make: Any, **options: Any
) -> list[Any]:
    specs = run.stage_specs(cut)
    return [make(*map(build_stage, specs), **options) for _ in range(replicas)]


def tables_of(store: Store) -> list[pa.Table]:
    return [
        store.sql(f"select * from {table} order by all").to_arrow_table()
        for table in ("samples", "tokens", "stats", "top", "commits")
    ]


def contents_of(run: Run) -> dict[str, bytes]:
    files = run.store.files
    paths = files.list(f"{layout.run_folder(run.id)}/**/*.*")
    return {path: files.local(path).read_bytes() for path in paths if not path.endswith("run.json")}


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3"])
def test_stages_and_replicas_commit_what_one_stage_commits(
    begin: Callable[..., Run], inline_calls: Any, inline_pipeline: Any, family: str,
    quantization: str, long_form: bool,
) -> None:  # fmt: skip
    whole = begin("whole", family=family, quantization=quantization)
    driver.capture(whole, LocalWorkers(build_stage(whole.stage_spec())), NoProgress())
    tokens = {path: data for path, data in contents_of(whole).items() if "/tokens/" in path}
    expected = tables_of(whole.store)
    for num_stages, cut in CUTS.items():
        if quantization != "none" and num_stages in (1, 3) and not long_form:
            continue
        contents = []
        for replicas in (1, 2):
            name = f"cut-{num_stages}-{replicas}"
            run = begin(name, family=family, quantization=quantization)
            pipelines = pipelines_of(run, cut, replicas, inline_pipeline)
            workers = Scheduler(pipelines, inline_calls, max_deaths=0)
            assert driver.capture(run, workers, NoProgress()) == len(run.shards)
            assert all(pipeline.num_steps > 0 for pipeline in pipelines)
            assert run.id == whole.id
            contents.append(contents_of(run))
        assert contents[0] == contents[1]
        assert {path: contents[0][path] for path in tokens} == tokens
        # Statistics lie in one file per stage; their rows are the same.
        for ours, theirs in zip(tables_of(run.store)[:4], expected[:4], strict=True):
            assert ours.equals(theirs)
        stats = [path for path in contents[0] if "/stats/" in path]
        assert len(stats) == num_stages * len(run.shards)
        assert verify_store(run.store).problems == []


@pytest.mark.parametrize(("family", "quantization"), [("opt", "none"), ("llama", "int4")])
def test_other_kinds_cut_in_five_commit_what_one_stage_commits(
    begin: Callable[..., Run], inline_calls: Any, inline_pipeline: Any, family: str,
    quantization: str,
) -> None:  # fmt: skip
    whole, cut = (begin(name, family=family, quantization=quantization) for name in ("1", "5"))
    driver.capture(whole, LocalWorkers(build_stage(whole.stage_spec())), NoProgress())
    pipelines = pipelines_of(cut, CUTS[5], 1, inline_pipeline)
    driver.capture(cut, Scheduler(pipelines, inline_calls, max_deaths=0), NoProgress())
    for ours, theirs in zip(tables_of(cut.store)[:4], tables_of(whole.store)[:4], strict=True):
        assert ours.equals(theirs)


def test_shards_that_a_dead_worker_had_are_computed_again_and_come_out_the_same(
    begin: Callable[..., Run], inline_calls: Any, inline_pipeline: Any
) -> None:
    undisturbed = begin("undisturbed")
    pipelines = pipelines_of(undisturbed, CUTS[3], 2, inline_pipeline)
    driver.capture(undisturbed, Scheduler(pipelines, inline_calls, max_deaths=0), NoProgress())
    disturbed = begin("disturbed")
    pipelines = pipelines_of(disturbed, CUTS[3], 2, inline_pipeline, dies_at={2, 5, 9, 10})
    workers = Scheduler(pipelines, inline_calls, max_deaths=3)
    driver.capture(disturbed, workers, NoProgress())
    assert all(pipeline.num_revivals > 0 for pipeline in pipelines)
    assert contents_of(disturbed) == contents_of(undisturbed)


def test_tokens_reported_of_lost_shards_are_taken_back(
    begin: Callable[..., Run], inline_calls: Any, inline_pipeline: Any
) -> None:
    run = begin("lost")
    (pipeline,) = pipelines_of(run, CUTS[2], 1, inline_pipeline, dies_at={4, 7})
    events = list(Scheduler([pipeline], inline_calls, max_deaths=3).work(run.shards))
    reported = sum(getattr(event, "num_tokens", 0) for event in events if type(event).__name__
                   == "BatchDone")  # fmt: skip
    taken_back = sum(event.num_tokens for event in events if isinstance(event, ShardLost))
    assert reported - taken_back == sum(shard.num_tokens for shard in run.shards)
    assert {event.reason for event in events if isinstance(event, ShardLost)} == {"it was killed"}


def test_workers_that_die_again_and_again_stop_the_capture_with_the_reason(
    begin: Callable[..., Run], inline_calls: Any, inline_pipeline: Any
) -> None:
    run = begin("dying")
    (pipeline,) = pipelines_of(run, CUTS[2], 1, inline_pipeline, dies_at=set(range(1000)))
    with pytest.raises(
        CaptureError,
        match=r"interrupted 3 times in a row without finishing a shard in between, the last time "
        r"because it was killed\. Committed shards are kept",
    ):
        driver.capture(run, Scheduler([pipeline], inline_calls, max_deaths=2), NoProgress())
    assert pipeline.num_revivals == 2
    assert run.store.committed(run.id) == set()


class RecordingPipeline:
    """Takes calls and finishes none before it is told to: shows what is in flight."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.steps: list[object] = []
        self.most_in_flight = 0

    def step(self, shard: Any, batch: int) -> object:
        self.steps.append(object())
        self.most_in_flight = max(self.most_in_flight, len(self.steps))
        return self.steps[-1]

    def close(self, shard: Any) -> list[object]:
        return [object() for _ in range(self.num_stages)]

    def write(self, shard: Any) -> list[object]:
        return [object() for _ in range(self.num_stages)]

    def revive(self) -> list[object]:
        return []


class RecordingCalls:
    def __init__(self, pipelines: list[RecordingPipeline]) -> None:
        self._pipelines = pipelines

    def wait(self, handles: list[object]) -> object:
        return handles[0]

    def result(self, handle: object) -> Any:
        for pipeline in self._pipelines:
            if handle in pipeline.steps:
                pipeline.steps.remove(handle)
                return 1
        return []


@pytest.mark.parametrize("num_stages", [1, 2, 8])
def test_a_bounded_number_of_batches_is_in_flight(begin: Any, num_stages: int) -> None:
    run = begin("flight")
    pipelines = [RecordingPipeline(num_stages) for _ in range(2)]
    scheduler = Scheduler(pipelines, RecordingCalls(pipelines), max_deaths=0)
    events = list(scheduler.work(list(run.shards) * 50))
    assert sum(type(event).__name__ == "ShardDone" for event in events) == 50 * len(run.shards)
    for pipeline in pipelines:
        assert num_stages < pipeline.most_in_flight <= 2 * num_stages
