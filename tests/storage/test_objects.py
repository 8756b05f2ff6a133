"""A store behaves the same in a folder, in memory and in an S3 bucket, and says what fails."""

import builtins
import hashlib
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage import (
    TABLES,
    DamagedFileError,
    StoreError,
    StoreFiles,
    create_store,
    objects,
    open_store,
    verify_store,
)

NO_RUN_RECORD = "runs/run=r/run.json: the file is missing, and the run has committed shards."


def selection_rows(count: int) -> pa.Table:
    columns = {}
    for field in TABLES["selections"].schema:
        value: Any = "text" if field.type == pa.string() else 1
        columns[field.name] = pa.array([value] * count, field.type)
    return pa.table(columns)


def commit_shard(root: str, shard: int = 0) -> None:
    store = create_store(root)
    samples = pa.Table.from_pylist(
        [{"shard": shard, "batch": 0, "sample": n, "source": "s", "label": None, "text": "a b",
          "token_ids": [1, 2], "tokens": ["a", "b"], "is_special": [False] * 2,
          "counted": [True] * 2, "num_tokens": 2, "num_counted": 2} for n in range(3)],
        schema=TABLES["samples"].schema,
    )  # fmt: skip
    path = f"runs/run=r/samples/task=t/shard-{shard:05d}.parquet"
    file = store.files.put_table(path, "samples", samples)
    counts = {"num_samples": 3, "num_tokens": 6, "num_counted": 6}
    store.commit(run="r", task="t", shard=shard, counts=counts, files=[file])


def test_what_is_put_is_read_back_and_listed(store_root: str) -> None:
    files = StoreFiles(store_root)
    files.prepare()
    files.put("runs/run=a/stats/task=t/stage-00/x.parquet", b"content")
    files.put("runs/run=a/run.json", b"[1, 2]")
    files.put("runs/run=b/run.json", b"[]")
    assert files.get_json("runs/run=a/run.json") == [1, 2]
    assert files.list("runs/*/run.json") == ["runs/run=a/run.json", "runs/run=b/run.json"]
    assert files.list("runs/*/stats/**/*.parquet") == ["runs/run=a/stats/task=t/stage-00/x.parquet"]
    assert files.list("analyses/*/analysis.json") == []
    assert files.size("runs/run=a/run.json") == 6
    assert files.sha256("runs/run=a/run.json") == hashlib.sha256(b"[1, 2]").hexdigest()
    assert files.exists("runs")
    assert files.exists("runs/run=b/run.json")
    assert not files.exists("runs/run=c/run.json")
    assert not files.exists("analyses")


def test_what_another_process_puts_later_is_seen(store_root: str) -> None:
    files, other = StoreFiles(store_root), StoreFiles(store_root)
    files.prepare()
    assert files.list("runs/*/run.json") == []
    other.put("runs/run=a/run.json", b"{}")
    assert files.list("runs/*/run.json") == ["runs/run=a/run.json"]
    other.put("runs/run=b/run.json", b"{}")
    assert files.list("runs/*/run.json") == ["runs/run=a/run.json", "runs/run=b/run.json"]


def test_a_missing_or_broken_file_is_named(store_root: str) -> None:
    files = StoreFiles(store_root)
    files.prepare()
    with pytest.raises(DamagedFileError, match=r"cannot read .*/runs/none\.json"):
        files.get_json("runs/none.json")
    with pytest.raises(FileNotFoundError):
        files.size("runs/none.json")
    files.put("runs/half.json", b'{"a":')
    with pytest.raises(DamagedFileError, match=r"cannot read .*/runs/half\.json"):
        files.get_json("runs/half.json")
    with pytest.raises(DamagedFileError, match=r"cannot read .*/runs/half\.json"):
        files.num_rows("runs/half.json")


def test_a_table_is_the_same_bytes_written_whole_or_in_batches(store_root: str) -> None:
    files = StoreFiles(store_root)
    files.prepare()
    rows = selection_rows(1000)
    whole = files.put_table("analyses/analysis=a/selections.parquet", "selections", rows)
    path = "analyses/analysis=b/selections.parquet"
    batched = files.put_batches(path, "selections", rows.to_batches())
    assert (batched.rows, batched.bytes, batched.sha256) == (1000, whole.bytes, whole.sha256)
    assert files.size(path) == batched.bytes
    assert files.sha256(path) == batched.sha256
    assert files.num_rows(path) == 1000
    assert files.get_table(path).num_rows == 1000


