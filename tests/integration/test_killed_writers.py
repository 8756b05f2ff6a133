"""A process that is killed at any instant, also in the middle of a file, costs one shard."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ray_app.run import Run
from storage import open_store, verify_store

CAPTURE_AND_KILL = """
import os, random, signal, sys, time
from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import find_run
from ray_app.study import load_study
from storage import open_store

study, store, random = load_study(sys.argv[1]), open_store(sys.argv[2]), random.Random(sys.argv[3])
run = find_run(store, study, inspect_model(study), new_run=False)

def is_over(child):
    return os.waitpid(child, os.WNOHANG)[0] == child

kills = 0
while run.remaining():
    wanted = len(run.remaining()) - random.randint(10, 45)
    child = os.fork()
    if child == 0:
        driver.capture(run, LocalWorkers(build_stage(run.stage_spec())), NoProgress())
        os._exit(0)
    while len(run.remaining()) > wanted and not is_over(child):
        time.sleep(0.003)
    if run.remaining():
        time.sleep(random.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    print(kills, len(run.remaining()), flush=True)
"""


def test_a_capture_that_is_killed_again_and_again_ends_with_the_undisturbed_files(
    tmp_path: Path,
    long_study: Path,
    begin_locally: Callable[..., Run],
    undisturbed: dict[str, bytes],
    committed_files: Callable[[Path], dict[str, bytes]],
) -> None:
    store, seed = tmp_path / "store", random.randrange(1 << 32)
    begin_locally(long_study, store)
    ended = subprocess.run(
        [sys.executable, "-c", CAPTURE_AND_KILL, str(long_study), str(store), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr}"
    kills, remaining = ended.stdout.splitlines()[-1].split()
    assert int(kills) >= 2, "one that is not killed proves nothing"
    assert remaining == "0"
    assert committed_files(store) == undisturbed, f"seed {seed}"
    assert verify_store(open_store(store)).problems == []
