"""Raw values in a store: exact to their bound, read in parts, and in bounded memory."""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage import (
    DamagedFileError,
    QueryError,
    Store,
    StoreError,
    collect_garbage,
    compact_run,
    create_store,
    layout,
)
from storage.matrix import export_matrix, select_values
from storage.values import (
    Encoding,
    HalfOverflowError,
    encode_rows,
    join_blocks,
    neurons_in_group,
    place_lists,
)

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
WIDTH, LENGTH = 96, 20_000


def value_lists(block: int, z: np.ndarray, encoding: Encoding) -> list[pa.RecordBatch]:
    """Row groups of table values, of (neurons, positions)."""
    step = neurons_in_group(z.shape[1])
    sample = np.full(z.shape[1], block, np.int32)
    position = np.arange(z.shape[1], dtype=np.int32)
    batches = []
    for start in range(0, len(z), step):
        rows = z[start : start + step]
        batches.append(
            pa.record_batch(
                {
                    "block": pa.array([block] * len(rows), pa.int32()),
                    "neuron": np.arange(start, start + len(rows), dtype=np.int32),
                    "head": pa.nulls(len(rows), pa.int16()),
                    **place_lists(sample, position, len(rows)),
                    **encode_rows(rows, encoding),
                }
            )
        )
    return batches


def decoded(rows: pa.Table) -> np.ndarray:
    value, code, scale = (rows[name].to_pylist() for name in ("value", "code", "scale"))
    return np.array(
        [v if v is not None else np.float32(s) * np.array(c, np.float32) for v, c, s in
         zip(value, code, scale, strict=True)]
    )  # fmt: skip


@given(z=arrays(np.float32, (3, 7), elements=FINITE), encoding=st.sampled_from(["float32", "int8"]))
def test_an_encoding_is_off_by_its_bound_at_most(z: np.ndarray, encoding: Encoding) -> None:
    rows = pa.table(encode_rows(z, encoding))
    off = np.abs(decoded(rows).astype(np.float64) - z)
    assert (off <= rows["error_bound"].to_numpy()[:, None]).all()
    limit = {"float32": 0, "int8": 0.501 * np.abs(z).max(1) / 127 + 1e-38}[encoding]
    assert (rows["error_bound"].to_numpy() <= limit).all()


@given(z=arrays(np.float32, (3, 7), elements=st.floats(-65_519, 65_519, width=32)))
def test_half_precision_is_off_by_its_bound_at_most(z: np.ndarray) -> None:
    rows = pa.table(encode_rows(z, "float16"))
    np.testing.assert_array_equal(decoded(rows), z.astype(np.float16))
    off = np.abs(decoded(rows).astype(np.float64) - z)
    assert (off <= rows["error_bound"].to_numpy()[:, None]).all()
    with pytest.raises(HalfOverflowError) as overflow:
        encode_rows(np.vstack([z, np.full((1, 7), 65_520, np.float32)]), "float16")
    assert overflow.value.args == (3,)


def write_store(root: Path, encoding: Encoding, *, num_blocks: int, layers: int = 1) -> Store:
    """A committed store of values alone; block b has b + 1 times the numbers of the first."""
    store = create_store(root)
    z = np.random.default_rng(0).normal(size=(WIDTH, LENGTH)).astype(np.float32)
    for block in range(num_blocks):
        path = layout.values_path("r", "code", "mlp", 0, block)
        rows = value_lists(block, z * (1 + block), encoding)
        files = [store.files.put_batches(path, "values", rows)]
        for layer in range(1, layers):  # The same numbers again.
            copy = layout.values_path("r", "code", "mlp", layer, block)
            store.files.put(copy, store.files.local(path).read_bytes())
            files.append(replace(files[0], path=copy))
        store.commit(run="r", task="code", shard=block, counts={}, files=files)
    sites = [{"site": "mlp", "layer": layer, "width": WIDTH} for layer in range(layers)]
    record = {"run": "r", "tasks": [{"task": "code"}], "shards": []}
    sites.append({"site": "attn", "layer": 0, "width": 8})
    store.files.put_json(layout.run_path("r"), record | {"sites": sites})
    return store


