"""Small stores made by hand: activations go in, files and commit records as a capture leaves them
come out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage import FileRecord, Store, create_store, layout, open_store

Activations = dict[tuple[str, int], np.ndarray]
"""(site, layer) -> (positions, neurons) float32."""

HEAD_DIM = 2


def two_pass_statistics(z: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of table stats over the rows of z, in float64 and two passes."""
    x = z.astype(np.float64)
    mean = x.mean(0)
    return {
        "n": np.full(x.shape[1], len(x)),
        "mean": mean,
        "m2": ((x - mean) ** 2).sum(0),
        "abs_sum": np.abs(x).sum(0),
        "sqrt_sum": np.sqrt(np.abs(x)).sum(0),
        "pos_sum": x.clip(min=0).sum(0),
        "neg_sum": x.clip(max=0).sum(0),
        "pos_count": (x > 0).sum(0),
        "nonzero_count": (x != 0).sum(0),
        "min": z.min(0),
        "max": z.max(0),
    }


def stats_table(shard: int, activations: Activations) -> pa.Table:
    """Rows of table stats, ordered by site, layer, neuron."""
    parts = []
    for (site, layer), z in sorted(activations.items()):
        neurons = np.arange(z.shape[1], dtype=np.int32)
        heads = neurons // HEAD_DIM if site == "attn" else [None] * len(neurons)
        parts.append(
            pa.table(
                {
                    "shard": pa.array([shard] * len(neurons), pa.int32()),
                    "site": [site] * len(neurons),
                    "layer": pa.array([layer] * len(neurons), pa.int16()),
                    "neuron": neurons,
                    "head": pa.array(heads, pa.int16()),
                    **two_pass_statistics(z),
                }
            )
        )
    return pa.concat_tables(parts)


class StoreBuilder:
    """Writes one run into a store, shard by shard."""

    def __init__(self, root: str | Path, run: str = "run-1") -> None:
        self.root = root
        self.run = run
        self.store = create_store(root)
        self._shards: list[dict[str, Any]] = []
        self._widths: dict[tuple[str, int], int] = {}

    def add_shard(
        self, task: str, shard: int, activations: Activations, *, commit: bool = True
    ) -> list[FileRecord]:
        """Write the files of one shard (one sample: a special token, then the counted ones)."""
        counted = len(next(iter(activations.values())))
        self._widths = {key: z.shape[1] for key, z in activations.items()}
        self._shards.append({"task": task, "shard": shard, "counted": counted})
        put = self.store.files.put_table
        files = [
            put(
                layout.samples_path(self.run, task, shard),
                "samples",
                _samples_table(shard, counted),
            ),
            put(layout.tokens_path(self.run, task, shard), "tokens", _tokens_table(shard, counted)),
            put(
                layout.stats_path(self.run, task, shard, 0),
                "stats",
                stats_table(shard, activations),
            ),
        ]
        if commit:
            self.commit(task, shard, files)
        return files

    def commit(self, task: str, shard: int, files: list[FileRecord], **changes: int) -> None:
        """Write the commit record of a shard; keyword arguments replace its counts."""
        counted = next(
            s["counted"] for s in self._shards if (s["task"], s["shard"]) == (task, shard)
        )
        counts = {"num_samples": 1, "num_tokens": counted + 1, "num_counted": counted}
        self.store.commit(
            run=self.run, task=task, shard=shard, counts=counts | changes, files=files
        )

    def finish(self) -> Store:
        """Write the run's record and open the store anew."""
        tasks = list(dict.fromkeys(shard["task"] for shard in self._shards))
        self.store.files.put_json(
            layout.run_path(self.run),
            {
                "run": self.run,
                "study": "hand-made",
                "created": "2026-01-31 12:00:00",
                "reference": tasks[-1],
                "model": {
                    "source": "models/tiny",
                    "init": "pretrained",
                    "dtype": "float32",
                    "architecture": "LlamaForCausalLM",
                    "num_layers": 2,
                    "num_neurons": sum(self._widths.values()),
                },
                "capture": {"top": 0},
                "sites": [
                    {"site": site, "layer": layer, "width": width}
                    for (site, layer), width in self._widths.items()
                ],
                "tasks": [self._task_record(task) for task in tasks],
                "shards": [{"task": s["task"], "shard": s["shard"]} for s in self._shards],
            },
        )
        return open_store(self.root)

    def _task_record(self, task: str) -> dict[str, Any]:
        counted = [shard["counted"] for shard in self._shards if shard["task"] == task]
        return {
            "task": task,
            "source": f"texts/{task}/*.txt",
            "num_documents": len(counted),
            "num_empty": 0,
            "num_samples": len(counted),
            "num_tokens": sum(counted) + len(counted),
            "num_counted": sum(counted),
            "num_shards": len(counted),
        }


def _samples_table(shard: int, counted: int) -> pa.Table:
    tokens = ["<s>", *(f"t{position}" for position in range(counted))]
    return pa.table(
        {
            "shard": pa.array([shard], pa.int32()),
            "batch": pa.array([0], pa.int32()),
            "sample": pa.array([shard], pa.int32()),
            "source": ["file.txt"],
            "label": pa.array([None if shard else "first"], pa.string()),
            "label_id": pa.nulls(1, pa.int32()),
            "text": ["".join(tokens)],
            "image": pa.nulls(1, pa.binary()),
            "token_ids": pa.array([list(range(counted + 1))], pa.list_(pa.int32())),
            "tokens": [tokens],
            "is_special": [[True] + [False] * counted],
            "counted": [[False] + [True] * counted],
            "num_tokens": pa.array([counted + 1], pa.int32()),
            "num_counted": pa.array([counted], pa.int32()),
        }
    )


def _tokens_table(shard: int, counted: int) -> pa.Table:
    positions = np.arange(counted + 1, dtype=np.int32)
    first = positions == 0
    return pa.table(
        {
            "shard": pa.array([shard] * len(positions), pa.int32()),
            "sample": pa.array([shard] * len(positions), pa.int32()),
            "position": positions,
            "token_id": positions,
            "token": ["<s>", *(f"t{position}" for position in range(counted))],
            "is_special": first,
            "counted": ~first,
            "loss": pa.array(np.sqrt(positions), pa.float32(), mask=first),
            "top1": pa.array(positions % 3 == 1, mask=first),
            "top10": pa.array(positions % 3 != 0, mask=first),
        }
    )


@pytest.fixture(scope="session")
def new_builder() -> type[StoreBuilder]:
    """Makes builders; for tests that need a new store for each of many examples."""
    return StoreBuilder


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    """A builder of one run in an empty store."""
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def activations() -> Callable[..., Activations]:
    """Random activations of both sites of two layers, from a seed."""

    def make(seed: int, positions: int = 20) -> Activations:
        random = np.random.default_rng(seed)
        widths: Mapping[tuple[str, int], int] = {
            ("attn", 0): 4,
            ("mlp", 0): 6,
            ("attn", 1): 4,
            ("mlp", 1): 6,
        }
        return {
            key: np.maximum(random.normal(0.3, 1, (positions, width)), -0.2).astype(np.float32)
            for key, width in widths.items()
        }

    return make


@pytest.fixture
def store(builder: StoreBuilder, activations: Callable[..., Activations]) -> Store:
    """A finished store: tasks 'code' (three shards) and 'mixed' (two)."""
    for shard in range(3):
        builder.add_shard("code", shard, activations(shard))
    for shard in range(2):
        builder.add_shard("mixed", shard, activations(10 + shard, positions=15))
    return builder.finish()
