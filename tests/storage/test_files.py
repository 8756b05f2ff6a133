"""Files of a store appear whole, are the same bytes for the same rows, and refuse wrong rows."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import TABLES, DamagedFileError, StoreError, StoreFiles, create_store, open_store
from storage.files import canonical_json

KILLED_BEFORE_RENAME = """
import os, signal, sys
from storage import StoreFiles

def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

os.rename = os.replace = kill
StoreFiles(sys.argv[1]).put("runs/a.json", b"new content")
"""


def everything_in(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def overlap_rows() -> pa.Table:
    """Two rows of table overlap, which has text, integers, floats and nulls."""
    columns: dict[str, list[Any]] = {
        "run": ["r", None], "metric": ["abs", "abs"], "site": ["mlp", "mlp"],
        "within": ["model", "model"], "fraction": [0.01, 0.05], "layer": [None, 3],
        "task_a": ["a", "a"], "task_b": ["b", "b"], "population": [100, 100], "size_a": [1, 5],
        "size_b": [1, 5], "shared": [0, 2], "share_of_a": [0.0, 0.4], "jaccard": [0.0, 0.25],
        "expected": [0.01, 0.25], "lift": [0.0, 8.0], "p_value": [1.0, 0.02],
    }  # fmt: skip
    return pa.table(columns, schema=TABLES["overlap"].schema)


def test_a_kill_between_writing_and_renaming_leaves_the_old_content(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path)
    files.put("runs/a.json", b"old content")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_RENAME, str(tmp_path)], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "runs/a.json").read_bytes() == b"old content"
    # What the killed writer left is seen by nobody and does not stop the next one.
    assert files.list("runs/*.json") == ["runs/a.json"]
    files.put("runs/a.json", b"new content")
    assert (tmp_path / "runs/a.json").read_bytes() == b"new content"


def test_putting_a_file_replaces_all_of_it_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path)
    files.put("runs/a.json", b"a longer first content")
    files.put("runs/a.json", b"short")
    assert (tmp_path / "runs/a.json").read_bytes() == b"short"
    assert everything_in(tmp_path) == ["runs/a.json"]


def test_a_refused_write_names_the_file_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles(tmp_path)
    files.put("runs/a.json", b"old content")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError) as caught:
        files.put("runs/a.json", b"new content")
    assert str(caught.value) == (
        f"cannot write {tmp_path}/runs/a.json: No space left on device. Free or grant the space or "
        "permission, then run the same command again: committed work is kept."
    )
    assert (tmp_path / "runs/a.json").read_bytes() == b"old content"
    assert everything_in(tmp_path) == ["runs/a.json"]


def test_a_stopped_write_leaves_no_temporary_file(tmp_path: Path, overlap_rows: pa.Table) -> None:
    def stopped() -> Iterator[pa.RecordBatch]:
        yield from overlap_rows.to_batches()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StoreFiles(tmp_path).put_batches("analyses/o.parquet", "overlap", stopped())
    assert everything_in(tmp_path) == []


def test_a_file_that_stands_where_a_folder_should_is_named(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path)
    files.put("runs", b"")
    with pytest.raises(StoreError, match=rf"^cannot write {tmp_path}/runs/a.json: File exists"):
        files.put("runs/a.json", b"")


def test_a_full_disk_is_one_sentence_and_nothing_half_written(
    small_disk: Path, overlap_rows: pa.Table
) -> None:
    files = StoreFiles(small_disk / "store")
    kept = files.put_table("analyses/kept.parquet", "overlap", overlap_rows)
    random = np.random.default_rng(0)
    with pytest.raises(StoreError, match=r"^cannot write .*/big: No space left on device\. Free"):
        files.put("big", random.bytes(2 << 20))

    def more_than_fits() -> Iterator[pa.RecordBatch]:
        for _ in range(100):
            noise = pa.array(random.random(20_000))
            wide = overlap_rows.take(pa.array(np.zeros(20_000, dtype=int)))
            place = wide.schema.get_field_index("p_value")
            yield from wide.set_column(place, wide.schema.field(place), noise).to_batches()

    with pytest.raises(StoreError, match=r"^cannot write .*/more\.parquet: No space left on dev"):
        files.put_batches("analyses/more.parquet", "overlap", more_than_fits())
    assert everything_in(small_disk) == ["store/analyses/kept.parquet"]
    assert files.sha256(kept.path) == kept.sha256


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A filesystem of one mebibyte."""
    return mount_disk("1m")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, overlap_rows: pa.Table) -> None:
    files = StoreFiles(tmp_path)
    chunked = pa.concat_tables([overlap_rows.slice(0, 1), overlap_rows.slice(1)])
    assert chunked["shared"].num_chunks == 2
    first = files.put_table("one.parquet", "overlap", overlap_rows)
    second = files.put_table("two.parquet", "overlap", chunked)
    assert (first.sha256, first.bytes, first.rows) == (second.sha256, second.bytes, 2)
    other = files.put_table("three.parquet", "overlap", overlap_rows.slice(0, 1))
    assert other.sha256 != first.sha256