def test_a_table_that_fails_in_the_middle_leaves_nothing(store_root: str) -> None:
    files = StoreFiles(store_root)
    files.prepare()

    def failing() -> Any:
        yield from selection_rows(10).to_batches()
        raise RuntimeError("the query failed")

    with pytest.raises(RuntimeError, match="the query failed"):
        files.put_batches("analyses/analysis=a/selections.parquet", "selections", failing())
    assert not files.exists("analyses/analysis=a/selections.parquet")
    assert files.list("analyses/*/*") == []


def stage_run(files: StoreFiles, record: bytes) -> None:
    with files.staging() as staged:
        for shard in range(40):
            staged.put(f"samples/task=t/shard-{shard:05d}.parquet", b"rows")
        staged.put("run.json", record)
        assert files.list("runs/*/run.json") in ([], ["runs/run=a/run.json"])
        files.publish(staged, "runs/run=a", last="run.json")


def test_staged_files_appear_once_and_leave_nothing_behind(store_root: str) -> None:
    files = StoreFiles(store_root)
    files.prepare()
    stage_run(files, b'"first"')
    stage_run(files, b'"second"')
    assert files.get_json("runs/run=a/run.json") == "first"
    assert len(files.list("runs/run=a/samples/*/*.parquet")) == 40
    assert files.list("planning-*/*") == []


