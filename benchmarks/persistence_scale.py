"""What two runs have in common at the scale of a 7B model: 20 tasks x 32 layers x 14,336 neurons.

    python benchmarks/persistence_scale.py

A store gets two runs of made-up statistics, as a model and its random twin would leave them. Then
the steps of `actlake drift` are timed: selections at five fractions and the overlap of all pairs of
tasks in both runs, over the whole model and in each layer; persistence; and drift. The runs have no
tokens, so that drift has no losses to tell and its table no rows.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from overlap_scale import FRACTIONS, Steps

from analysis import AnalysisSettings
from analysis.drift import compare_runs
from storage import TABLES, Store, create_store, layout

REFERENCE = "mixed"


def write_run(store: Store, run: str, *, num_tasks: int, num_layers: int, width: int) -> None:
    """One run of one shard for each task, with statistics of the MLP alone."""
    random = np.random.default_rng(len(run))
    tasks = [*(f"task-{task:02d}" for task in range(num_tasks)), REFERENCE]
    common = random.normal(size=num_layers * width)
    for task in tasks:
        mean_abs = np.exp((common + random.normal(size=len(common))) / 2)
        paths = (
            (layout.samples_path(run, task, 0), "samples"),
            (layout.tokens_path(run, task, 0), "tokens"),
        )
        files = [store.files.put_table(path, name, TABLES[name].schema.empty_table())
                 for path, name in paths]  # fmt: skip
        table = stats(mean_abs, num_layers, width)
        files.append(store.files.put_table(layout.stats_path(run, task, 0, 0), "stats", table))
        counts = {"num_samples": 0, "num_tokens": 0, "num_counted": 0}
        store.commit(run=run, task=task, shard=0, counts=counts, files=files)
    store.files.put_json(
        layout.run_path(run),
        {
            "run": run, "study": "made-up", "created": "2026-01-31 12:00:00",
            "reference": REFERENCE,
            "model": {
                "source": "none", "init": "pretrained", "dtype": "float32", "architecture": "None",
                "num_layers": num_layers, "num_neurons": num_layers * width,
            },
            "sites": [{"site": "mlp", "layer": n, "width": width} for n in range(num_layers)],
            "tasks": [{"task": task, "source": "none", "num_shards": 1} for task in tasks],
            "shards": [{"task": task, "shard": 0} for task in tasks],
        },
    )  # fmt: skip


def stats(mean_abs: np.ndarray, num_layers: int, width: int) -> pa.Table:
    """Statistics of one shard of a thousand positions."""
    layer, neuron = np.divmod(np.arange(num_layers * width), width)
    n, size = 1000, len(mean_abs)
    columns = {
        "shard": np.zeros(size), "site": ["mlp"] * size, "layer": layer, "neuron": neuron,
        "head": pa.nulls(size, pa.int16()), "n": np.full(size, n), "mean": np.zeros(size),
        "m2": n * mean_abs**2, "abs_sum": n * mean_abs, "sqrt_sum": n * np.sqrt(mean_abs),
        "pos_sum": n * mean_abs / 2, "neg_sum": -n * mean_abs / 2, "pos_count": np.full(size, 500),
        "nonzero_count": np.full(size, n), "min": -mean_abs, "max": mean_abs,
    }  # fmt: skip
    return pa.table({name: columns[name] for name in TABLES["stats"].schema.names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=14_336, help="neurons of each layer")
    args = parser.parse_args()
    shape = {"num_tasks": args.tasks, "num_layers": args.layers, "width": args.width}
    settings = AnalysisSettings(metrics=["abs"], fractions=FRACTIONS)
    with tempfile.TemporaryDirectory() as folder:
        store = create_store(Path(folder) / "store")
        for run in ("trained", "random-twin"):
            write_run(store, run, **shape)
        steps = Steps()
        start, cpu = time.perf_counter(), time.process_time()
        made = compare_runs(store, "trained", "random-twin", settings, on_step=steps.begin)
        steps.begin(None)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        rows = ", ".join(f"{file.rows:,} of {file.table}" for file in made.analysis.files)
    print(f"{args.tasks} tasks x {args.layers * args.width:,} neurons, twice: {rows}")
    print(f"{seconds:.2f} s, {cpu:.2f} s of processor time")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'largest resident memory':<34}{memory:10,.0f} MiB")


if __name__ == "__main__":
    main()
