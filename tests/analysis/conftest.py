"""Captured runs made from activations by hand, and files of scores of one's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import Store, create_store, layout

Activations = dict[tuple[str, int], np.ndarray]
"""(site, layer) -> (positions, neurons) float32."""

TASKS = ("code", "prose", "numbers", "mixed")
"""The last one is the reference."""

WIDTHS = {("attn", 0): 6, ("attn", 1): 6, ("mlp", 0): 20, ("mlp", 1): 20, ("mlp", 2): 10}


def make_activations(task: str, shard: int) -> Activations:
    """Activations that differ by task, with signs, zeros and a neuron that is never active."""
    random = np.random.default_rng([TASKS.index(task), shard])
    found = {}
    for (site, layer), width in WIDTHS.items():
        z = random.normal(random.normal(size=width) / 2, 1 + layer, (12 + shard, width))
        z[np.abs(z) < 0.2] = 0
        z[:, 0] = 0
        found[site, layer] = z.astype(np.float32)
    return found


def _stats(shard: int, site: str, layer: int, z: np.ndarray) -> pa.Table:
    x = z.astype(np.float64)
    neurons = np.arange(z.shape[1], dtype=np.int32)
    return pa.table(
        {
            "shard": pa.array([shard] * len(neurons), pa.int32()),
            "site": [site] * len(neurons),
            "layer": pa.array([layer] * len(neurons), pa.int16()),
            "neuron": neurons,
            "head": pa.array(neurons // 2 if site == "attn" else [None] * len(neurons), pa.int16()),
            "n": np.full(len(neurons), len(z)),
            "mean": x.mean(0),
            "m2": ((x - x.mean(0)) ** 2).sum(0),
            "abs_sum": np.abs(x).sum(0),
            "sqrt_sum": np.sqrt(np.abs(x)).sum(0),
            "pos_sum": x.clip(min=0).sum(0),
            "neg_sum": x.clip(max=0).sum(0),
            "pos_count": (x > 0).sum(0),
            "nonzero_count": (x != 0).sum(0),
            "min": z.min(0),
            "max": z.max(0),
        }
    )


class CapturedRun:
    """A run of two shards per task, and the activations that it was made from."""

    id = "run-1"

    def __init__(self, root: Path, tasks: tuple[str, ...] = TASKS) -> None:
        self.store: Store = create_store(root)
        self.tasks = tasks
        self._shards: list[dict[str, Any]] = []
        self._parts: dict[str, list[Activations]] = {}

    def add(self, task: str, shard: int, *, commit: bool = True) -> None:
        """Plan one shard, and compute it unless it is to stay uncommitted."""
        self._shards.append({"task": task, "shard": shard})
        if not commit:
            return
        activations = make_activations(task, shard)
        self._parts.setdefault(task, []).append(activations)
        parts = [_stats(shard, *place, z) for place, z in sorted(activations.items())]
        path = layout.stats_path(self.id, task, shard, 0)
        record = self.store.files.put_table(path, "stats", pa.concat_tables(parts))
        counted = 12 + shard
        counts = {"num_samples": 1, "num_tokens": counted, "num_counted": counted}
        self.store.commit(run=self.id, task=task, shard=shard, counts=counts, files=[record])

    def finish(self) -> "CapturedRun":
        """Write the run's record."""
        record = {
            "run": self.id,
            "study": "hand-made",
            "created": "2026-01-31 12:00:00",
            "reference": self.tasks[-1],
            "tasks": [{"task": task, "num_counted": 25} for task in self.tasks],
            "sites": [{"site": site, "layer": layer} for site, layer in WIDTHS],
            "shards": self._shards,
        }
        self.store.files.put_json(layout.run_path(self.id), record)
        return self

    def activations(self, task: str, site: str, layer: int) -> np.ndarray:
        """(positions, neurons) float64 of all committed shards of a task."""
        parts = [part[site, layer].astype(np.float64) for part in self._parts[task]]
        return np.concatenate(parts)


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., CapturedRun]:
    """Makes complete runs: ``new_run(folder name, tasks)``."""

    def make(name: str = "store", tasks: tuple[str, ...] = TASKS) -> CapturedRun:
        run = CapturedRun(tmp_path / name, tasks)
        for task in tasks:
            for shard in range(2):
                run.add(task, shard)
        return run.finish()

    return make


@pytest.fixture
def captured(new_run: Callable[..., CapturedRun]) -> CapturedRun:
    """A complete run of three tasks and a reference."""
    return new_run()


@pytest.fixture
def unfinished(tmp_path: Path) -> CapturedRun:
    """A run of which the second shard of each task is not captured yet."""
    run = CapturedRun(tmp_path / "unfinished")
    for task in TASKS:
        for shard in range(2):
            run.add(task, shard, commit=shard == 0)
    return run.finish()


@pytest.fixture
def write_scores(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of scores; each task's are given as (layers, neurons)."""

    def write(scores: dict[str, np.ndarray], name: str = "scores.parquet", **more: Any) -> Path:
        parts = []
        for task, values in scores.items():
            layers, neurons = np.indices(values.shape).reshape(2, -1)
            columns = {"task": [task] * len(layers), "layer": layers, "neuron": neurons}
            parts.append(pa.table({**columns, "score": values.ravel()}))
        table = pa.concat_tables(parts)
        for column, values in more.items():
            table = table.append_column(column, pa.array(values))
        pq.write_table(table, tmp_path / name)
        return tmp_path / name

    return write
