"""What README and docs/ say is held to the code: reference pages, SQL, Python, commands."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from analysis import AnalysisSettings, analyse_run
from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.cli import cli
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import begin_run
from ray_app.study import load_study
from storage import Store, create_store, open_store

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


@pytest.fixture(scope="module")
def analysed_store(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: transformers.PreTrainedTokenizerFast
) -> Store:
    """A store with everything that a run can keep, and the tasks and layers that pages ask for."""
    root = tmp_path_factory.mktemp("docs")
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=160, num_hidden_layers=8,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for task in ("python", "prose"):
        (root / task).mkdir()
        for index in range(8):
            text = f"the lake {index} lies still while boats wait for {task} wind " * 3
            (root / task / f"{index}.txt").write_text(text, encoding="utf-8")
    (root / "study.yaml").write_text(
        f"""
        name: docs
        model: {{source: {root}/model}}
        tasks:
          python: {{files: {root}/python/*.txt}}
          prose: {{files: {root}/prose/*.txt}}
          mixed: {{mixture: [python, prose]}}
        reference: mixed
        capture: {{tokens: 60, max_length: 24, pooled: [max, mean], values: {{}},
                  coactivation: {{layers: [1]}}}}
        """,
        encoding="utf-8",
    )
    study = load_study(root / "study.yaml")
    store = create_store(root / "store")
    run = begin_run(store, study, inspect_model(study), threads=1)
    driver.capture(run, LocalWorkers(build_stage(run.stage_spec())), NoProgress())
    settings = AnalysisSettings(metrics=["abs", "rms"], fractions=[0.05, 0.2])
    analyse_run(store, run.id, settings)
    return open_store(store.files.root)


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
