"""Selections and overlap at the scale of a 7B model: 20 tasks x 32 layers x 14,336 neurons.

    python benchmarks/overlap_scale.py

Scores of one's own go in as one Parquet file; selections at five fractions and the overlap of all
pairs, over the whole model and in each layer, come out as Parquet and CSV files.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis import overlap_of_scores

FRACTIONS = [0.01, 0.02, 0.05, 0.1, 0.2]


def write_scores(path: Path, *, num_tasks: int, num_layers: int, width: int) -> None:
    """Scores with a part that all tasks have in common, rounded as those of half precision are."""
    random = np.random.default_rng(0)
    layer, neuron = np.divmod(np.arange(num_layers * width), width)
    common = random.normal(size=num_layers * width)
    with pq.ParquetWriter(path, _scores_table("", layer, neuron, common).schema) as writer:
        for task in range(num_tasks):
            score = np.exp((common + random.normal(size=len(common))) / 2).astype(np.float16)
            writer.write_table(_scores_table(f"task-{task:02d}", layer, neuron, score))


def _scores_table(task: str, layer: np.ndarray, neuron: np.ndarray, score: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "task": pa.array([task] * len(score), pa.string()),
            "layer": pa.array(layer, pa.int16()),
            "neuron": pa.array(neuron, pa.int32()),
            "score": pa.array(score, pa.float32()),
        }
    )


class Steps:
    """Prints how long each step took, once the next one begins; files are written in the last."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._since = (0.0, 0.0)

    def begin(self, name: str | None) -> None:
        now = time.perf_counter(), time.process_time()
        if self._name is not None:
            wall, cpu = (end - start for start, end in zip(self._since, now, strict=True))
            print(f"  {self._name:<20}{wall:8.2f} s {cpu:8.2f} s of processor time")
        self._name, self._since = name, now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=14_336, help="neurons of each layer")
    parser.add_argument("--within", choices=["model", "layer"], default="model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="6GB", help="most memory that DuckDB may take")
    args = parser.parse_args()
    print(
        f"{args.tasks} tasks x {args.layers * args.width:,} neurons at {len(FRACTIONS)} fractions"
    )
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    scores = folder / "scores.parquet"
    write_scores(scores, num_tasks=args.tasks, num_layers=args.layers, width=args.width)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    steps = Steps()
    table = overlap_of_scores(
        scores,
        FRACTIONS,
        folder / "out",
        within=args.within,
        threads=args.threads,
        memory_limit=args.memory,
        on_step=steps.begin,
    )
    steps.begin(None)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.2f} s, {cpu:.2f} s of processor time")
    print(f"{'largest resident memory':<34}{after.ru_maxrss / 1024:10,.0f} MiB")
    size = sum(file.stat().st_size for file in (folder / "out").iterdir())
    print(f"{table.num_rows:,} rows of overlap; {size / 1e6:,.0f} MB written")


if __name__ == "__main__":
    main()
