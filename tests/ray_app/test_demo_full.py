"""`make demo-full` gives commands that exist, for all measurements of the paper, and times them."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from ray_app.cli import cli
from ray_app.study import load_study
from storage import create_store
from written_runs import importances, write_run

SCRIPT = Path(__file__).parents[2] / "studies" / "demo_full.py"


@pytest.fixture
def demo() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("demo_full", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_full"] = module  # Its dataclasses look for their module.
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["SMOLLM2", "DIGITS"])
def test_every_measurement_of_the_paper_is_a_command_that_parses(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one = getattr(demo, name)
    assert load_study(one.file).name == one.study
    given: list[tuple[str, ...]] = []
    clock = demo.Clock()
    monkeypatch.setattr(demo.Clock, "actlake", lambda self, *arguments: given.append(arguments))
    monkeypatch.setattr(demo, "newest_run", lambda store, study, init: f"run-{init}")
    monkeypatch.setattr(demo, "experts_of", lambda store, *runs: [f"of-{run}" for run in runs])
    demo.measure("store", one, clock)
    commands = [arguments[0] for arguments in given]
    assert set(commands) == {
        "run", "drift", "ablate", "crosseval", "experts", "align", "routing",
    }  # fmt: skip
    for command, *arguments in given:
        cli.commands[command].make_context(command, list(arguments))
    assert ("drift", "store", "run-pretrained", "run-random") in given
    [aligned] = [arguments for arguments in given if arguments[0] == "align"]
    assert aligned[2:4] == ("of-run-pretrained", "of-run-random")


def test_the_newest_complete_run_of_each_kind_is_taken(demo: ModuleType, tmp_path: Path) -> None:
    store = create_store(tmp_path)
    write_run(store, "trained", importances(1))
    write_run(store, "half", importances(1), commit=False, init="random")
    write_run(store, "twin", importances(2), init="random")
    assert demo.newest_run(str(tmp_path), "by hand", "pretrained") == "trained"
    assert demo.newest_run(str(tmp_path), "by hand", "random") == "twin"


def test_a_step_is_timed_with_what_its_children_use(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = "import time; end = time.process_time() + 2\nwhile time.process_time() < end: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    clock = demo.Clock()
    start = time.monotonic()
    clock.run(sys.executable, "-c", parent, shown="a parent")
    [(name, seconds, processor)] = clock.rows
    assert name == "a parent"
    assert 2 <= seconds <= time.monotonic() - start
    assert 1 <= processor <= 3
    assert "$ a parent" in capsys.readouterr().out
    assert list(clock.lines())[-1].endswith("all")


def test_a_step_that_fails_ends_the_demo(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.Clock().run(sys.executable, "-c", "raise SystemExit(3)", shown="fails")
    assert ended.value.code == 3
