"""Actors, raylets and drivers that are killed at random cost work, and nothing else."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).with_name("chaos.py")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_few_kills_leave_the_store_of_an_undisturbed_capture(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    arguments = ["--kills", "4", "--seed", str(seed), "--shards", "36"]
    ended = subprocess.run(
        [sys.executable, str(CHAOS), *arguments],
        env={**os.environ, "PYTHONPATH": str(CHAOS.parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert ended.returncode == 0, f"seed {seed}: {ended.stdout}{ended.stderr}"
    report = json.loads(ended.stdout[ended.stdout.index("\n{") :])
    assert report["kills"] == {"actor": 2, "driver": 1, "raylet": 1}
    assert report["drivers"] >= 2
    assert report["captures"] >= 1
    assert report["problems"] == []
    held = re.findall(r"undisturbed .*; ([\d,]+) tokens, \1 planned", ended.stdout)
    assert len(held) == report["captures"]
    assert sum(int(tokens.replace(",", "")) for tokens in held) == report["tokens"]
