"""Count the requests that a store in S3 costs for each shard, by the log of a local S3 server.

python benchmarks/store_requests.py --shards 100
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa

from storage import TABLES, Store, create_store, layout, open_store, verify_store

RUN, TASK = "counted-00000000", "text"
_REQUEST = re.compile(r'"(?:\x1b\[[0-9;]*m)*(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP')


def rows(table: str, count: int) -> pa.Table:
    fill = {pa.string(): "a", pa.bool_(): True, pa.binary(): b""}
    columns = {}
    for field in TABLES[table].schema:
        value = [] if pa.types.is_list(field.type) else fill.get(field.type, 1)
        columns[field.name] = pa.array([value] * count, field.type)
    return pa.table(columns)


def begin(store: Store, num_shards: int) -> None:
    with store.files.staging() as staged:
        for shard in range(num_shards):
            inside = layout.samples_path(RUN, TASK, shard).removeprefix(
                f"{layout.run_folder(RUN)}/"
            )
            staged.put_table(inside, "samples", rows("samples", 10))
        record = {"run": RUN, "study": "counted", "model": {}, "tasks": [], "shards": []}
        staged.put_json("run.json", record)
        store.files.publish(staged, layout.run_folder(RUN), last="run.json")


def capture(store: Store, num_shards: int) -> None:
    counts = {"num_samples": 1, "num_tokens": 1, "num_counted": 1}
    for shard in range(num_shards):
        files = [
            store.files.put_table(path, table, rows(table, 10))
            for table, path in {
                "tokens": layout.tokens_path(RUN, TASK, shard),
                "stats": layout.stats_path(RUN, TASK, shard, 0),
            }.items()
        ]
        store.commit(run=RUN, task=TASK, shard=shard, counts=counts, files=files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100)
    shards = parser.parse_args().shards
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            measure(port, log, shards)
        finally:
            server.kill()
            server.wait()


def measure(port: int, log: Path, shards: int) -> None:
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "a", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    fsspec.filesystem("s3").mkdir("bucket")
    store = create_store("s3://bucket/store")

    def count(name: str, act: Callable[[], object]) -> None:
        before, start = len(log.read_text()), time.perf_counter()
        act()
        seconds = time.perf_counter() - start
        kinds: Counter[str] = Counter()
        for method, target in _REQUEST.findall(log.read_text()[before:]):
            kinds["LIST" if "list-type" in target else method] += 1
        each = ", ".join(f"{n / shards:.2f} {kind}" for kind, n in sorted(kinds.items()))
        print(f"{name:<22}{seconds:7.2f} s   for each of {shards} shards: {each}")

    count("put the inputs", lambda: begin(store, shards))
    count("capture and commit", lambda: capture(store, shards))
    count("list what is committed", lambda: store.committed(RUN))
    reader = open_store("s3://bucket/store")
    count("define the views", lambda: reader.connection)
    query = "select sum(num_tokens) from commits"
    count("sum tokens of commits", lambda: reader.sql(query).fetchall())
    count("merge statistics", lambda: reader.sql("select sum(std) from neuron_stats").fetchall())
    count("verify", lambda: verify_store(reader))


if __name__ == "__main__":
    main()
