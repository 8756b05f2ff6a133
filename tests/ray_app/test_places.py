"""Paths of study files lead to packages, site-packages and plain folders."""

import json
import sysconfig
from pathlib import Path

import pytest

from ray_app.places import find_files, resolve_path
from ray_app.study import StudyError


def test_package_paths_lie_in_the_package() -> None:
    assert Path(resolve_path("package:json/decoder.py")) == Path(json.__file__).with_name(
        "decoder.py"
    )


def test_a_package_is_located_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carrier_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs what is not here')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("package:carrier_of_weights/model.gguf") == str(package / "model.gguf")


@pytest.mark.parametrize("name", ["no_such_package", "json.decoder.inner", ""])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve_path(f"package:{name}/x.txt")
    assert str(caught.value) == (
        f"'package:{name}/x.txt' needs the Python package {name!r}, which is not installed here: "
        "install the distribution that carries it."
    )


def test_site_packages_paths_lie_among_installed_packages() -> None:
    found = find_files(["site-packages:numpy/*.py"])
    assert Path(sysconfig.get_path("purelib")) / "numpy" / "__init__.py" in found


def test_other_places_are_paths_or_urls() -> None:
    assert resolve_path("~/x.txt") == str(Path.home() / "x.txt")
    assert resolve_path("a/b.txt") == "a/b.txt"
    assert resolve_path("hf://datasets/a/b.jsonl") == "hf://datasets/a/b.jsonl"


def test_files_are_found_once_each_sorted_and_without_folders(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "folder.txt/d.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_files([f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/none"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a.txt",
        "b.txt",
        "deep/er/c.txt",
    ]
