"""Drive the real driver with a thousand simulated stages, then ask the catalog about the result.

    python benchmarks/driver_scale.py --shards 10000

The stages compute nothing and write no tables: what is measured is what the driver does for each
batch and shard, what its records weigh, and how long a reader takes to see them.
"""

import argparse
import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ray_app.capture import driver
from ray_app.capture.shards import PlannedShard
from ray_app.capture.workers import BatchDone, ShardDone
from ray_app.progress import NoProgress
from ray_app.run import load_run
from storage import FileRecord, create_store, layout
from storage.sqlfiles import load_query

RUN = "simulated-00000000"
TASK = "text"
Result = TypeVar("Result")


class SimulatedWorkers:
    """Pipelines whose stages are done at once; two shards are under way in each."""

    def __init__(self, *, num_stages: int, replicas: int) -> None:
        self._num_stages = num_stages
        self._replicas = replicas

    def work(self, shards: Sequence[PlannedShard]) -> Iterator[BatchDone | ShardDone]:
        waiting = deque(shards)
        while waiting:
            under_way = [waiting.popleft() for _ in range(min(2 * self._replicas, len(waiting)))]
            for shard in under_way:
                for _ in range(shard.num_batches):
                    yield BatchDone(shard.num_tokens // shard.num_batches)
            for shard in under_way:
                yield ShardDone(shard, self._files(shard))

    def _files(self, shard: PlannedShard) -> list[FileRecord]:
        paths = {"tokens": [layout.tokens_path(RUN, shard.task, shard.shard)]}
        paths["stats"] = [
            layout.stats_path(RUN, shard.task, shard.shard, stage)
            for stage in range(self._num_stages)
        ]
        return [
            FileRecord(path=path, table=table, rows=589_824, bytes=42_467_328, sha256="0" * 64)
            for table, of_table in paths.items()
            for path in of_table
        ]


def planned(index: int, num_batches: int) -> PlannedShard:
    samples = FileRecord(
        path=layout.samples_path(RUN, TASK, index), table="samples", rows=2048,
        bytes=7 << 20, sha256="0" * 64,
    )  # fmt: skip
    return PlannedShard(
        task=TASK, shard=index, num_samples=2048, num_tokens=1 << 20, num_counted=1 << 20,
        num_batches=num_batches, samples=samples,
    )  # fmt: skip


def run_record(num_shards: int, num_batches: int) -> dict[str, object]:
    model = {"source": "simulated", "init": "random", "dtype": "bfloat16", "architecture": "none",
             "num_layers": 32, "num_neurons": 589_824}  # fmt: skip
    task = {"task": TASK, "source": "simulated", "num_documents": 1, "num_empty": 0,
            "num_samples": 2048 * num_shards, "num_tokens": num_shards << 20,
            "num_counted": num_shards << 20, "num_shards": num_shards}  # fmt: skip
    return {
        "run": RUN, "study": "simulated", "created": "2000-01-01 00:00:00", "reference": None,
        "model": model, "tasks": [task], "identity": {}, "sites": [], "threads": 1,
        "shards": [planned(index, num_batches).to_dict() for index in range(num_shards)],
    }  # fmt: skip


def timed(name: str, act: Callable[[], Result], *, per: int = 0) -> Result:
    start = time.perf_counter()
    result = act()
    seconds = time.perf_counter() - start
    rate = f"  {per / seconds:12,.0f} /s" if per else ""
    print(f"{name:<34}{seconds:10.3f} s{rate}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--batches", type=int, default=16, help="batches of each shard")
    parser.add_argument("--stages", type=int, default=4, help="stages of each pipeline")
    parser.add_argument("--replicas", type=int, default=250)
    parser.add_argument("--store", help="a new store; a temporary folder if not given")
    args = parser.parse_args()
    print(f"{args.stages * args.replicas:,} stages, {args.shards:,} shards")
    with tempfile.TemporaryDirectory() as folder:
        measure(args, args.store or folder)


def measure(args: argparse.Namespace, root: str) -> None:
    store = create_store(root)
    record = run_record(args.shards, args.batches)
    timed("write run.json", lambda: store.files.put_json(layout.run_path(RUN), record))
    print(
        f"{'run.json':<34}{store.files.size(layout.run_path(RUN)) / args.shards:10.0f} bytes/shard"
    )
    run = timed("load the run", lambda: load_run(store, RUN))
    timed("list what remains, none committed", run.remaining)
    workers = SimulatedWorkers(num_stages=args.stages, replicas=args.replicas)
    timed("drive and commit all shards", lambda: driver.capture(run, workers, NoProgress()),
          per=args.shards)  # fmt: skip
    timed("list what remains, all committed", run.remaining)
    one = layout.commit_path(RUN, TASK, 0)
    print(f"{'commit record':<34}{store.files.size(one):10,} bytes")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'largest resident memory':<34}{peak:10.0f} MiB")
    timed("define the views", lambda: store.connection)
    timed(
        "sum the tokens of all commits", store.sql("select sum(num_tokens) from commits").fetchall
    )
    timed("list committed files", store.sql("select count(*) from committed_files").fetchall)
    status = load_query("storage", "status_runs").text
    timed("status of runs", store.sql(status).fetchall)


if __name__ == "__main__":
    main()
