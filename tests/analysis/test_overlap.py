"""Selections against a stable sort in NumPy, and overlap against arithmetic of Python sets."""

import itertools
import math
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import overlap_of_scores

Scores = dict[str, np.ndarray]
"""task -> (layers, neurons)."""

Selections = dict[tuple[str, float], list[tuple[int, int]]]
"""(task, fraction) -> (layer, neuron) of the selected neurons, best first."""


def expected_selections(scores: Scores, fractions: list[float], within: str) -> Selections:
    found = {}
    for (task, values), fraction in itertools.product(scores.items(), fractions):
        # Exact arithmetic on what the user wrote: 0.29 of 100 is 29.
        share = Fraction(str(fraction))
        strata = [values.ravel()] if within == "model" else list(values)
        places: list[tuple[int, int]] = []
        for index, stratum in enumerate(strata):
            best = np.argsort(-stratum, kind="stable")[: math.floor(share * len(stratum))]
            width = values.shape[1]
            places += [divmod(int(place) + index * width, width) for place in best]
        found[task, fraction] = places
    return found


def found_selections(table: pa.Table) -> Selections:
    found: dict[tuple[str, float], list[tuple[Any, ...]]] = {}
    for row in table.to_pylist():
        place = row["layer"], row["neuron"]
        within = row["layer"] if row["within"] == "layer" else 0
        found.setdefault((row["task"], row["fraction"]), []).append((within, row["rank"], place))
    for places in found.values():
        for _, ranks in itertools.groupby(sorted(places), key=lambda place: place[0]):
            assert [rank for _, rank, _ in ranks] == list(
                range(1, 1 + sum(p[0] == places[0][0] for p in places))
            )
    return {key: [place for *_, place in sorted(places)] for key, places in found.items()}


def expected_overlap(scores: Scores, selections: Selections) -> dict[tuple[Any, ...], Any]:
    """(fraction, layer, task_a, task_b) -> (population, size_a, size_b, shared)."""
    num_layers, width = next(iter(scores.values())).shape
    counted = {}
    for fraction in {fraction for _, fraction in selections}:
        for a, b in itertools.permutations(scores, 2):
            of_a, of_b = set(selections[a, fraction]), set(selections[b, fraction])
            for layer in (None, *range(num_layers)):
                in_a = {place for place in of_a if layer in (None, place[0])}
                in_b = {place for place in of_b if layer in (None, place[0])}
                population = width * (num_layers if layer is None else 1)
                counts = population, len(in_a), len(in_b), len(in_a & in_b)
                counted[fraction, layer, a, b] = counts
    return counted


def found_overlap(table: pa.Table) -> dict[tuple[Any, ...], Any]:
    keys = ("fraction", "layer", "task_a", "task_b")
    values = ("population", "size_a", "size_b", "shared")
    rows = table.to_pylist()
    found = {tuple(row[k] for k in keys): tuple(row[v] for v in values) for row in rows}
    assert len(found) == len(rows)
    return found


def chance_of_at_least(shared: int, population: int, size_a: int, size_b: int) -> float:
    """The hypergeometric tail, by counting."""
    ways = sum(
        math.comb(size_a, both) * math.comb(population - size_a, size_b - both)
        for both in range(shared, min(size_a, size_b) + 1)
    )
    return float(Fraction(ways, math.comb(population, size_b)))


def write(folder: Path, scores: Scores) -> Path:
    parts = []
    for task, values in scores.items():
        layers, neurons = np.indices(values.shape).reshape(2, -1)
        parts.append(
            pa.table(
                {"task": [task] * values.size, "layer": layers, "neuron": neurons,
                 "score": values.ravel()}
            )
        )  # fmt: skip
    order = np.random.default_rng(0).permutation(sum(map(len, parts)))
    path = folder / "scores.parquet"
    pq.write_table(pa.concat_tables(parts).take(order), path)
    return path