@pytest.mark.parametrize(
    ("runs", "read"),
    [
        (["int8"], {"code", "scale"}),
        (["float16", "float32"], {"value"}),
        (["int8", "int8", "float16"], {"value", "code", "scale"}),
        (["int8", None], {"value", "code", "scale"}),
    ],
)
def test_values_are_decoded_from_the_columns_that_there_are(
    tmp_path: Path, runs: list[Encoding | None], read: set[str]
) -> None:
    """Of a store that grows by a run at a time; the record of one does not say its encoding."""
    store = create_store(tmp_path)
    z = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = []
    for index, encoding in enumerate(runs):
        run = f"run-{index}"
        rows = value_lists(0, z + index, encoding or "float32")
        path = layout.values_path(run, "code", "mlp", 0, 0)
        files = [store.files.put_batches(path, "values", rows)]
        capture = {"values": encoding and {"encoding": encoding}}
        store.files.put_json(layout.run_path(run), {"run": run, "capture": capture})
        store.commit(run=run, task="code", shard=0, counts={}, files=files)
        expected.append(decoded(pa.Table.from_batches(rows)).ravel())
        for reader in (store, create_store(tmp_path)):
            found = reader.table("select value from activations order by run, neuron, position")
            np.testing.assert_array_equal(found["value"].to_numpy(), np.concatenate(expected))
    plan = str(store.table("explain select sum(value) from activations")["explain_value"][0])
    *_, scanned = re.findall("Projections: ([^│]+)", plan)
    assert set(scanned.replace(",", " ").split()) == read


def test_values_of_a_run_with_a_damaged_record_can_be_read(tmp_path: Path) -> None:
    """How they are encoded is not known then, and all columns are looked at."""
    store = write_store(tmp_path, "int8", num_blocks=1)
    query = "select sum(value) from activations where neuron = 5"
    whole = store.sql(query).fetchall()
    store.files.put(layout.run_path("r"), b"{")
    assert create_store(tmp_path).sql(query).fetchall() == whole


def scans(plan: Any) -> Iterator[dict[str, Any]]:
    """The nodes of a profile that read table values."""
    for node in plan:
        yield from scans(node.get("children", []))
        if "scale" in node["extra_info"].get("Projections", []) and "bytes_scanned" in node:
            yield node


