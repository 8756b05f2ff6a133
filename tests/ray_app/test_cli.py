"""What the command line says to wrong input: one sentence, status 2, and a store as it was."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from ray_app import cli
from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.hub import why_unreachable
from ray_app.progress import NoProgress
from ray_app.run import Run
from storage import DamagedFileError, open_store

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process: its status, and what it wrote to both streams."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["actlake", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def refused(call: Call) -> Callable[..., str]:
    """Runs a command that must fail on bad input; gives its one sentence."""

    def run(*arguments: object) -> str:
        status, out, err = call(*arguments)
        assert status == 2, err
        assert out == ""
        assert "Traceback" not in err
        told = [line for line in err.splitlines() if not line.startswith("choosing samples of ")]
        [line] = told
        assert line.startswith("error: ")
        assert line.endswith(".")
        return line.removeprefix("error: ")

    return run


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


BAD_STUDIES = [
    (
        ["--set", "capture.tokns=1"],
        "{study}: unknown key 'capture.tokns'; the nearest valid one is 'tokens'.",
    ),
    (
        ["--set", "reference=nothing"],
        (
            "{study}: reference must be the name of a task, found 'nothing'; tasks are: code, "
            "mixed, numbers, prose."
        ),
    ),
    (
        ["--set", "analyses=[{fractions: [0.5, 2]}]"],
        "{study}: analyses.0.fractions: each fraction must be in (0, 1], found 2.0.",
    ),
    (
        ["--set", "reference=null", "--set", "analyses=[{}]"],
        (
            "{study}: analyses need a reference: add 'reference: TASK' with one of: code, mixed, "
            "numbers, prose."
        ),
    ),
    (
        ["--set", "tasks.code={files: /none/*.txt}"],
        (
            "tasks.code.files: no file matches /none/*.txt; correct the pattern or install the "
            "package it looks in."
        ),
    ),
    (
        ["--set", "tasks.code={dataset: json, data_files: '{folder}/rows.json', column: body}"],
        "tasks.code: there is no column 'body' in the dataset; the columns are: text, stars.",
    ),
    (
        [
            "--set",
            "tasks.code={dataset: json, data_files: '{folder}/rows.json', filter: {stars: 9}}",
        ],
        ("tasks.code: no row passes its filter: correct the filter."),
    ),
    (
        ["--set", "model.source=/none/model"],
        (
            "model.source '/none/model' does not exist: give a Hugging Face id, timm:NAME, an "
            "existing folder or GGUF file, or package:NAME/FILE."
        ),
    ),
    (
        ["--set", "capture.layers=[7]"],
        "capture.layers must lie in 0..1 for LlamaForCausalLM, found 7.",
    ),
]


@pytest.mark.parametrize("command", ["plan", "capture"])
@pytest.mark.parametrize(("options", "error"), BAD_STUDIES)
def test_a_bad_study_is_refused_and_writes_nothing(
    refused: Callable[..., str], write_study: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, command: str, options: list[str], error: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("ray_app.commands.capture.ray_session", without_ray)
    monkeypatch.setattr("ray_app.commands.capture.cluster_nodes", local_nodes)
    (tmp_path / "rows.json").write_text('{"text": "a", "stars": 1}\n')
    study, store = write_study(), tmp_path / "store"
    filled = [option.replace("{folder}", str(tmp_path)) for option in options]
    found = refused(command, study, "--store", store, *filled)
    assert found == error.replace("{study}", str(study))
    assert not store.exists() or list(store.iterdir()) == []


class without_ray:
    """Stands for a Ray session where none is needed to find the mistake."""

    def __enter__(self) -> None:
        """Start nothing."""

    def __exit__(self, *error: object) -> None:
        """End nothing."""


def local_nodes() -> list[Any]:
    from ray_app.placement import local_nodes

    return local_nodes()


def test_a_study_that_is_not_there_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    found = refused("plan", tmp_path / "none.yaml")
    assert found.startswith(f"cannot read the study {tmp_path}/none.yaml: [Errno 2] No such file")


def test_a_hub_out_of_reach_is_told_at_once(
    refused: Callable[..., str], write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    why_unreachable.cache_clear()
    found = refused("plan", write_study(), "--set", "model.source=nobody/nothing")
    why_unreachable.cache_clear()
    assert found.startswith("model.source 'nobody/nothing' is no folder or file here and not in ")


def test_an_architecture_without_a_language_model_is_refused(
    refused: Callable[..., str], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()

    def refusal_of(model_type: str) -> str:
        (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
        return refused("plan", write_study(), "--set", f"model.source={tmp_path}/model")

    assert refusal_of("vits").startswith(
        "the architecture 'vits' has no causal language model and no image classifier in"
    )
    assert "of-the-future" in refusal_of("of-the-future")
    assert refusal_of("vit").endswith("write its preprocessor_config.json beside config.json.")


def test_a_study_changed_under_its_run_is_refused(
    refused: Callable[..., str], write_study: Callable[..., Path],
    begin_locally: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    study, store = write_study(), tmp_path / "store"
    run = begin_locally(study)
    before = everything_in(store)
    assert refused("capture", study, "--store", store, "--tokens", 170) == (
        f"the study 'tiny' changed since its run {run.id} in {store} began: capture.tokens: 160 -> "
        "170. Restore the study to resume, or pass --new-run to capture beside it."
    )
    assert everything_in(store) == before


def test_a_store_that_cannot_be_made_is_refused(
    refused: Callable[..., str], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert refused("capture", write_study(), "--store", tmp_path / "file" / "store") == (
        f"cannot make the store {tmp_path}/file/store: Not a directory. Give a folder that can be "
        "written."
    )


@pytest.mark.parametrize("command", [["status"], ["views"], ["verify"], ["sql", "select 1"]])
def test_a_store_that_is_not_there_is_refused(
    refused: Callable[..., str], tmp_path: Path, command: list[str]
) -> None:
    name, *rest = command
    found = refused(name, tmp_path / "none", *rest)
    assert found.startswith(f"no store at {tmp_path}/none: ")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def store(
    write_study: Callable[..., Path], capture_locally: Callable[..., Any], tmp_path: Path
) -> Path:
    """A finished capture."""
    capture_locally(write_study())
    return tmp_path / "store"


def test_wrong_sql_is_answered_in_duckdbs_words(call: Call, store: Path) -> None:
    status, out, err = call("sql", store, "select nothing from stats")
    assert (status, out) == (2, "")
    assert err.startswith('error: Binder Error: Referenced column "nothing" not found')
    assert "Traceback" not in err
    status, out, err = call("sql", store, "selec 1")
    assert (status, out) == (2, "")
    assert err.startswith("error: Parser Error: ")


def test_an_answer_is_written_whole_or_not_at_all(
    call: Call, refused: Callable[..., str], store: Path, tmp_path: Path
) -> None:
    answer = tmp_path / "answer.csv"
    query = "select task, count(*) as shards from commits group by all order by all"
    assert call("sql", store, query, "--format", "csv", "--output", answer) == (0, "", "")
    assert answer.read_text().splitlines()[0] == "task,shards"
    kept = answer.read_text()
    status, _, err = call("sql", store, "select x", "--format", "csv", "--output", answer)
    assert status == 2
    assert "Binder Error" in err
    failing = "select cast(task as integer) from commits"
    status, _, err = call("sql", store, failing, "--format", "csv", "--output", answer)
    assert status == 2
    assert "Conversion Error" in err
    assert answer.read_text() == kept
    assert refused("sql", store, query, "--format", "csv", "--output", tmp_path / "texts") == (
        f"cannot write --output {tmp_path}/texts: Is a directory. Give the name of a file."
    )
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert refused("sql", store, query, "--format", "csv", "--output", tmp_path / "no" / "a") == (
        f"cannot write --output {tmp_path}/no/a: there is no folder {tmp_path}/no. Make it first."
    )


def test_answers_go_to_standard_output_in_every_format(call: Call, store: Path) -> None:
    query = "select 7 as seven"
    assert call("sql", store, query, "--format", "csv") == (0, "seven\n7\n", "")
    assert json.loads(call("sql", store, query, "--format", "json")[1]) == [{"seven": 7}]
    assert "seven" in call("sql", store, query)[1]


def test_status_and_verify_describe_a_finished_store(call: Call, store: Path) -> None:
    status, out, err = call("status", store)
    assert (status, err) == (0, "")
    assert f"store {store}" in out
    assert "mixed" in out
    status, out, err = call("verify", store)
    assert (status, err) == (0, "")
    assert out.endswith("committed shards are whole, and their counts agree.\n")


def test_verify_names_what_is_damaged_and_fails(call: Call, store: Path) -> None:
    path = open_store(store).files.list("runs/*/stats/task=code/*/shard-00000.parquet")[0]
    content = (store / path).read_bytes()
    (store / path).write_bytes(content[:-7])
    status, out, err = call("verify", store)
    assert (status, out) == (2, "")
    problem, error = err.splitlines()
    assert problem.startswith(f"{path}: the file has {len(content) - 7:,} bytes where ")
    assert error == (
        f"error: 1 problem(s) in {store}: restore the files from a copy, or delete the commit "
        "record of a damaged shard and run its capture again."
    )


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("runs/*/samples/task=code/shard-00000.parquet", "begin another run with --new-run"),
        ("runs/*/run.json", "begin another run with --new-run, since its record"),
    ],
)
def test_verify_does_not_advise_to_compute_again_what_cannot_be(
    call: Call, store: Path, pattern: str, advice: str
) -> None:
    (path,) = open_store(store).files.list(pattern)
    (store / path).write_bytes(b"{")
    status, _, err = call("verify", store)
    assert status == 2
    assert f"restore the files from a copy, or {advice}" in err
    assert "delete the commit record" not in err


def test_inputs_of_shards_still_to_be_computed_are_checked(
    call: Call, tmp_path: Path, write_study: Callable[..., Path], begin_locally: Callable[..., Run]
) -> None:
    run = begin_locally(write_study(), tmp_path / "waiting")
    assert call("verify", tmp_path / "waiting")[0] == 0
    path = run.shards[0].samples.path
    altered = run.store.files.get_table(path).slice(0, 1)
    run.store.files.put_table(path, "samples", altered)
    status, _, err = call("verify", tmp_path / "waiting")
    assert status == 2
    assert err.startswith(f"{path}: the file has ")
    with pytest.raises(DamagedFileError, match="was altered since it was written"):
        driver.capture(run, LocalWorkers(build_stage(run.stage_spec())), NoProgress())
    assert run.store.committed(run.id) == set()


def test_every_command_that_a_message_names_exists() -> None:
    folder = Path(cli.__file__).parent.parent
    named = {
        (path.name, command)
        for package in ("storage", "analysis", "ray_app")
        for path in (folder / package).rglob("*.py")
        for command in re.findall(r"`actlake (\w+)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 3
    assert {command for _, command in named} <= cli.cli.commands.keys(), named


@pytest.mark.parametrize("command", ["status", "sql"])
def test_a_damaged_record_is_no_traceback(call: Call, store: Path, command: str) -> None:
    path = open_store(store).files.list("runs/*/commits/task=code/shard-00000.json")[0]
    (store / path).write_text("{")
    query = ["select * from commits"] if command == "sql" else []
    status, _, err = call(command, store, *query)
    assert status == 2
    assert err.startswith("error: ")
    assert "shard-00000.json" in err
    assert "Traceback" not in err


def test_a_run_must_be_named_where_there_are_several(
    refused: Callable[..., str], store: Path
) -> None:
    open_store(store).files.put_json("runs/run=second/run.json", {})
    found = refused("verify", store, "--recompute", 1, "--run", "third")
    assert found.startswith(f"no run 'third' in {store}: the runs there are: second, tiny-")


def test_views_can_be_piped_into_another_duckdb(call: Call, store: Path) -> None:
    import duckdb

    status, out, _ = call("views", store)
    assert status == 0
    connection = duckdb.connect()
    connection.execute(out)
    assert connection.sql("select count(*) from runs").fetchall() == [(1,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "Missing argument 'STUDY'"),
        (["capture", "study.yaml"], "Missing option '--store'"),
        (["plan", "study.yaml", "--tokens", "0"], "0 is not in the range x>=1"),
        (["plan", "study.yaml", "--tokens", "many"], "'many' is not a valid integer range"),
        (["sql", "store", "select 1", "--format", "xml"], "'xml' is not one of 'table', 'csv'"),
        (["staus", "store"], "No such command 'staus'"),
        (["plan", "study.yaml", "--stor", "x"], "No such option '--stor'"),
    ],
)
def test_wrong_options_are_answered_with_usage(
    call: Call, arguments: list[str], message: str
) -> None:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert message in err.replace(" Did you mean", "")
    assert err.startswith("Usage: ")
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    def fail(path: str) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("ray_app.commands.query.status", fail)
    with pytest.raises(ZeroDivisionError):
        call("status", tmp_path)


def test_control_c_is_a_stop_not_a_failure(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    def stop(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_app.commands.query.status", stop)
    status, _, err = call("status", tmp_path)
    assert status == 130
    assert err.strip() == "stopped; the same command goes on from what is finished."


def commands() -> list[str]:
    return sorted(cli.cli.commands)


@pytest.mark.parametrize("name", commands())
def test_every_command_explains_itself(name: str) -> None:
    command = cli.cli.commands[name]
    assert command.help
    result = CliRunner().invoke(cli.cli, [name, "--help"])
    assert result.exit_code == 0
    undocumented = [
        parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert undocumented == []


def test_a_plan_is_shown_in_eighty_columns(
    call: Call, write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = call("plan", write_study(), "--store", tmp_path / "store")
    assert status == 0
    assert err.splitlines() == [
        f"choosing samples of {task}" for task in ("code", "numbers", "prose", "mixed")
    ]
    shown = out.splitlines()
    assert shown[0] == "plan of tiny"
    assert all(len(line) <= 80 for line in shown)
    assert not (tmp_path / "store").exists()


def test_the_installed_command_refuses_in_one_sentence(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    command = Path(sys.executable).with_name("actlake")
    study = write_study()
    done = subprocess.run(
        [str(command), "capture", str(study), "--store", str(tmp_path / "store"), "--set", "sed=1"],
        check=False, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (f"error: {study}: unknown key 'sed'; the nearest valid one is 'seed'.\n")
    assert not (tmp_path / "store").exists()
