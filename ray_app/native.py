"""The C sources of this package, built where they run.

A library is built in a fraction of a second, by each process for itself: nothing is cached that
could be of another machine, another version or another user.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from storage import ActlakeError

__all__ = ["NativeError", "can_build", "load_library"]

_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-shared",
    # What makes results depend on the machine stays out; what only serves errno and traps, too.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_X86_FLAGS = ("-mprefer-vector-width=512",)


class NativeError(ActlakeError):
    """C sources cannot be built here."""


@cache
def load_library(source: Path) -> ctypes.CDLL:
    """Build a C source for this machine's processor and load it.

    Built by gcc, it shares the OpenMP threads of torch, which brings the runtime it asks for.

    Args:
        source: a .c file of this package.

    Raises:
        NativeError: if there is no C compiler, it fails, or what it builds cannot be loaded.
    """
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise NativeError(
            "compiled reductions need a C compiler, and none of "
            f"{', '.join(dict.fromkeys(names))} is on this machine: install gcc here, or begin a "
            "run in another store with resources.reduction: eager."
        )
    flags = _FLAGS + (_X86_FLAGS if platform.machine() == "x86_64" else ())
    with tempfile.TemporaryDirectory(prefix="actlake-") as folder:
        library = Path(folder) / f"{source.stem}.so"
        command = [compiler, *flags, str(source), "-o", str(library), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            raise NativeError(
                f"compiled reductions cannot be built here, because {' '.join(command)} says: "
                f"{' '.join(done.stderr.split())[:300]}; install gcc, or begin a run in another "
                "store with resources.reduction: eager."
            )
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise NativeError(
                f"compiled reductions cannot be loaded from {folder}: {error}; set TMPDIR to a "
                "folder whose files may be executed, or begin a run in another store with "
                "resources.reduction: eager."
            ) from error


def can_build(source: Path) -> bool:
    """Whether a C source can be built and loaded here."""
    try:
        load_library(source)
    except NativeError:
        return False
    return True