def test_a_question_reads_the_row_groups_of_its_neurons_alone(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", "float16", num_blocks=2, layers=3)
    connection, profile = store.connection, tmp_path / "profile.json"
    connection.execute("set enable_profiling = 'json'")
    connection.execute(f"set profiling_output = '{profile}'")

    def read(where: str) -> tuple[int, int]:
        """Row groups and bytes."""
        connection.execute(f"select sum(value) from activations where {where}").fetchall()
        (scan,) = scans(json.loads(profile.read_text(encoding="utf-8"))["operator"])
        return int(scan["row_groups_scanned"]), int(scan["bytes_scanned"])

    groups = -(-WIDTH // neurons_in_group(LENGTH))
    everything, one = read("true"), read("run = 'r' and site = 'mlp' and layer = 1 and neuron = 5")
    assert everything[0] == 3 * 2 * groups
    assert read("layer = 1")[0] == 2 * groups
    assert one[0] == 2
    assert one[1] < 1.1 * everything[1] / 3 / groups
    plan = store.table("explain select value from activations where layer = 1 and neuron = 5")
    assert "Scanning Files: 2/6" in str(plan["explain_value"][0])


def test_compacted_blocks_say_what_they_said_apart(tmp_path: Path) -> None:
    for encoding in ("float16", "int8"):
        store = write_store(tmp_path / encoding, encoding, num_blocks=3)
        query = "from activations order by neuron, sample, position"
        before = store.matrix("mlp", 0, "code", neurons=[90, 3]), store.table(query)
        (made,) = compact_run(store, "r", seconds_to_effect=0)
        assert made.file.table == "values"
        assert (made.file.rows, made.num_replaced) == (3 * WIDTH * LENGTH, 3)
        collect_garbage(store, seconds=0)
        np.testing.assert_array_equal(before[0], store.matrix("mlp", 0, "code", neurons=[90, 3]))
        assert store.table(query) == before[1]
        file = pq.ParquetFile(store.files.local(made.file.path))
        assert file.num_row_groups == -(-3 * WIDTH // neurons_in_group(LENGTH))
        rows = file.read(columns=["neuron", "block"])
        assert rows == rows.sort_by([("neuron", "ascending"), ("block", "ascending")])


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_blocks_of_any_lengths_are_put_together(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.values._GROUP_VALUES", 64)
        files, paths = create_store(folder).files, []
        for block, length in enumerate(lengths):
            z = rng.normal(size=(9, length)).astype(np.float32)
            paths.append(layout.values_path("r", "code", "mlp", 0, block))
            files.put_batches(paths[-1], "values", value_lists(block, z, "int8"))
        together = layout.values_path("r", "code", "mlp", 0, 99)
        rows = files.put_batches(together, "values", join_blocks(files, paths)).rows
        assert rows == 9 * sum(lengths)
        order = [(name, "ascending") for name in ("neuron", "block", "position")]
        parts = pa.concat_tables(files.get_table(path) for path in paths).sort_by(order)
        assert files.get_table(together).combine_chunks() == parts.combine_chunks()


def test_blocks_keep_their_order_whatever_was_compacted_before(tmp_path: Path) -> None:
    store = write_store(tmp_path, "float16", num_blocks=4)
    late = store.files.get_json(layout.commit_path("r", "code", 1))
    store.files.local(layout.commit_path("r", "code", 1)).unlink()
    assert len(list(compact_run(store, "r", seconds_to_effect=0))) == 1
    store.files.put_json(layout.commit_path("r", "code", 1), late)
    blocks = store.matrix_blocks("mlp", 0, "code", neurons=[3], max_bytes=1 << 20)
    samples = np.concatenate([block.sample for block in blocks])
    assert samples[::LENGTH].tolist() == [0, 1, 2, 3]


def test_wrong_questions_are_answered_with_what_there_is(tmp_path: Path) -> None:
    store = write_store(tmp_path, "int8", num_blocks=1, layers=2)
    for arguments, message in {
        ("mlp", 2, "code", None): "there is no site 'mlp', layer 2, of run r: it captured attn in "
        "layers 0; mlp in layers 0-1.",
        ("mlp", 1, "prose", None): "run r has no task 'prose': its tasks are code.",
        ("mlp", 1, "code", (0, 96)): "neurons of site 'mlp', layer 1, of run r, lie in 0..95, "
        "found 96.",
        ("attn", 0, "code", None): "no values of site 'attn', layer 0, of run r, over task 'code' "
        "were kept: it kept mlp in layers 0-1, of tasks code. Capture them with capture.values: "
        "{sites: [attn], layers: [0], tasks: [code]} and --new-run.",
    }.items():
        with pytest.raises(StoreError) as refused:
            store.matrix(*arguments[:3], neurons=arguments[3])
        assert str(refused.value) == message


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path, "int8", num_blocks=1)
    path = store.files.local(layout.values_path("r", "code", "mlp", 0, 0))
    group = pq.ParquetFile(path).metadata.row_group(1)
    pages = next(
        column for column in map(group.column, range(group.num_columns))
        if column.path_in_schema == "code"
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    whole = bytes(data)
    # The page of values is the last of the column.
    last = pages.dictionary_page_offset + pages.total_compressed_size - 1
    data[last] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=f"cannot read {path}: .*CRC.*`actlake verify`"):
        store.matrix("mlp", 0, "code", neurons=[neurons_in_group(LENGTH)])
    assert store.matrix("mlp", 0, "code", neurons=[3]).shape == (LENGTH, 1)
    data = bytearray(whole)
    data[pages.data_page_offset : pages.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(QueryError, match="`actlake verify` names what is damaged"):
        store.table("select sum(value) from activations")


def test_a_store_ten_times_the_memory_is_asked_within_it(tmp_path: Path) -> None:
    num_blocks, layers = 4, 8
    store = write_store(tmp_path, "int8", num_blocks=num_blocks, layers=layers)
    limit = 4 * num_blocks * layers * WIDTH * LENGTH // 10
    connection = store.connect(threads=1, memory_limit=f"{limit // 1024} KiB")
    means = connection.execute(
        "select layer, neuron, avg(value) from activations group by all"
    ).fetchall()
    assert len(means) == layers * WIDTH
    best = connection.execute(
        "select sample, position, value from activations order by value desc limit 20"
    ).fetchall()
    assert {row[0] for row in best} == {num_blocks - 1}


def test_an_export_is_read_by_datasets(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", "int8", num_blocks=2)
    output = tmp_path / "values.parquet"
    chosen = select_values(store, "mlp", 0, "code", run=None, neurons=[4, 5, 6, 2])
    assert export_matrix(store, chosen, output) == 2 * LENGTH
    found = datasets.Dataset.from_parquet(str(output), cache_dir=str(tmp_path / "cache"))
    found = found.with_format("numpy")
    expected = store.matrix("mlp", 0, "code", neurons=[4, 5, 6, 2])
    np.testing.assert_array_equal(found["activations"][:], expected)
    assert found[LENGTH + 7]["sample"] == 1
    assert found[LENGTH + 7]["position"] == 7
    missing = tmp_path / "no" / "folder.parquet"
    with pytest.raises(StoreError) as refused:
        export_matrix(store, chosen, missing)
    assert str(refused.value).startswith(f"cannot write {missing}: No such file or directory.")
