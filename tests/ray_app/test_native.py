"""Where C sources cannot be built, one sentence says why, and `auto` does without them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ray_app.native import NativeError, can_build, load_library


def write_program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a C source."""

    def write(text: str) -> Path:
        path = tmp_path / "source.c"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_what_is_built_can_be_called(source: Callable[[str], Path]) -> None:
    assert load_library(source("int twice(int x) { return 2 * x; }")).twice(21) == 42


def test_a_source_that_does_not_compile_says_what_the_compiler_says(
    source: Callable[[str], Path],
) -> None:
    path = source("int twice(int x) { return 2 * y; }")
    with pytest.raises(NativeError, match=r"cannot be built here, because .*.y. undeclared"):
        load_library(path)
    assert not can_build(path)


def test_a_machine_without_a_compiler_is_told_what_to_install(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    path = source("")
    with pytest.raises(NativeError, match=r"none of cc, gcc, clang is on this machine: install"):
        load_library(path)
    assert not can_build(path)


def test_a_library_that_cannot_be_loaded_says_where_it_was(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", write_program(tmp_path / "cc", "exit 0"))
    path = source("")
    with pytest.raises(NativeError, match=r"cannot be loaded from .*; set TMPDIR to a folder"):
        load_library(path)
    assert not can_build(path)
