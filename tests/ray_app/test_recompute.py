"""Samples computed again agree with the store, unless weights or files are others than before."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file, save_file

from ray_app.capture.stage import CaptureError
from ray_app.commands import query
from ray_app.plan import inspect_model
from ray_app.recompute import recompute_samples
from ray_app.run import Run
from ray_app.study import load_study
from storage import StoreError, layout, open_store, verify_store
from storage.sqlfiles import load_query


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("gpt2", "float32"), ("gemma3", "float32"), ("llama", "bfloat16")],
)
def test_all_samples_of_a_run_agree_one_by_one(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], family: str, dtype: str
) -> None:
    run = capture_locally(write_study(family=family), None, f"model.dtype={dtype}")
    ((samples, tokens),) = run.store.sql("select count(*), sum(num_tokens) from samples").fetchall()
    steps: list[int] = []
    report = recompute_samples(run.store, run.id, 10_000, on_sample=lambda: steps.append(1))
    assert report.problems == []
    assert (report.num_samples, report.num_tokens) == (samples, tokens)
    assert len(steps) == samples
    if dtype == "float32":
        assert report.num_top1_differences == 0
        assert 0 < report.largest_loss_difference < 1e-4
        assert report.largest_excess < 1e-4


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_chosen_samples_are_as_many_as_asked_for_and_spread_over_the_run(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], count: int
) -> None:
    run = capture_locally(write_study())
    text = load_query("ray_app", "spread_samples").text
    rows = run.store.sql(text, {"run": run.id, "count": count}).fetchall()
    assert len({row[:3] for row in rows}) == len(rows) == count
    places = [
        row[:3]
        for row in run.store.sql("select task, shard, sample from samples order by all").fetchall()
    ]
    gaps = np.diff([places.index(row[:3]) for row in rows])
    assert count == 1 or gaps.max() - gaps.min() <= 1


@pytest.fixture
def own_model(tmp_path: Path, model_folder: Callable[[str], Path]) -> Path:
    """A model folder that a test may spoil."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_changed_weights_are_refused_before_anything_is_computed(
    own_model: Path, write_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    run = capture_locally(write_study(model={"source": str(own_model)}))
    change_weights(own_model)
    with pytest.raises(CaptureError, match="differ from those the run was planned with"):
        recompute_samples(run.store, run.id, 2)


def test_samples_are_named_if_weights_changed_that_look_the_same(
    own_model: Path, write_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    study = write_study(model={"source": str(own_model)})
    run = capture_locally(study)
    change_weights(own_model)
    run.record["model"]["fingerprint"] = inspect_model(load_study(study)).files.fingerprint
    run.store.files.put_json(layout.run_path(run.id), run.record)
    report = recompute_samples(run.store, run.id, 4)
    assert len(report.problems) == report.num_samples == 4
    assert report.problems[0].startswith(
        "sample 0 of task 'code' differs from what is stored: a loss by "
    )
    assert report.problems[0].endswith("the largest difference allowed for float32 is 0.001.")


def rewrite(run: Run, path: str, table: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a committed file in such a way that its checksum is right again."""
    files = run.store.files
    commit_path = path.replace(f"/{table}/", "/commits/").replace(".parquet", ".json")
    commit_path = commit_path.replace("/stage-00/", "/")
    record = files.get_json(commit_path)
    new = files.put_table(path, table, change(files.get_table(path)))
    record["files"] = [new.to_dict() if f["path"] == path else f for f in record["files"]]
    files.put_json(commit_path, record)


def set_column(name: str, change: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        return table.set_column(index, table.schema.field(name), change(table[name]))

    return apply


@pytest.mark.parametrize(
    ("table", "column", "change"),
    [
        ("tokens", "loss", lambda loss: pc.add(loss, pa.scalar(0.01, pa.float32()))),
        ("stats", "max", lambda values: pc.multiply(values, pa.scalar(0.5, pa.float32()))),
    ],
)
def test_samples_are_named_if_a_file_was_rewritten_with_a_right_checksum(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    table: str,
    column: str,
    change: Callable[[Any], Any],
) -> None:
    run = capture_locally(write_study())
    path = {
        "tokens": layout.tokens_path(run.id, "prose", 1),
        "stats": layout.stats_path(run.id, "prose", 1, 0),
    }[table]
    rewrite(run, path, table, set_column(column, change))
    assert verify_store(run.store).problems == []
    spoilt = run.store.sql(
        "select sample from samples where task = 'prose' and shard = 1"
    ).fetchall()
    report = recompute_samples(open_store(run.store.files.root), run.id, 10_000)
    assert [problem.split(" differs")[0] for problem in report.problems] == [
        f"sample {sample} of task 'prose'" for (sample,) in sorted(spoilt)
    ]


def test_a_run_without_commits_has_nothing_to_compute_again(
    write_study: Callable[..., Path], begin_locally: Callable[..., Run]
) -> None:
    run = begin_locally(write_study())
    with pytest.raises(CaptureError, match=f"run '{run.id}' has no committed shards yet: capture"):
        recompute_samples(run.store, run.id, 2)


def test_verify_tells_how_far_samples_agree(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = capture_locally(write_study())
    capsys.readouterr()
    query.verify(run.store.files.root, recompute=3, run=None)
    whole, agree = capsys.readouterr().out.splitlines()
    assert whole.endswith(
        f"of {len(run.shards)} committed shards are whole, and their counts agree."
    )
    assert agree.startswith("3 samples (")
    assert "computed again one by one agree: losses within " in agree
    assert "top-1 correctness but for 0 tokens" in agree


def test_verify_fails_if_samples_do_not_agree(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = capture_locally(write_study())
    rewrite(
        run,
        layout.tokens_path(run.id, "code", 0),
        "tokens",
        set_column("loss", lambda loss: pc.add(loss, pa.scalar(0.01, pa.float32()))),
    )
    with pytest.raises(
        StoreError,
        match=r"\d+ of \d+ samples computed again do not agree with the run 'tiny-\w+': its "
        "weights, library versions or files changed",
    ):
        query.verify(run.store.files.root, recompute=10_000, run=None)
    assert "sample 0 of task 'code' differs from what is stored" in capsys.readouterr().err
