"""A run that is interrupted while it is planned does not exist, and can be begun again."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_app.plan import inspect_model
from ray_app.run import Run, begin_run
from ray_app.study import load_study
from storage import StoreError, create_store, open_store

PLAN = """
import os, signal, sys
from ray_app.plan import inspect_model
from ray_app.run import begin_run
from ray_app.study import load_study
from storage import create_store

def on_task(task):
    if task == "prose":
        os.kill(os.getpid(), signal.SIGKILL)

study = load_study(sys.argv[1])
begin_run(create_store(sys.argv[2]), study, inspect_model(study), threads=1, on_task=on_task)
"""


def test_planning_that_is_killed_leaves_no_run_and_no_store(
    tmp_path: Path,
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    committed_files: Callable[[Path], dict[str, bytes]],
) -> None:
    study, store = write_study(), tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-c", PLAN, str(study), str(store)],
        stderr=subprocess.PIPE,
        check=False,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(store.glob("planning-*/samples/task=*/*.parquet")), "it must die amid its work"
    with pytest.raises(
        StoreError, match="a store has a folder 'runs' or 'analyses', found neither"
    ):
        open_store(store)
    capture_locally(study, store)
    capture_locally(study, tmp_path / "undisturbed")
    assert committed_files(store) == committed_files(tmp_path / "undisturbed")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_planning_that_is_interrupted_removes_what_it_has_written(
    tmp_path: Path, write_study: Callable[..., Path], interruption: type[BaseException]
) -> None:
    study, store = load_study(write_study()), create_store(tmp_path / "store")

    def on_task(task: str) -> None:
        if task == "prose":
            assert list(Path(store.files.root).glob("planning-*/samples/task=*/*.parquet"))
            raise interruption

    with pytest.raises(interruption):
        begin_run(store, study, inspect_model(study), threads=1, on_task=on_task)
    assert not Path(store.files.root).exists(), "neither inputs nor the folder made for them"
    assert store.runs() == []
