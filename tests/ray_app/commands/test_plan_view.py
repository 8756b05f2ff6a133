"""A plan fits the terminal: counts are whole, samples are cut, and nothing in them is obeyed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from ray_app.capture.shards import PlannedShard
from ray_app.commands.plan_view import plan_lines
from ray_app.plan import Plan, inspect_model, make_plan
from ray_app.sampling import TaskDraw
from ray_app.study import load_study
from storage import FileRecord


def draw(counted: int, text: str, source: str = "a/file.py") -> TaskDraw:
    return TaskDraw(
        num_documents=1_234_567, num_empty=1_234, num_samples=23_456_789,
        num_tokens=9_876_543_210, num_counted=counted, num_shards=602_817,
        examples=[(source, text)] * 3,
    )  # fmt: skip


@pytest.fixture
def made(write_study: Callable[..., Path]) -> Plan:
    """A plan of two tasks with large counts."""
    study = load_study(write_study())
    return Plan(
        study=study,
        model=inspect_model(study),
        tasks={"code": draw(160, "one\n\ttwo  three"), "mixed": draw(160, "word " * 100)},
        shards=[
            PlannedShard(
                task="code", shard=0, num_samples=1, num_tokens=19_753_086_420, num_counted=1,
                num_batches=1,
                samples=FileRecord(path="", table="samples", rows=0, bytes=0, sha256=""),
            )
        ],
    )  # fmt: skip


def lines(made: Plan, width: int) -> list[str]:
    return list(plan_lines(made, made.costs(None), width))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_count_is_readable(made: Plan, width: int) -> None:
    [row] = [line for line in lines(made, width) if line.startswith("code ")]
    assert row.split() == [
        "code", "1,234,567", "1,234", "23,456,789", "9,876,543,210", "602,817",
    ]  # fmt: skip
    assert cell_len(row) <= width


def test_columns_are_named_and_summed(made: Plan) -> None:
    shown = lines(made, 80)
    assert shown[0] == "plan of tiny"
    assert shown[2].split() == ["task", "documents", "empty", "samples", "tokens", "shards"]
    [total] = [line for line in shown if line.startswith("all ")]
    assert total.split() == [
        "all", "2,469,134", "2,468", "46,913,578", "19,753,086,420", "1,205,634",
    ]  # fmt: skip
    assert len({len(line) for line in shown[2:6]}) == 1


def test_a_long_name_of_a_task_is_cut_and_no_count(made: Plan) -> None:
    made.tasks = {"a" * 64: draw(160, "x"), "b": draw(160, "y")}
    made.study.tasks["a" * 64] = made.study.tasks["code"]
    made.study.tasks["b"] = made.study.tasks["code"]
    rows = lines(made, 80)[2:6]
    assert all(len(row) == 80 for row in rows)
    assert "…" in rows[1]
    assert all("9,876,543,210" in row for row in rows[1:3])


@pytest.mark.parametrize("width", [40, 80, 120])
def test_three_samples_of_each_task_are_shown_on_one_line_each(made: Plan, width: int) -> None:
    shown = lines(made, width)
    start = shown.index("first samples")
    samples = shown[start + 1 : start + 9]
    assert samples[0] == "code:"
    assert samples[4] == "mixed:"
    assert samples[1:4] == ["  a/file.py | one two three"] * 3
    assert all(width - 1 <= cell_len(line) <= width and line[-1] == "…" for line in samples[5:8])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[bold]not markup[/nothing]", "[bold]not markup[/nothing]"),
        ("clear\x1b[2Jscreen\x07", "clear [2Jscreen "),
        ("zero\u200bwidth\u202eturned", "zero width turned"),
    ],
)
def test_a_sample_is_shown_not_obeyed(made: Plan, text: str, shown: str) -> None:
    made.tasks = {"code": draw(160, text)}
    assert f"  a/file.py | {shown}" in lines(made, 80)


def test_wide_characters_are_counted_as_wide(made: Plan) -> None:
    made.tasks = {"code": draw(160, "漢字" * 100)}
    [sample, *_] = [line for line in lines(made, 60) if "漢" in line]
    assert 58 <= cell_len(sample) <= 60


def test_the_end_of_a_long_path_is_kept(made: Plan) -> None:
    made.tasks = {"code": draw(160, "text", source="deep/" * 30 + "end.py")}
    [sample, *_] = [line for line in lines(made, 80) if "end.py" in line]
    assert sample.startswith("  …")
    assert sample.endswith("deep/end.py | text")


def test_a_task_that_ends_early_is_noted(made: Plan) -> None:
    made.tasks = {"code": draw(97, "x"), "mixed": draw(160, "y")}
    assert [line for line in lines(made, 80) if line.startswith("note")] == [
        "note: the documents of code end at 97 of the 160 counted tokens asked for"
    ]


def test_costs_are_told_with_what_there_is(made: Plan) -> None:
    shown = lines(made, 80)
    start = next(i for i, line in enumerate(shown) if line.startswith("model "))
    model, measures, _, inputs, statistics, top, memory, stage, *hours = shown[start:]
    assert model == ("model   LlamaForCausalLM, 2 layers, 45,728 parameters, 208 neurons captured")
    assert measures.startswith("        measures from its configuration, sha256:")
    assert "store   7 files, about 367.93 GiB; no bound there" in shown
    limited = list(plan_lines(made, made.costs(5 << 30), 80))
    assert "store   7 files, about 367.93 GiB; 5.00 GiB are free" in limited
    kept = ["keeps", "inputs and tokens", "statistics", "top 5 activations"]
    assert [inputs[:5], *(line[21:] for line in (inputs, statistics, top))] == kept
    assert memory.startswith("memory  1 replica(s) of 1 stage(s): 1.06 GiB")
    assert stage.startswith("        stage 0: layers 0-1, 1.06 GiB")
    # Two tasks of 160 tokens are a small part of 20 thousand million.
    assert hours[0].split()[0] == "hours"
    assert float(hours[0].split()[1]) > 1e6 * float(hours[1].split()[0])
    assert all(len(line) <= 80 for line in hours)


def test_a_real_plan_shows_real_samples(write_study: Callable[..., Any]) -> None:
    study = load_study(write_study())
    made = make_plan(study, inspect_model(study))
    shown = lines(made, 80)
    assert sum(line.startswith("  0") and " | <s>" in line for line in shown) == 9
    assert sum(line.startswith("  code/0") for line in shown) == 1
