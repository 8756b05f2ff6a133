"""A capture that is stopped in any way ends, run again, with the files of an undisturbed one."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_app.run import Run
from storage import open_store, verify_store

pytestmark = pytest.mark.ray


def test_a_driver_that_is_killed_resumes_with_two_replicas_to_the_same_files(
    tmp_path: Path,
    long_study: Path,
    undisturbed: dict[str, bytes],
    actlake: Callable[..., Any],
    num_committed: Callable[[Path], int],
    committed_files: Callable[[Path], dict[str, bytes]],
) -> None:
    store, seed = tmp_path / "store", random.randrange(1 << 32)
    instant = random.Random(seed).randrange(1, 80)
    command = actlake("capture", long_study, "--store", store)
    command.wait_until(lambda: num_committed(store) >= instant, f"commit {instant}")
    command.kill()
    kept = num_committed(store)
    assert verify_store(open_store(store)).problems == []
    arguments = ("capture", long_study, "--store", store, "--set", "resources.replicas=2")
    command = actlake(*arguments)
    assert command.wait() == 0, command.output
    assert committed_files(store) == undisturbed, f"seed {seed}"
    assert command.left_behind() == []
    assert_log_tells(command.output, kept, num_committed(store))

    again = actlake(*arguments)
    assert again.wait() == 0, again.output
    assert re.fullmatch(r"run long-\w+ is complete in .*/store after \d+ s\n", again.output)
    assert committed_files(store) == undisturbed


def assert_log_tells(output: str, kept: int, num_shards: int) -> None:
    """Plain lines: no colours, no bar, and none broken at the width of a terminal."""
    assert "\x1b" not in output
    assert "\r" not in output
    begun, loaded, *_, progress, complete = output.splitlines()
    remaining = num_shards - kept
    assert re.fullmatch(
        rf"run long-\w+: {kept} of {num_shards} shards committed, {remaining} to do", begun
    )
    assert re.fullmatch(
        r"2 x 1 stage\(s\) of LlamaForCausalLM, 1 thread\(s\) each, loaded in \d+ s", loaded
    )
    assert re.fullmatch(
        rf"capture: ([\d,]+) of \1 tokens, {remaining} of {remaining} shards committed, "
        r"[\d,]+ tokens/s, 0 s left",
        progress,
    )
    assert re.match(r"run long-\w+ is complete in .*/store after \d+ s$", complete)


def test_a_worker_that_is_killed_is_replaced_and_its_shards_are_computed_again(
    tmp_path: Path,
    long_study: Path,
    undisturbed: dict[str, bytes],
    actlake: Callable[..., Any],
    num_committed: Callable[[Path], int],
    committed_files: Callable[[Path], dict[str, bytes]],
) -> None:
    store = tmp_path / "store"
    command = actlake("capture", long_study, "--store", store)
    command.wait_until(lambda: num_committed(store) >= 10, "commit 10")
    (worker,) = command.workers()
    worker.kill()
    assert command.wait() == 0, command.output
    assert re.search(
        r"^capture: shard \d+ of \w+ is computed again from its start, because a worker died \(",
        command.output,
        re.MULTILINE,
    ), command.output
    assert "is complete" in command.output
    assert "Traceback" not in command.output
    assert committed_files(store) == undisturbed
    assert command.left_behind() == []


def test_control_c_on_a_terminal_stops_and_leaves_a_store_that_can_be_resumed(
    tmp_path: Path,
    long_study: Path,
    undisturbed: dict[str, bytes],
    actlake: Callable[..., Any],
    capture_locally: Callable[..., Run],
    num_committed: Callable[[Path], int],
    committed_files: Callable[[Path], dict[str, bytes]],
) -> None:
    store = tmp_path / "store"
    command = actlake("capture", long_study, "--store", store, terminal=True)
    command.wait_until(lambda: num_committed(store) >= 20, "commit 20")
    command.press_control_c()
    assert command.wait() == 130, command.output
    assert "stopped; the same command goes on from what is finished." in command.output
    assert "Traceback" not in command.output
    # A terminal gets a bar that is drawn again and again in place.
    assert "━" in command.output
    assert re.search(r"[\d,]+/[\d,]+ tokens", command.output)
    assert re.search(r"\d+/\d+ shards", command.output)
    assert "capture: " not in command.output
    kept = num_committed(store)
    assert command.left_behind() == []
    assert 20 <= kept < len(capture_locally(long_study, store).shards)
    assert committed_files(store) == undisturbed