def test_the_record_of_a_file_tells_its_rows_bytes_and_checksum(
    tmp_path: Path, overlap_rows: pa.Table
) -> None:
    files = StoreFiles(tmp_path)
    whole = files.put_table("whole.parquet", "overlap", overlap_rows)
    parts = files.put_batches("parts.parquet", "overlap", overlap_rows.to_batches(max_chunksize=1))
    for record in (whole, parts):
        path = tmp_path / record.path
        assert record.table == "overlap"
        assert record.bytes == path.stat().st_size
        assert record.sha256 == files.sha256(record.path)
        assert record.rows == pq.read_metadata(path).num_rows == 2
        assert files.get_table(record.path).equals(overlap_rows)


def test_batches_may_have_their_columns_in_any_order(
    tmp_path: Path, overlap_rows: pa.Table
) -> None:
    files = StoreFiles(tmp_path)
    reordered = overlap_rows.select(overlap_rows.column_names[::-1])
    files.put_batches("parts.parquet", "overlap", reordered.to_batches())
    assert files.get_table("parts.parquet").equals(overlap_rows)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.drop_columns(["lift"]), "lift"),
        (lambda t: t.append_column("extra", pa.array([1, 2])), "extra"),
        (lambda t: t.rename_columns([*t.column_names[:-1], "p"]), "names"),
        (lambda t: replaced(t, "shared", pa.array([1, None])), "null"),
        (lambda t: replaced(t, "layer", pa.array([1, 1 << 20])), "1048576"),
        (lambda t: replaced(t, "shared", pa.array(["x", "y"])), "Failed to parse string"),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused_before_anything_is_written(
    tmp_path: Path, overlap_rows: pa.Table, change: Callable[[pa.Table], pa.Table], error: str
) -> None:
    with pytest.raises((ValueError, pa.ArrowException), match=error):
        StoreFiles(tmp_path).put_table("one.parquet", "overlap", change(overlap_rows))
    assert everything_in(tmp_path) == []


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def test_json_is_the_same_bytes_whatever_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": "ä"}) == canonical_json({"a": "ä", "b": 1})
    assert json.loads(canonical_json({"a": [1, {"b": None}]})) == {"a": [1, {"b": None}]}
    assert canonical_json({"a": "ä"}) == '{\n  "a": "ä"\n}\n'.encode()


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_json_that_is_missing_or_damaged_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"^cannot read {tmp_path}/a.json: "):
        StoreFiles(tmp_path).get_json("a.json")


@pytest.mark.parametrize("content", [None, b"", b"PAR1 but no more"])
def test_parquet_that_is_missing_or_damaged_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"^cannot read {tmp_path}/a.parquet: "):
        StoreFiles(tmp_path).get_table("a.parquet")


def test_listing_is_sorted_and_relative_to_the_root(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path)
    for path in ("runs/run=b/run.json", "runs/run=a/run.json", "runs/run=a/other.json"):
        files.put(path, b"{}")
    assert files.list("runs/*/run.json") == ["runs/run=a/run.json", "runs/run=b/run.json"]
    assert files.list("runs/*/none") == []
    assert files.exists("runs/run=a/run.json")
    assert not files.exists("runs/run=c/run.json")


@pytest.mark.parametrize("name", ["a*b", "what?", "[1]", "back\\slash"])
def test_a_path_that_sql_engines_take_for_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError) as caught:
        StoreFiles(tmp_path / name)
    assert str(caught.value) == (
        "store path must not contain '*', '?', '[' or a backslash because SQL engines read them "
        f"as patterns, found {str(tmp_path / name)!r}: rename the folder."
    )


@pytest.mark.parametrize("name", ["run=7", "task=", "analysis=a"])
def test_a_path_that_readers_take_for_a_partition_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError) as caught:
        StoreFiles(tmp_path / name / "store")
    assert str(caught.value) == (
        "store path must not lie below a folder named run=..., task=... or analysis=... because "
        f"readers take it for a partition, found '{tmp_path}/{name}/store': choose another folder."
    )


@pytest.mark.parametrize("name", ["with space", "it's", "{a}", "100%", "ünï", "a=b", "a;b#c"])
def test_other_characters_in_the_path_of_a_store_do_no_harm(tmp_path: Path, name: str) -> None:
    store = create_store(tmp_path / name)
    store.files.put_json("analyses/analysis=a/analysis.json", {"analysis": "a", "files": []})
    assert open_store(tmp_path / name).sql("select analysis from analyses").fetchall() == [("a",)]


def test_a_store_that_is_not_there_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"^no store at {tmp_path}/nowhere: "):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=rf"^no store at {tmp_path}: .* found neither\."):
        open_store(tmp_path)


def test_a_store_cannot_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError) as caught:
        create_store(tmp_path / "file" / "store")
    assert str(caught.value) == (
        f"cannot make the store {tmp_path}/file/store: Not a directory. "
        "Give a folder that can be written."
    )


def test_a_folder_without_permission_to_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, so the permission is taken away where it is asked for.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(StoreError) as caught:
        create_store(tmp_path)
    assert str(caught.value) == (
        f"cannot write to the store {tmp_path}: permission denied. "
        "Give a folder that can be written."
    )
