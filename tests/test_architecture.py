"""The rules of the house: who may import whom, where SQL stands, how long a function may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("storage", "analysis", "ray_app")

MAY_IMPORT = {
    "storage": {"storage"},
    "analysis": {"analysis", "storage"},
    "ray_app": {"ray_app", "analysis", "storage"},
}
"""One direction, no exceptions: ray_app -> analysis -> storage."""

ONLY_IN = {
    "ray": (
        "ray_app/actors.py",
        "ray_app/tasks.py",
        "ray_app/service/deployment.py",
        "ray_app/service/ray_jobs.py",
    ),
    "transformers": ("ray_app/models/",),
    "timm": ("ray_app/models/",),
    "bitsandbytes": ("ray_app/models/",),
    "duckdb": ("storage/catalog.py",),
}
"""Libraries with a home: files or folders that may import them when they run."""

MAX_FUNCTION_LINES = 60

HEAVY = ("ray", "torch", "transformers", "datasets")


def modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path from the root, syntax tree) of every module of the three packages."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root).as_posix(), _parsed(path)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST, *, for_types: bool) -> Iterator[str]:
    """Top-level names that a tree imports, inside functions too.

    Args:
        tree: what to look through.
        for_types: whether imports below ``if TYPE_CHECKING``, which never run, are given too.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else str(node.module).split(".")[0]
        elif for_types or not _is_type_checking(node):
            yield from imports(node, for_types=for_types)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_against_the_direction(root: Path) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in modules(root)
        for name in imports(tree, for_types=True)
        if name == "." or (name in PACKAGES and name not in MAY_IMPORT[path.split("/")[0]])
    ]


def imports_outside_their_home(root: Path) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in modules(root)
        for name in imports(tree, for_types=False)
        if name in ONLY_IN and not path.startswith(ONLY_IN[name])
    ]


def sql_outside_sql_files(root: Path) -> list[str]:
    statement = re.compile(r"\bselect\b.*\bfrom\b|\bcreate table\b", re.IGNORECASE | re.DOTALL)
    return [
        f"{path}:{node.lineno}"
        for path, tree in modules(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant | ast.JoinedStr)
        and statement.search(_text(node))
        and node not in set(_docstrings(tree))
    ]


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part) if isinstance(part, ast.Constant) else "x" for part in node.values
        )
    return node.value if isinstance(node.value, str) else ""


def _docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            yield node.value


def long_functions(root: Path) -> list[str]:
    return [
        f"{path}:{node.name}"
        for path, tree in modules(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]


RULES = [
    imports_against_the_direction,
    imports_outside_their_home,
    sql_outside_sql_files,
    long_functions,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Callable[[Path], list[str]]) -> None:
    assert len(list(modules(ROOT))) > 30
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "path", "source", "found"),
    [
        (
            imports_against_the_direction,
            "storage/files.py",
            "def late():\n    from analysis.steps import Steps",
            "storage/files.py imports analysis",
        ),
        (
            imports_against_the_direction,
            "analysis/deep/inside.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray_app.plan",
            "analysis/deep/inside.py imports ray_app",
        ),
        (
            imports_against_the_direction,
            "ray_app/run.py",
            "from . import plan",
            "ray_app/run.py imports .",
        ),
        (
            imports_outside_their_home,
            "ray_app/run.py",
            "class A:\n    def f(self):\n        with self:\n            import ray.util",
            "ray_app/run.py imports ray",
        ),
        (
            imports_outside_their_home,
            "ray_app/actors_too.py",
            "import ray",
            "ray_app/actors_too.py imports ray",
        ),
        (
            imports_outside_their_home,
            "ray_app/sampling.py",
            "from transformers.utils import logging",
            "ray_app/sampling.py imports transformers",
        ),
        (
            imports_outside_their_home,
            "analysis/steps.py",
            "import numpy, duckdb as db",
            "analysis/steps.py imports duckdb",
        ),
        (
            sql_outside_sql_files,
            "ray_app/run.py",
            "def f(name):\n    '''select a from docs'''\n    return f'select {name} from t'",
            "ray_app/run.py:3",
        ),
        (
            long_functions,
            "ray_app/run.py",
            "def f():\n" + "    x = 1\n" * 60,
            "ray_app/run.py:f",
        ),
    ],
)
def test_each_rule_finds_what_breaks_it(
    tmp_path: Path,
    rule: Callable[[Path], list[str]],
    path: str,
    source: str,
    found: str,
) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    assert rule(tmp_path) == [found]


@pytest.mark.parametrize(
    "path", ["ray_app/actors.py", "ray_app/models/any.py", "storage/catalog.py"]
)
def test_homes_may_import_what_is_theirs(tmp_path: Path, path: str) -> None:
    names = [name for name, homes in ONLY_IN.items() if path.startswith(homes)]
    assert names
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"import {name}\n" for name in names), encoding="utf-8")
    assert imports_outside_their_home(tmp_path) == []


def loaded_by(statement: str) -> set[str]:
    """The heavy libraries that a new Python has loaded after a statement."""
    script = f"import sys; {statement}; print([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True, capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    return set(ast.literal_eval(done.stdout))


@pytest.mark.parametrize(
    "names",
    [
        "storage, analysis",
        "ray_app.cli",
        "ray_app.study",
        "ray_app.commands.query",
        "ray_app.client",
        "ray_app.service.app",
        "ray_app.service.slot",
        "ray_app.commands.serve",
    ],
)
def test_asking_a_store_and_reading_a_study_load_no_machinery(names: str) -> None:
    assert loaded_by(f"import {names}") == set()


def test_loaded_machinery_is_noticed() -> None:
    assert loaded_by("import storage, datasets") >= {"datasets"}


def test_storage_loads_duckdb_only_to_query() -> None:
    script = "import sys, storage; assert 'duckdb' not in sys.modules; import storage.catalog"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; assert 'duckdb' in sys.modules"],
        check=False, capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 0
