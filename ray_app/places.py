"""Paths as study files write them: plain, or inside an installed package."""

import glob
import importlib.util
import sysconfig
from pathlib import Path

from ray_app.study import StudyError

__all__ = ["find_files", "resolve_path"]


def resolve_path(place: str) -> str:
    """Turn ``package:NAME/PATH`` and ``site-packages:PATH`` into a path on this machine.

    URLs are left as they are. The package is located, not imported, so data packages whose own
    dependencies are absent work.

    Raises:
        StudyError: if the package is not installed.
    """
    if place.startswith("site-packages:"):
        return str(Path(sysconfig.get_path("purelib")) / place.removeprefix("site-packages:"))
    if "://" in place:
        return place
    if not place.startswith("package:"):
        return str(Path(place).expanduser())
    name, _, inside = place.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise StudyError(
            f"{place!r} needs the Python package {name!r}, which is not installed here: "
            f"install the distribution that carries it."
        )
    return str(Path(folders[0]) / inside)


def find_files(patterns: list[str]) -> list[Path]:
    """All files that match the glob patterns (``**`` for any depth), sorted, each once."""
    found: set[str] = set()
    for pattern in patterns:
        # Path.glob refuses absolute patterns.
        found.update(glob.glob(resolve_path(pattern), recursive=True))  # noqa: PTH207
    return sorted(path for path in map(Path, found) if path.is_file())
