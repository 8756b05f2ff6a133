"""A budget decides what is kept, the plan says so, and the run never exceeds it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from ray_app.capture.shards import PlannedShard
from ray_app.capture.values import draw_positions
from ray_app.kept import Work, kept_things, within_budget
from ray_app.placement import PlanError
from ray_app.plan import inspect_model, make_plan
from ray_app.run import Run
from ray_app.study import CaptureSettings, ValuesSettings, load_study
from storage import FileRecord, create_store, layout, verify_store
from storage.values import Encoding, encode_rows, neurons_in_group, place_lists

EVERYTHING = (
    "capture.pooled=[max, mean]",
    "capture.coactivation={layers: [0, 1], sites: [mlp, attn]}",
    "capture.values={encoding: float32}",
)


def size_of(run: Run) -> int:
    """Bytes of everything that the run wrote; the record of its driver says nothing of it."""
    files = run.store.files
    return sum(files.size(path) for path in files.everything("runs"))


def kept(path: Path, *overrides: str) -> CaptureSettings:
    study = load_study(path, overrides)
    return make_plan(study, inspect_model(study)).kept()


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_a_run_writes_no_more_than_the_plan_says_at_most(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], encoding: str
) -> None:
    overrides = (*EVERYTHING[:2], f"capture.values={{encoding: {encoding}}}")
    study = load_study(write_study(), overrides)
    costs = make_plan(study, inspect_model(study)).costs(None)
    run = capture_locally(write_study(), None, *overrides)
    written = size_of(run)
    assert written <= sum(thing.most_bytes for thing in costs.kept)
    assert written >= costs.num_bytes / 4


def test_more_bytes_keep_more_in_the_order_that_is_promised(
    write_study: Callable[..., Path],
) -> None:
    path = write_study()
    plan = make_plan(load_study(path), inspect_model(load_study(path)))
    things = kept_things(plan.study.capture, plan._work(2))
    least = sum(thing.most_bytes for thing in things if not thing.name.startswith("top"))
    work, capture = plan._work(2), plan.study.capture
    steps = [1.0001, 1.1, *(1 + n / 4 for n in range(1, 30))]
    found = [
        within_budget(capture.model_copy(update={"budget_gb": n * least / 1e9}), work)
        for n in steps
    ]
    tops = [settings.top for settings in found]
    shares = [settings.values.share if settings.values else 0 for settings in found]
    assert tops[0] == 0
    assert tops == sorted(tops)
    assert tops[-1] == 5
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert all(share == 0 for share, top in zip(shares, tops, strict=True) if top < 5)
    assert any(0 < share < 1 for share in shares)
    assert found[-1].values is not None
    assert (found[-1].values.share, found[-1].values.encoding) == (1, "float32")


@pytest.mark.parametrize("times", [3, 5])
def test_a_run_stays_within_its_budget_and_resumes_with_what_it_began(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    begin_locally: Callable[..., Run],
    times: float,
) -> None:
    path = write_study()
    plan = make_plan(load_study(path), inspect_model(load_study(path)))
    budget = times * sum(thing.most_bytes for thing in plan.costs(None).kept) / 1e9
    setting = f"capture.budget_gb={budget}"
    run = capture_locally(path, None, setting)
    assert size_of(run) <= budget * 1e9
    assert run.stage_spec().capture.model_dump() == kept(path, setting).model_dump()
    ((num_values,),) = run.store.sql("select count(*) from activations").fetchall()
    ((num_counted,),) = run.store.sql("select sum(num_counted) from commits").fetchall()
    values = run.stage_spec().capture.values
    assert values is not None
    expected = values.share * num_counted * run.record["model"]["num_neurons"]
    assert 0.5 * expected < num_values < 1.5 * expected
    assert begin_locally(path, None, setting).id == run.id
    assert verify_store(run.store).problems == []


def test_what_is_asked_for_by_name_must_fit(write_study: Callable[..., Path]) -> None:
    with pytest.raises(
        PlanError,
        match=r"capture\.budget_gb must hold inputs, statistics and whatever else is asked for by "
        r"name, which take up to [\d.]+ GB, found 0\.0001: raise it or capture\.shard_tokens, or "
        r"lower capture\.tokens or the number of layers\.",
    ):
        kept(write_study(), "capture.budget_gb=0.0001")
    values = kept(
        write_study(),
        "capture.budget_gb=0.1",
        "capture.values={layers: [1], encoding: int8, tasks: [code]}",
    ).values
    assert values is not None
    assert (values.layers, values.encoding, values.tasks) == ([1], "int8", ["code"])


def test_the_plan_says_what_is_kept(
    write_study: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    from ray_app.commands import capture

    study = load_study(write_study(), [*EVERYTHING, "capture.budget_gb=0.05"])
    capture.plan(study, str(tmp_path / "store"))
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("keeps"))
    names = [line[21:] for line in lines[start : start + 6]]
    assert names == [
        "inputs and tokens",
        "statistics",
        "top 5 activations",
        "pooled activations",
        "pairs of neurons",
        "raw values (float32)",
    ]
    assert lines[start + 6].startswith("budget  0.0")
    assert lines[start + 6].endswith(" GB at the very most, of 0.05 GB")


def drawn_groups(
    lengths: list[int], width: int, share: float, encoding: Encoding
) -> Iterator[pa.RecordBatch]:
    """Row groups of random values, of samples in random order."""
    random = np.random.default_rng(0)
    sample = np.repeat(random.permutation(len(lengths)), lengths).astype(np.int32)
    position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    chosen = draw_positions(sample, position, seed=0, task="code", share=share)
    sample, position = sample[chosen], position[chosen]
    step = neurons_in_group(len(sample))
    for start in range(0, width, step):
        size = min(step, width - start)
        z = random.uniform(-1, 1, (size, len(sample))).astype(np.float32)
        yield pa.record_batch(
            {
                "block": pa.array([0] * size, pa.int32()),
                "neuron": np.arange(start, start + size, dtype=np.int32),
                "head": pa.nulls(size, pa.int16()),
                **place_lists(sample, position, size),
                **encode_rows(z, encoding),
            }
        )


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
@pytest.mark.parametrize(
    ("lengths", "width", "share", "times"),
    [
        ([512] * 512, 12, 0.25, 1.5),
        ([9000] * 8, 12, 0.9, 1.5),
        ([12] * 6000, 12, 0.5, 3),
        ([300] * 300, 48, 0.1, 1.5),
        ([512] * 1000, 5, 0.9, 2.5),
        ([12] * 16, 400, 1.0, 1.5),
    ],
)
def test_drawn_values_take_no_more_than_the_plan_says_at_most(
    tmp_path: Path,
    lengths: list[int],
    width: int,
    share: float,
    times: float,
    encoding: Encoding,
) -> None:
    store = create_store(tmp_path)
    path = layout.values_path("r", "code", "mlp", 0, 0)
    file = store.files.put_batches(path, "values", drawn_groups(lengths, width, share, encoding))
    shard = PlannedShard(
        task="code", shard=0, num_samples=len(lengths), num_tokens=sum(lengths),
        num_counted=sum(lengths), num_batches=1,
        samples=FileRecord(path="samples", table="samples", rows=1, bytes=1, sha256=""),
    )  # fmt: skip
    site = SimpleNamespace(site="mlp", layer=0, width=width)
    model = cast(Any, SimpleNamespace(num_neurons=width, sites=[site]))
    work = Work(model=model, shards=[shard], num_image_bytes=0, num_stages=1)
    values = ValuesSettings(share=share, encoding=encoding)
    *_, planned = kept_things(CaptureSettings(values=values), work)
    assert planned.num_files == 1
    # What is planned for names and checksums of a file is more than a small one needs.
    assert file.bytes <= planned.most_bytes <= times * file.bytes + 12_000