def check(scores: Scores, fractions: list[float], within: Any) -> pa.Table:
    """Compare the results for some scores with the reference; the table overlap."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        overlap = overlap_of_scores(
            write(Path(folder), scores), fractions, out, within=within, threads=2
        )
        selections = pq.read_table(out / "selections.parquet")
    expected = expected_selections(scores, fractions, within)
    assert found_selections(selections) == expected
    assert found_overlap(overlap) == expected_overlap(scores, expected)
    return overlap


# Few different scores, so that most quotas end amid equals.
TIED = st.sampled_from([-1.0, 0.0, 0.5, 1.0])


@st.composite
def tied_scores(draw: st.DrawFn) -> Scores:
    num_layers, width = draw(st.integers(1, 4)), draw(st.integers(10, 14))
    size = num_layers * width
    values = st.lists(TIED, min_size=size, max_size=size)
    tasks = ["b", "a", "Z c"][: draw(st.integers(2, 3))]
    return {task: np.array(draw(values)).reshape(num_layers, width) for task in tasks}


@settings(max_examples=12, deadline=None)
@given(
    scores=tied_scores(),
    fractions=st.lists(
        st.sampled_from([0.1, 0.29, 0.3, 0.5, 0.7, 1.0]), min_size=1, max_size=4, unique=True
    ),
    within=st.sampled_from(["model", "layer"]),
)
def test_ties_go_to_the_lower_layer_then_the_lower_neuron(
    scores: Scores, fractions: list[float], within: str
) -> None:
    check(scores, sorted(fractions), within)


@pytest.mark.parametrize("within", ["model", "layer"])
@pytest.mark.parametrize("fraction", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58, 1.0])
def test_the_quota_is_the_whole_part_of_the_share_on_paper(fraction: float, within: str) -> None:
    random = np.random.default_rng(0)
    scores = {task: random.normal(size=(1, 100)) for task in "ab"}
    table = check(scores, [fraction], within)
    assert set(table["size_a"].to_pylist()) == {round(100 * fraction)}


@pytest.mark.parametrize("within", ["model", "layer"])
def test_several_fractions_give_the_same_as_each_alone(within: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    common = random.normal(size=(3, 40))
    scores = {task: common + random.normal(size=(3, 40)) for task in ("x", "y", "z")}
    together = check(scores, [0.05, 0.1, 0.35, 1.0], within)
    for fraction in (0.05, 0.1, 0.35, 1.0):
        alone = overlap_of_scores(
            write(tmp_path, scores), [fraction], tmp_path / "out", within=within
        )
        rows = [row for row in together.to_pylist() if row["fraction"] == fraction]
        assert alone.to_pylist() == rows


def rows_of(table: pa.Table, **where: Any) -> dict[str, Any]:
    (row,) = (
        row for row in table.to_pylist() if all(row[name] == value for name, value in where.items())
    )
    return row


def test_shares_lift_and_p_value_of_a_pair_are_known_numbers() -> None:
    scores = {task: np.zeros((2, 10)) for task in ("a", "b")}
    scores["a"][0, [0, 1, 2, 3]] = 1
    scores["b"][0, [2, 3]] = scores["b"][1, [5, 6]] = 1
    table = check(scores, [0.2], "model")
    whole = rows_of(table, layer=None, task_a="a", task_b="b")
    assert whole["share_of_a"] == 0.5
    assert whole["jaccard"] == pytest.approx(2 / 6)
    assert whole["expected"] == pytest.approx(0.8)
    assert whole["lift"] == pytest.approx(2.5)
    assert whole["p_value"] == pytest.approx(chance_of_at_least(2, 20, 4, 4), rel=1e-12)
    first = rows_of(table, layer=0, task_a="b", task_b="a")
    assert (first["size_a"], first["size_b"], first["share_of_a"]) == (2, 4, 1.0)
    assert first["p_value"] == pytest.approx(chance_of_at_least(2, 10, 2, 4), rel=1e-12)


def test_a_layer_without_a_selected_neuron_has_rows_with_nulls() -> None:
    scores = {task: np.zeros((3, 10)) for task in ("a", "b")}
    scores["a"][0, :3] = scores["b"][1, :3] = 1
    table = check(scores, [0.1], "model")
    row = rows_of(table, layer=0, task_a="b", task_b="a")
    assert (row["size_a"], row["size_b"], row["shared"]) == (0, 3, 0)
    assert row["share_of_a"] is None
    assert row["lift"] is None
    assert (row["jaccard"], row["expected"], row["p_value"]) == (0.0, 0.0, 1.0)
    nobody = rows_of(table, layer=2, task_a="a", task_b="b")
    assert (nobody["share_of_a"], nobody["jaccard"], nobody["lift"]) == (None, None, None)
    assert nobody["p_value"] == 1.0


def test_tasks_that_share_nothing_have_a_row_that_says_so() -> None:
    scores = {task: np.zeros((2, 10)) for task in ("a", "b")}
    scores["a"][0, :2] = scores["b"][1, :2] = 1
    row = rows_of(check(scores, [0.1], "model"), layer=None, task_a="a", task_b="b")
    assert (row["shared"], row["share_of_a"], row["jaccard"], row["lift"]) == (0, 0, 0, 0)
    assert row["p_value"] == 1.0


def test_identical_selections_share_everything() -> None:
    values = np.random.default_rng(3).normal(size=(4, 25))
    table = check({"a": values, "b": values, "c": values}, [0.1, 1.0], "model")
    for row in table.to_pylist():
        if row["size_a"]:
            assert (row["share_of_a"], row["jaccard"]) == (1.0, 1.0)
    whole = rows_of(table, layer=None, fraction=0.1, task_a="c", task_b="a")
    assert whole["lift"] == pytest.approx(10)
    assert whole["p_value"] == pytest.approx(1 / math.comb(100, 10))
    assert rows_of(table, layer=None, fraction=1.0, task_a="a", task_b="b")["p_value"] == 1.0


def test_every_p_value_is_the_tail_counted_exactly() -> None:
    random = np.random.default_rng(4)
    common = random.normal(size=(2, 60))
    scores = {task: common + random.normal(size=(2, 60)) for task in "abcd"}
    for row in check(scores, [0.05, 0.2, 0.6], "model").to_pylist():
        counts = (row["shared"], row["population"], row["size_a"], row["size_b"])
        assert row["p_value"] == pytest.approx(chance_of_at_least(*counts), rel=1e-9)
        assert 0 < row["p_value"] <= 1


def test_both_orders_of_a_pair_mirror_each_other() -> None:
    random = np.random.default_rng(6)
    scores = {task: random.normal(size=(3, 30)) for task in "abc"}
    table = check(scores, [0.1, 0.5], "model")
    for row in table.to_pylist():
        place = {"fraction": row["fraction"], "layer": row["layer"]}
        back = rows_of(table, **place, task_a=row["task_b"], task_b=row["task_a"])
        assert (back["size_a"], back["size_b"]) == (row["size_b"], row["size_a"])
        for name in ("shared", "jaccard", "expected", "lift", "p_value"):
            assert back[name] == row[name]


def test_layers_of_different_width_have_their_own_quotas(
    write_scores: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"task": task, "layer": layer, "neuron": neuron, "score": float(neuron)}
        for task in "ab"
        for layer, width in ((3, 10), (7, 25))
        for neuron in range(width)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scores.parquet")
    table = overlap_of_scores(tmp_path / "scores.parquet", [0.2], tmp_path / "out", within="layer")
    sizes = {row["layer"]: (row["population"], row["size_a"]) for row in table.to_pylist()}
    assert sizes == {None: (35, 7), 3: (10, 2), 7: (25, 5)}


def test_twenty_tasks_of_twenty_thousand_neurons_are_counted_rightly_and_quickly(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(5)
    common = random.normal(size=(4, 5000))
    tasks = [f"task-{index:02d}" for index in range(20)]
    scores = {
        task: (common + random.normal(size=(4, 5000))).astype(np.float16).astype(np.float32)
        for task in tasks
    }
    fractions = [0.01, 0.02, 0.05, 0.1, 0.2]
    path = write(tmp_path, scores)
    start = time.process_time()
    table = overlap_of_scores(path, fractions, tmp_path / "out")
    assert time.process_time() - start < 15
    assert table.num_rows == 20 * 19 * 5 * 5
    bits = np.array([values.ravel() for values in scores.values()])
    for fraction in fractions:
        chosen = np.zeros(bits.shape, np.int64)
        best = np.argsort(-bits, axis=1, kind="stable")[:, : round(fraction * 20_000)]
        np.put_along_axis(chosen, best, 1, axis=1)
        shared = chosen @ chosen.T
        for row in table.to_pylist():
            if row["layer"] is None and row["fraction"] == fraction:
                pair = tasks.index(row["task_a"]), tasks.index(row["task_b"])
                assert row["shared"] == shared[pair]
