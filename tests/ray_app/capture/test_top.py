"""The highest and lowest activations equal a full sort, however they come and who keeps them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_app.capture.top import NativeTopAccumulator, TopAccumulator
from ray_app.run import Run
from storage import layout, verify_store


def sorted_whole(z: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """What is to be kept of (positions, width) activations: values and places."""
    found = []
    for signed in (-z, z):
        order = np.array([np.lexsort((places, column)) for column in signed.T])[:, :k]
        found.append((np.take_along_axis(z.T, order, 1), places[order]))
    values, where = zip(*found, strict=True)
    return np.stack(values), np.stack(where)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Batches of (positions, width) with few different values or many; places; and k."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    width, k = draw(st.sampled_from([1, 7, 8, 530])), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = random.normal(size=(sum(lengths), width))
    if draw(st.booleans()):
        # Rounds to -0 as well, which is kept as 0; half are so where activations are rectified.
        z = np.round(z * draw(st.sampled_from([0.3, 1, 3])))
    values = torch.from_numpy(z).to(dtype)
    places = torch.from_numpy(random.permutation(len(z)).astype(np.int32))
    return list(values.split(lengths)), places, k


@given(batches(), st.sampled_from([1, 2, 3]))
@settings(max_examples=40)
def test_what_is_kept_equals_a_full_sort(
    drawn: tuple[list[torch.Tensor], torch.Tensor, int], threads: int
) -> None:
    blocks, places, k = drawn
    whole = torch.cat(blocks).float().numpy()
    expected = sorted_whole(whole, places.numpy(), k)
    before = torch.get_num_threads()
    for kind in (TopAccumulator, NativeTopAccumulator):
        top, start = kind(blocks[0].shape[1], k), 0
        try:
            torch.set_num_threads(threads)
            for block in blocks:
                # Between rows that count there are some that do not, and are better.
                padded = torch.full((2 * len(block), block.shape[1]), 1e4, dtype=block.dtype)
                counted = 2 * torch.arange(len(block)) + 1
                padded[counted] = block
                with torch.inference_mode():  # As in a stage.
                    top.add(padded, places[start : start + len(block)], counted)
                start += len(block)
        finally:
            torch.set_num_threads(before)
        for found, wanted in zip(top.best(), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert not (np.signbit(top.best()[0]) & (top.best()[0] == 0)).any()


def counted_places(run: Run, task: str, num_counted: dict[int, int]) -> np.ndarray:
    """(positions, 2) sample and position, in the order in which the reference has them."""
    rows = run.store.sql(
        "select sample, position from tokens where task = $task and counted order by all",
        {"task": task},
    ).fetchall()
    positions: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        positions.setdefault(row[0], []).append(row)
    assert {sample: len(of_sample) for sample, of_sample in positions.items()} == num_counted
    return np.array([row for sample in num_counted for row in positions[sample]])


def test_top_activations_of_a_task_are_the_best_of_all_its_shards(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    reference_of: Callable[..., Any],
) -> None:
    """Rectified activations tie at 0 in more positions than are kept."""
    run = capture_locally(write_study(family="opt"), None, "capture.top=4")
    assert verify_store(run.store).problems == []
    for task, reference in reference_of(run, one_by_one=False).items():
        places = counted_places(run, task, reference.num_counted)
        in_order = np.lexsort(places.T[::-1])
        for (site, layer), blocks in reference.activations.items():
            z = torch.cat(blocks).numpy()[in_order]
            values, where = sorted_whole(z, np.arange(len(z)), 4)
            found = run.store.sql(
                "from top_activations where task = $task and site = $site and layer = $layer "
                "order by kind, neuron, rank",
                {"task": task, "site": site, "layer": layer},
            ).fetchnumpy()
            np.testing.assert_array_equal(found["value"], values.reshape(-1))
            wanted = places[in_order][where.reshape(-1)]
            np.testing.assert_array_equal(np.stack([found["sample"], found["position"]]).T, wanted)
            np.testing.assert_array_equal(found["rank"], np.tile([1, 2, 3, 4], 2 * z.shape[1]))


def test_a_filter_on_one_neuron_reaches_the_row_groups(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    run = capture_locally(write_study(), None, "capture.tokens=20")
    query = "from top_activations where site = 'mlp' and layer = 1 and neuron = 5"
    found = run.store.sql(f"explain (format json) {query}").fetchall()[0][1]
    nodes, scans = json.loads(found), []
    while nodes:
        node = nodes.pop()
        nodes += node["children"]
        if node["extra_info"].get("Function") == "READ_PARQUET":
            scans.append(node["extra_info"])
    assert len(scans) == 2
    for scan in scans:
        assert set(scan["Filters"]) >= {"(site = 'mlp')", "(layer = 1)", "(neuron = 5)"}, scan


def test_a_shard_without_its_top_activations_is_named(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    run = capture_locally(write_study(), None, "capture.tokens=20")
    files, path = run.store.files, layout.commit_path(run.id, "code", 0)
    record = files.get_json(path)
    record["files"] = [file for file in record["files"] if file["table"] != "top"]
    files.put_json(path, record)
    [problem] = verify_store(run.store).problems
    assert "task code, shard 0: " in problem
    assert "top_length 5, least_top None, most_top None, top_rows None" in problem
