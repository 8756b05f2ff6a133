"""What README and docs/ say is held to the code: reference pages, SQL, Python, commands."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import AnalysisSettings, analyse_run
from ray_app.cli import cli
from ray_app.run import Run
from ray_app.study import load_study
from storage import Store, open_store

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[Any]:
    """All code blocks of a language, with the page that they stand on as their test id."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(pattern.findall(page.read_text(encoding="utf-8")))
    ]


def reference() -> dict[str, Callable[[], str]]:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[str, Callable[[], str]] = module.PAGES
    return pages


@pytest.fixture
def analysed_store(write_study: Callable[..., Path], capture_locally: Callable[..., Run]) -> Store:
    run = capture_locally(write_study())
    settings = AnalysisSettings(metrics=["abs", "rms"], fractions=[0.05, 0.2])
    analyse_run(run.store, run.id, settings)
    return open_store(run.store.files.root)


@pytest.mark.parametrize("name", ["tables.md", "study.md", "commands.md"])
def test_reference_pages_say_what_the_code_says(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == reference()[name](), "run: python docs/make_reference.py"


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_is_explained(command: str) -> None:
    assert cli.commands[command].help
    assert f"actlake {command}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("query", blocks("sql"))
def test_every_query_of_the_documentation_runs(analysed_store: Store, query: str) -> None:
    analysed_store.table(query)


@pytest.mark.parametrize("source", [b for b in blocks("yaml") if "tasks:" in str(b.values[0])])
def test_every_study_of_the_documentation_is_valid(tmp_path: Path, source: str) -> None:
    (tmp_path / "study.yaml").write_text(source, encoding="utf-8")
    load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize("source", blocks("python"))
def test_every_python_example_of_the_documentation_runs(
    analysed_store: Store, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(source.replace('"demo-store"', repr(str(analysed_store.files.root))), {})
    assert capsys.readouterr().out.strip()


def test_pictures_and_pages_that_are_linked_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