@pytest.mark.parametrize("store_root", ["memory", "s3"], indirect=True)
def test_the_record_is_put_after_all_that_it_names(
    store_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles(store_root)
    put, written = files._backend.filesystem.pipe_file, []

    def recording(name: str, *args: Any, **kwargs: Any) -> None:
        put(name, *args, **kwargs)
        written.append(name)

    monkeypatch.setattr(files._backend.filesystem, "pipe_file", recording)
    stage_run(files, b"{}")
    assert len(written) == 41
    assert written[-1].endswith("/runs/run=a/run.json")


def test_committed_rows_are_asked_with_sql_and_others_are_not(store_root: str) -> None:
    commit_shard(store_root)
    store = open_store(store_root)
    orphan = "runs/run=r/samples/task=t/shard-00007.parquet"
    table = store.files.get_table("runs/run=r/samples/task=t/shard-00000.parquet")
    store.files.put_table(orphan, "samples", table)
    query = "select run, task, count(*), sum(num_tokens) from samples group by all"
    assert store.sql(query).fetchall() == [("r", "t", 3, 6)]
    commit_shard(store_root, shard=1)
    # Opened again, because an open reader may take listings of an object store for some seconds.
    assert open_store(store_root).sql(query).fetchall() == [("r", "t", 6, 12)]
    assert store.committed("r") == {("t", 0), ("t", 1)}


@pytest.mark.parametrize("store_root", ["s3"], indirect=True)
def test_an_open_reader_sees_new_shards_once_its_listings_are_old(
    store_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_LISTING_SECONDS", 0.5)
    commit_shard(store_root)
    connection = open_store(store_root).connect()
    assert connection.sql("select count(*) from samples").fetchall() == [(3,)]
    commit_shard(store_root, shard=1)
    time.sleep(0.6)
    assert connection.sql("select count(*) from samples").fetchall() == [(6,)]


def test_a_store_sees_new_shards_at_once(store_root: str) -> None:
    commit_shard(store_root)
    store = open_store(store_root)
    for shard in range(1, 4):
        assert store.sql("select count(*) from samples").fetchall() == [(3 * shard,)]
        commit_shard(store_root, shard=shard)


def test_verify_reads_every_byte(store_root: str, new_builder: Any, activations: Any) -> None:
    builder = new_builder(store_root)
    # More than are checked at a time, so that threads take turns.
    for shard in range(20):
        builder.add_shard("t", shard, activations(shard))
    store = builder.finish()
    seen: list[str] = []
    report = verify_store(store, on_file=seen.append)
    assert (report.num_files, report.num_shards, report.problems) == (60, 20, [])
    assert len(seen) == 60
    path = "runs/run=run-1/samples/task=t/shard-00003.parquet"
    table = store.files.get_table(path)
    changed = table.set_column(2, "sample", pa.array([9], pa.int32()))
    store.files.put_table(path, "samples", changed)
    problems = verify_store(open_store(store_root)).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}: the content was altered")
    store.files.put(path, b"short")
    assert "the file has 5 bytes where" in verify_store(open_store(store_root)).problems[0]


def test_the_record_of_a_run_may_be_larger_than_duckdb_reads_by_default(tmp_path: Path) -> None:
    store = create_store(tmp_path)
    shards = [{"task": "t", "shard": shard, "note": "n" * 400} for shard in range(50_000)]
    record = {"run": "r", "created": "2026-01-02 03:04:05", "reference": "t", "shards": shards,
              "model": {"source": "m", "num_neurons": 7}}  # fmt: skip
    store.files.put_json("runs/run=r/run.json", record)
    assert store.files.size("runs/run=r/run.json") > 16 << 20
    assert store.sql(
        "select run, created::varchar, num_neurons, num_shards from runs"
    ).fetchall() == [("r", "2026-01-02 03:04:05", 7, 50_000)]


def test_a_place_without_a_store_is_refused(store_root: str) -> None:
    StoreFiles(store_root).prepare()
    with pytest.raises(StoreError, match=r"no store at .*: a store has a folder 'runs' or"):
        open_store(store_root)


def test_the_sql_for_other_clients_names_the_url_and_what_a_client_needs(store_root: str) -> None:
    commit_shard(store_root)
    store = open_store(store_root)
    script = store.views_sql()
    assert f"read_text('{store.files.root}/runs/*/commits/*/*.json')" in script
    assert ("create secret (type s3" in script) == ("://" in store_root)


def test_a_missing_bucket_is_named(s3_bucket: str) -> None:
    for act in (create_store, open_store, lambda root: StoreFiles(root).put("x", b"")):
        with pytest.raises(StoreError, match=r"the bucket 'no-such-bucket' .* does not exist"):
            act("s3://no-such-bucket/store")


def test_missing_credentials_stop_at_once(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(StoreError, match=r"needs credentials, and none were found .* AWS_PROFILE"):
        create_store(f"s3://{s3_bucket}/store")


def test_a_refused_key_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = StoreFiles("memory://refused")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("The AWS Access Key Id you provided does not exist")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    monkeypatch.setattr(objects, "RETRY_DELAYS", (1000.0,))
    with pytest.raises(StoreError, match=r"access to the store memory:///refused is refused .*Key"):
        files.put("x", b"")


def test_a_url_with_credentials_in_it_is_refused_without_repeating_them() -> None:
    with pytest.raises(StoreError, match="must not hold credentials") as caught:
        StoreFiles("s3://key:secret@bucket/store")
    assert "secret" not in str(caught.value)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(StoreError, match=r"such as s3://bucket/prefix, found 'lake://x'"):
        StoreFiles("lake://x")


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_s3fs(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("s3fs"):
            raise ImportError("No module named 's3fs'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(objects.fsspec, "filesystem", lambda *a, **k: without_s3fs("s3fs"))
    with pytest.raises(StoreError, match=r"pip install 'actlake\[s3\]', on every host"):
        StoreFiles("s3://bucket/store")


def test_a_connection_that_comes_back_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    files = StoreFiles("memory://flaky")
    failures = iter([ConnectionResetError("reset by peer"), TimeoutError("timed out")])
    put, waited = MemoryFileSystem.pipe_file, []

    def flaky(self: Any, *args: Any, **kwargs: Any) -> None:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        put(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", flaky)
    monkeypatch.setattr(objects.time, "sleep", waited.append)
    files.put("x.json", b"1")
    assert files.get_json("x.json") == 1
    assert waited == [1.0, 2.0]


def test_an_error_of_our_own_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", broken)
    monkeypatch.setattr(objects, "RETRY_DELAYS", (1000.0,))
    with pytest.raises(TypeError, match="a bug"):
        StoreFiles("memory://bug").put("x", b"")


def test_a_lost_connection_ends_with_a_clear_stop(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles(f"s3://{s3_bucket}/store")
    files.put("x", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # Nothing listens there.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    lost = StoreFiles(f"s3://{s3_bucket}/store")
    monkeypatch.setattr(type(lost._backend.filesystem), "retries", 1)
    monkeypatch.setattr(objects, "RETRY_DELAYS", (0.01, 0.01))
    pattern = r"the connection to the store s3://.* failed 3 times at 'x'.*AWS_ENDPOINT_URL"
    with pytest.raises(StoreError, match=pattern):
        lost.put("x", b"2")
    with pytest.raises(StoreError, match=pattern):
        lost.sha256("x")
    assert files.get_json("x") == 1
