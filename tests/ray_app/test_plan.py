"""A plan is the same every time, tells what it costs, and refuses what cannot be carried out."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from ray_app.hours import Hours
from ray_app.kept import Kept
from ray_app.models.errors import ModelError
from ray_app.plan import (
    Costs,
    Plan,
    PlanError,
    StageCosts,
    check_fits,
    identity_of,
    inspect_model,
    make_plan,
    outline_plan,
)
from ray_app.study import Study, StudyError, load_study
from storage import FileRecord

GIB = 1 << 30

PLAN_IN_NEW_PROCESS = """
import hashlib, sys
from ray_app.plan import inspect_model, make_plan
from ray_app.run import begin_run
from ray_app.study import load_study
from storage import create_store
study = load_study(sys.argv[1])
run = begin_run(create_store(sys.argv[2]), study, inspect_model(study), threads=1)
print(run.id, *(shard.samples.sha256 for shard in run.shards))
"""


def plan(study: Study) -> tuple[Plan, list[str]]:
    """The plan of a study and a digest of the rows of each shard."""
    digests: list[str] = []

    def write(task: str, shard: int, table: pa.Table) -> FileRecord:
        rows = json.dumps(table.to_pylist())
        digests.append(f"{task}/{shard}/{hashlib.sha256(rows.encode()).hexdigest()}")
        return FileRecord(path=f"{task}/{shard}", table="samples", rows=1, bytes=1, sha256="0")

    return make_plan(study, inspect_model(study), write=write), sorted(digests)


def refusal(study: Path, *overrides: str) -> str:
    with pytest.raises((StudyError, ModelError, PlanError)) as caught:
        plan(load_study(study, overrides))
    return str(caught.value)


def test_the_same_study_gives_the_same_shards_in_every_process(
    write_study: Callable[..., Path], begin_locally: Callable[..., Any], tmp_path: Path
) -> None:
    path = write_study()
    run = begin_locally(path)
    done = subprocess.run(
        [sys.executable, "-c", PLAN_IN_NEW_PROCESS, str(path), str(tmp_path / "other")],
        env=os.environ | {"PYTHONHASHSEED": "12345"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [run.id, *(shard.samples.sha256 for shard in run.shards)]
    assert len(run.shards) > 10


def test_the_order_of_tasks_changes_no_shard(write_study: Callable[..., Path]) -> None:
    path = write_study()
    _, first = plan(load_study(path))
    study = yaml.safe_load(path.read_text())
    order = ["mixed", "prose", "code", "numbers"]
    study["tasks"] = {name: study["tasks"][name] for name in order}
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    made, second = plan(load_study(path))
    assert first == second
    assert list(made.tasks) == order
    assert list(dict.fromkeys(shard.task for shard in made.shards)) == order


def test_another_task_changes_no_shard_of_the_others(
    write_study: Callable[..., Path], text_folder: Path
) -> None:
    tasks = {
        "code": {"files": f"{text_folder}/code/*.txt"},
        "mixed": {"mixture": ["code"]},
    }
    _, alone = plan(load_study(write_study(tasks=tasks)))
    others = {
        "another": {"files": f"{text_folder}/prose/*.txt"},
        "also_mixed": {"mixture": ["code", "another"]},
    }
    _, together = plan(load_study(write_study(tasks=others | tasks)))
    assert set(alone) < set(together)


def test_a_plan_counts_what_its_shards_hold(write_study: Callable[..., Path]) -> None:
    study = load_study(write_study())
    tables: dict[tuple[str, int], pa.Table] = {}

    def write(task: str, shard: int, table: pa.Table) -> FileRecord:
        tables[task, shard] = table
        return FileRecord(path="p", table="samples", rows=table.num_rows, bytes=1, sha256="0")

    made = make_plan(study, inspect_model(study), write=write)
    assert {shard.key for shard in made.shards} == tables.keys()
    for shard in made.shards:
        rows = tables[shard.key].to_pylist()
        assert shard.num_samples == len(rows)
        assert shard.num_tokens == sum(row["num_tokens"] for row in rows)
        assert shard.num_counted == sum(row["num_counted"] for row in rows)
        assert shard.num_batches == len({row["batch"] for row in rows})
    for name, draw in made.tasks.items():
        assert draw.num_counted == 160
        assert draw.num_shards == sum(shard.task == name for shard in made.shards)
        assert draw.num_tokens == sum(s.num_tokens for s in made.shards if s.task == name)


def test_the_estimate_covers_what_a_capture_writes(
    write_study: Callable[..., Path], capture_locally: Callable[..., Any]
) -> None:
    path = write_study()
    made, _ = plan(load_study(path))
    costs = made.costs(None)
    store = capture_locally(path).store
    files = store.files.list("**/*.*")
    size = sum(store.files.size(file) for file in files)
    # The record of who drives the run is written by the command.
    assert costs.num_files == len(files) + 1
    assert size <= costs.num_bytes <= 2 * size


@pytest.fixture
def costs() -> Costs:
    """Costs that fit."""
    return Costs(
        kept=(Kept(name="statistics", num_files=10, num_bytes=GIB, most_bytes=2 * GIB),),
        stages=tuple(
            StageCosts(layers=range(1), num_bytes=size, host_bytes=size) for size in (GIB, 2 * GIB)
        ),
        hours=Hours(capture=1.0, evaluation=1.0, assumption="none"), replicas=2, free_disk=GIB,
        available_memory=6 * GIB,
    )  # fmt: skip


def test_a_plan_that_just_fits_is_taken(costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_fits(costs)
    check_fits(dataclasses.replace(costs, free_disk=None))


def test_a_plan_larger_than_the_disk_is_refused(costs: Costs) -> None:
    with pytest.raises(PlanError) as caught:
        check_fits(dataclasses.replace(costs, free_disk=GIB - 1))
    assert str(caught.value) == (
        "the run needs about 1.00 GiB on disk, and 1,024.0 MiB are free where the store is: choose "
        "another store, or lower capture.tokens or the number of layers, or raise "
        "capture.shard_tokens."
    )


def test_a_plan_larger_than_the_memory_is_refused(
    costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(PlanError) as caught:
        check_fits(dataclasses.replace(costs, available_memory=5 * GIB))
    assert str(caught.value) == (
        "2 replica(s) need about 6.00 GiB of memory, and 5.00 GiB are available: lower "
        "resources.replicas or capture.batch_tokens, or capture.shard_tokens where raw values are "
        "kept, or choose a narrower model.dtype."
    )
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_fits(dataclasses.replace(costs, available_memory=5 * GIB))


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("capture.layers=[0, 2]", "capture.layers must lie in 0..1 for LlamaForCausalLM, found 2."),
        ("capture.layers=[-1]", "capture.layers must lie in 0..1 for LlamaForCausalLM, found -1."),
        (
            "capture.max_length=129",
            (
                "capture.max_length must be at most 128, the longest sample that LlamaForCausalLM "
                "can read, found 129."
            ),
        ),
        (
            "model.site_modules={mlp: 'model.layers.{layer}.mlp.down_proj'}",
            (
                "capture.sites asks for 'attn', which model.site_modules does not name: name its "
                "modules there too, or take it out of capture.sites."
            ),
        ),
        (
            "model.site_modules={mlp: 'model.layers.{layer}.mlp'}",
            (
                "model.site_modules.mlp: 'model.layers.0.mlp' is no linear map; linear modules of "
                "layer 0 are: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
                "model.layers.0.self_attn.v_proj, model.layers.0.self_attn.o_proj, "
                "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, "
                "model.layers.0.mlp.down_proj."
            ),
        ),
        (
            "model.source=/no/such/folder",
            (
                "model.source '/no/such/folder' does not exist: give a Hugging Face id, "
                "timm:NAME, an existing folder or GGUF file, or package:NAME/FILE."
            ),
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    write_study: Callable[..., Path], override: str, error: str
) -> None:
    assert refusal(write_study(), override) == error


def test_chosen_sites_and_layers_are_all_that_is_planned(write_study: Callable[..., Path]) -> None:
    study = load_study(write_study(), ["capture.sites=[mlp]", "capture.layers=[1]"])
    assert [(site.site, site.layer) for site in inspect_model(study).sites] == [("mlp", 1)]
    assert inspect_model(study).num_neurons == 72
    by_hand = {"mlp": "model.layers.{layer}.mlp.down_proj"}
    study = load_study(write_study(), ["capture.sites=[mlp]", f"model.site_modules={by_hand}"])
    assert [(site.site, site.layer) for site in inspect_model(study).sites] == [
        ("mlp", 0),
        ("mlp", 1),
    ]


def test_a_task_without_tokens_is_refused(write_study: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"text": "a", "n": 1}\n{"text": "", "n": 2}\n')
    rows = {"dataset": "json", "data_files": f"{tmp_path}/rows.json"}
    nothing = write_study(tasks={"a": rows | {"filter": {"n": {"min": 5}}}}, reference=None)
    assert refusal(nothing) == ("tasks.a: no row passes its filter: correct the filter.")
    empty = write_study(tasks={"a": rows | {"filter": {"n": 2}}}, reference=None)
    assert refusal(empty) == (
        "tasks.a has no tokens after its filter (1 documents were read, 1 of them empty): correct "
        "its source or filter."
    )
    (tmp_path / "blank.txt").write_text(" \n")
    blank = write_study(tasks={"a": {"files": f"{tmp_path}/blank.txt"}}, reference=None)
    assert refusal(blank) == (
        "tasks.a has no tokens (1 documents were read, 1 of them empty): correct its source."
    )


def test_a_mixture_of_what_its_members_used_up_is_refused(
    write_study: Callable[..., Path], text_folder: Path
) -> None:
    tasks = {
        "code": {"files": f"{text_folder}/code/*.txt", "limit": 1},
        "mixed": {"mixture": ["code"]},
    }
    assert refusal(write_study(tasks=tasks)) == (
        "tasks.mixed has no documents, because its members (code) use all of theirs themselves: "
        "lower capture.tokens, or add documents to them."
    )


def test_a_mixture_whose_members_run_out_says_what_it_is_made_of(
    write_study: Callable[..., Path], text_folder: Path
) -> None:
    tasks = {
        "code": {"files": f"{text_folder}/code/*.txt", "limit": 3, "tokens": 20},
        "prose": {"files": f"{text_folder}/prose/*.txt", "tokens": 20},
        "mixed": {"mixture": ["code", "prose"]},
    }
    study = load_study(write_study(tasks=tasks))
    notes = list(make_plan(study, inspect_model(study)).notes())
    assert re.fullmatch(
        r"note: mixed is no mixture of equal parts, because documents ran out; those it has are "
        r"code [0-2], prose [4-9]",
        notes[0],
    )
    even = load_study(write_study())
    assert list(make_plan(even, inspect_model(even)).notes()) == []


def test_the_identity_of_a_run_leaves_out_what_changes_no_data(
    write_study: Callable[..., Path],
) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        study = load_study(write_study(), overrides)
        return identity_of(study, inspect_model(study))

    plain = identity()
    for same in ("resources.replicas=2", "analyses=[{}]", "reference=code", "model.init_seed=0"):
        assert identity(same) == plain, same
    for other in (
        "seed=1", "model.dtype=bfloat16", "model.init=random", "tasks.code.limit=3",
        "capture.tokens=99", "capture.batch_tokens=50", "capture.special_tokens=include",
    ):  # fmt: skip
        assert identity(other) != plain, other
    assert json.loads(json.dumps(plain)) == plain


def test_tasks_are_told_before_they_are_drawn_mixtures_last(
    write_study: Callable[..., Path],
) -> None:
    study = load_study(write_study())
    told: list[str] = []
    make_plan(study, inspect_model(study), on_task=told.append)
    assert told == ["code", "numbers", "prose", "mixed"]


@pytest.mark.parametrize("settings", [{}, {"capture": {"tokens": 37, "max_length": 10}}])
def test_an_outline_reckons_no_less_than_the_plan_takes(
    write_study: Callable[..., Path], settings: dict[str, Any]
) -> None:
    study = load_study(write_study(**settings))
    made, _ = plan(study)
    outline = outline_plan(study, inspect_model(study), "told so")
    assert outline.tasks.keys() == made.tasks.keys()
    for name, draw in outline.tasks.items():
        assert draw.num_counted == made.tasks[name].num_counted == study.tokens_of(name)
        assert draw.num_shards >= made.tasks[name].num_shards
        shards = [shard for shard in outline.shards if shard.task == name]
        assert [shard.shard for shard in shards] == list(range(draw.num_shards))
        assert sum(shard.num_tokens for shard in shards) == draw.num_tokens
        assert sum(shard.num_samples for shard in shards) == draw.num_samples
        assert all(shard.num_samples and shard.num_tokens for shard in shards)
    assert list(outline.notes()) == []


def test_an_outline_of_images_is_what_the_plan_is(
    write_vision_study: Callable[..., Path],
) -> None:
    study = load_study(write_vision_study())
    made = make_plan(study, inspect_model(study))
    outline = outline_plan(study, inspect_model(study), "told so")
    for name, draw in outline.tasks.items():
        found = made.tasks[name]
        assert (draw.num_samples, draw.num_tokens, draw.num_shards) == (
            found.num_samples, found.num_tokens, found.num_shards,
        )  # fmt: skip
