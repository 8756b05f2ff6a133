"""Whatever the batches, shards, order and interruptions, a run ends with the same answers."""

import io
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_app.capture import driver
from ray_app.capture.errors import CaptureError
from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import BatchDone, LocalWorkers, ShardDone
from ray_app.progress import LineProgress, NoProgress
from ray_app.run import Run
from storage import layout, verify_store


class ShuffledWorkers(LocalWorkers):
    """Takes the shards in an order of its own."""

    def __init__(self, run: Run, seed: int) -> None:
        super().__init__(build_stage(run.stage_spec()))
        self._random = random.Random(seed)

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        return super().work(self._random.sample(shards, len(shards)))


class FailingWorkers(ShuffledWorkers):
    """Dies after a number of events, in the middle of a shard or between two."""

    def __init__(self, run: Run, seed: int, *, after: int) -> None:
        super().__init__(run, seed)
        self._after = after

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        for count, event in enumerate(super().work(shards)):
            if count == self._after:
                raise CaptureError("the power went out.")
            yield event


def tables_of(run: Run) -> dict[str, Any]:
    """What readers see of a run, in an order that does not depend on shards."""
    tokens = run.store.sql(
        "select task, sample, position, token_id, counted, loss, top1, top10 from tokens "
        "order by all"
    ).fetchnumpy()
    stats = run.store.sql("from neuron_stats order by task, site, layer, neuron").fetchnumpy()
    return {"tokens": tokens, "neuron_stats": stats}


def assert_same_answers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("task", "sample", "position", "token_id", "counted", "top1", "top10"):
        np.testing.assert_array_equal(found["tokens"][name], expected["tokens"][name])
    np.testing.assert_allclose(
        found["tokens"]["loss"], expected["tokens"]["loss"], rtol=0, atol=2e-4
    )
    for name in ("task", "site", "layer", "neuron", "n"):
        np.testing.assert_array_equal(
            found["neuron_stats"][name], expected["neuron_stats"][name], err_msg=name
        )
    for name in ("mean", "std", "rms", "abs", "sqrt", "pos", "neg", "min", "max"):
        # Another batch shape changes the activations themselves by a rounding.
        np.testing.assert_allclose(
            found["neuron_stats"][name],
            expected["neuron_stats"][name],
            rtol=2e-4,
            atol=2e-5,
            err_msg=name,
        )


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    batch_tokens=st.sampled_from([1, 24, 60, 100, 1000]),
    shard_tokens=st.integers(1, 700),
    seed=st.integers(0, 1000),
)
def test_any_batching_sharding_and_order_gives_the_answers_of_one_sample_at_a_time(
    tmp_path_factory: pytest.TempPathFactory,
    write_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    capture_locally: Callable[..., Run],
    batch_tokens: int,
    shard_tokens: int,
    seed: int,
) -> None:
    study = write_study()
    alone = capture_locally(study, None, "capture.batch_tokens=1", "capture.shard_tokens=100000")
    run = begin_locally(
        study,
        tmp_path_factory.mktemp("store"),
        f"capture.batch_tokens={batch_tokens}",
        f"capture.shard_tokens={shard_tokens}",
    )
    driver.capture(run, ShuffledWorkers(run, seed), NoProgress())
    assert_same_answers(tables_of(run), tables_of(alone))


def files_of(run: Run) -> dict[str, bytes]:
    """Content of every file of a run, by path."""
    folder = run.store.files.local(layout.run_folder(run.id))
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def without_time(run_json: bytes) -> bytes:
    """The record of a run without the time at which it began, which alone is not in its plan."""
    without, replacements = re.subn(rb'"created": "[-0-9]{10} [:0-9]{8}"', b"", run_json)
    assert replacements == 1
    return without


def assert_same_files(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    for path, content in expected.items():
        if path == "run.json":
            assert without_time(found[path]) == without_time(content)
        else:
            assert found[path] == content, path


def test_interrupted_captures_end_with_the_files_of_an_undisturbed_one(
    tmp_path: Path,
    write_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    capture_locally: Callable[..., Run],
) -> None:
    undisturbed = capture_locally(write_study(), tmp_path / "undisturbed")
    run = begin_locally(write_study(), tmp_path / "interrupted")
    for seed, after in enumerate((0, 1, 2, 5, 8)):
        before = run.store.committed(run.id)
        with pytest.raises(CaptureError, match="the power went out"):
            driver.capture(run, FailingWorkers(run, seed, after=after), NoProgress())
        assert run.store.committed(run.id) >= before
        assert len(run.remaining()) == len(run.shards) - len(run.store.committed(run.id))
    assert 0 < len(run.remaining()) < len(run.shards)
    resumed = capture_locally(write_study(), tmp_path / "interrupted")
    assert resumed.id == run.id == undisturbed.id
    assert_same_files(files_of(resumed), files_of(undisturbed))
    report = verify_store(resumed.store)
    assert (report.problems, report.num_shards) == ([], len(run.shards))


class NoWorkers:
    """Must not be asked to compute anything."""

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        assert not shards, "a complete run has no shards left"
        return iter(())


def test_a_complete_run_is_left_as_it_is(
    write_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    capture_locally: Callable[..., Run],
) -> None:
    before = files_of(capture_locally(write_study()))
    run = begin_locally(write_study())
    assert run.remaining() == []
    assert driver.capture(run, NoWorkers(), NoProgress()) == 0
    assert files_of(run) == before


def test_progress_counts_what_this_call_computes(
    write_study: Callable[..., Path], begin_locally: Callable[..., Run]
) -> None:
    run = begin_locally(write_study())
    with pytest.raises(CaptureError):
        driver.capture(run, FailingWorkers(run, 0, after=9), NoProgress())
    remaining = run.remaining()
    assert len(remaining) < len(run.shards)
    lines, total = io.StringIO(), sum(shard.num_tokens for shard in remaining)
    progress = LineProgress(
        total_tokens=total, total_shards=len(remaining), stream=lines, seconds_between_lines=0
    )
    assert driver.capture(run, ShuffledWorkers(run, 1), progress) == len(remaining)
    first, *_, last = lines.getvalue().splitlines()
    assert re.fullmatch(
        rf"capture: \d+ of {total} tokens, 0 of {len(remaining)} shards committed, "
        r"[\d,]+ tokens/s, [\d,]+ s left",
        first,
    )
    assert last.startswith(
        f"capture: {total} of {total} tokens, {len(remaining)} of {len(remaining)} shards committed"
    )
    assert last.endswith(" 0 s left")
