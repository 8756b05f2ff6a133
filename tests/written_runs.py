"""Captured runs of importances that are given, written without a model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from storage import TABLES, Store, layout

WIDTHS = {("attn", 0): 8, ("attn", 1): 8, ("mlp", 0): 20, ("mlp", 1): 20}
TASKS = ("code", "mixed", "prose")

Importances = dict[tuple[str, str, int], np.ndarray]
"""(task, site, layer) -> importance (abs) of each neuron."""


def importances(
    seed: int, widths: dict[tuple[str, int], int] = WIDTHS, tasks: Sequence[str] = TASKS
) -> Importances:
    """Importances with many ties and some neurons that are never active."""
    random = np.random.default_rng(seed)
    return {
        (task, *place): random.integers(0, 12, width) / 4
        for task in tasks
        for place, width in widths.items()
    }


def write_run(
    store: Store,
    run: str,
    values: Importances,
    *,
    reference: str | None = "mixed",
    losses: Sequence[float] = (1.0, 2.0, 4.0),
    first_token: int = 7,
    commit: bool = True,
    init: str = "pretrained",
) -> None:
    """One run of one shard of one sample for each task: activations of constant value."""
    tasks = sorted({task for task, *_ in values})
    for task in tasks:
        files = [
            store.files.put_table(
                layout.samples_path(run, task, 0), "samples", samples(first_token, len(losses))
            ),
            store.files.put_table(layout.tokens_path(run, task, 0), "tokens", tokens(losses)),
            store.files.put_table(layout.stats_path(run, task, 0, 0), "stats", stats(task, values)),
        ]
        if commit or task != tasks[-1]:
            counts = {"num_samples": 1, "num_tokens": 5, "num_counted": 3}
            store.commit(run=run, task=task, shard=0, counts=counts, files=files)
    sites = {(site, layer): len(z) for (_, site, layer), z in values.items()}
    store.files.put_json(
        layout.run_path(run),
        {
            "run": run, "study": "by hand", "created": "2026-01-31 12:00:00",
            "reference": reference,
            "model": {
                "source": "tiny", "init": init, "dtype": "float32", "architecture": "Tiny",
                "modality": "language",
                "num_layers": 1 + max(layer for _, layer in sites),
                "num_neurons": sum(sites.values()),
            },
            "capture": {"top": 0},
            "sites": [
                {"site": s, "layer": n, "width": width, "head_dim": None}
                for (s, n), width in sites.items()
            ],
            "tasks": [{"task": task, "source": "none", "num_shards": 1} for task in tasks],
            "shards": [{"task": task, "shard": 0} for task in tasks],
        },
    )  # fmt: skip


def samples(first_token: int, counted: int) -> pa.Table:
    size = counted + 2
    row = {
        "shard": 0, "batch": 0, "sample": 0, "source": "none", "label": None, "text": "t",
        "token_ids": [first_token, *range(size - 1)], "tokens": ["t"] * size,
        "is_special": [True] + [False] * (size - 1),
        "counted": [False, *[True] * counted, False],
        "num_tokens": size, "num_counted": counted,
    }  # fmt: skip
    return pa.Table.from_pylist([row], schema=TABLES["samples"].schema)


def tokens(losses: Sequence[float]) -> pa.Table:
    """A special token, the counted ones, and one that is predicted but does not count."""
    given = [None, *losses, 99.0]
    rows = [
        {
            "shard": 0, "sample": 0, "position": position, "token_id": 0, "token": "t",
            "is_special": position == 0, "counted": 0 < position <= len(losses),
            "loss": loss, "top1": None if loss is None else loss < 1.5,
            "top10": None if loss is None else True,
        }
        for position, loss in enumerate(given)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def stats(task: str, values: Importances) -> pa.Table:
    parts = []
    for (of_task, site, layer), z in sorted(values.items()):
        if of_task != task:
            continue
        n, size = 3, len(z)
        columns: dict[str, Any] = dict.fromkeys(["m2", "neg_sum"], np.zeros(size))
        columns |= {
            "shard": [0] * size, "site": [site] * size, "layer": [layer] * size,
            "neuron": np.arange(size), "head": pa.nulls(size, pa.int16()),
            "n": np.full(size, n), "mean": z, "abs_sum": n * z, "pos_sum": n * z,
            "sqrt_sum": n * np.sqrt(z), "pos_count": n * (z > 0), "nonzero_count": n * (z > 0),
            "min": z, "max": z,
        }  # fmt: skip
        parts.append(pa.table(columns))
    table = pa.concat_tables(parts)
    return table.select(["shard", "site", "layer", "neuron", "head", "n", "mean", "m2",
                         "abs_sum", "sqrt_sum", "pos_sum", "neg_sum", "pos_count",
                         "nonzero_count", "min", "max"])  # fmt: skip
