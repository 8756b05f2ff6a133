"""Scores of one's own: what is read, what is refused and in which words, and what is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import AnalysisError, overlap_of_scores
from storage import StoreError

ROWS = [
    {"task": task, "layer": layer, "neuron": neuron, "score": float((7 * neuron + start) % 11)}
    for start, task in enumerate(("a", "b"))
    for layer in range(2)
    for neuron in range(10)
]
COMPLETE = (
    "must have a task, a site, a layer from 0 to 32,767, a neuron from 0 to 2,147,483,647 and a "
    "finite score, found"
)


def write(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    table = pa.Table.from_pylist(rows)
    for name, dtype in types.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, table[name].cast(dtype))
    pq.write_table(table, path)
    return path


def changed(index: int, **change: Any) -> list[dict[str, Any]]:
    return [row | change if number == index else row for number, row in enumerate(ROWS)]


def refusal(tmp_path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> str:
    """Why a file of rows is refused; its folder is left out, and nothing may be written."""
    path = write(tmp_path / "scores.parquet", rows, **types)
    with pytest.raises(AnalysisError) as caught:
        overlap_of_scores(path, [0.1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_missing_columns_are_named_beside_those_there_are(tmp_path: Path) -> None:
    rows = [{"task": "a", "neuron": 0, "value": 1.0, "unit": 3}]
    assert refusal(tmp_path, rows) == (
        "scores.parquet must have the columns task, layer, neuron and score, and lacks layer, "
        "score; its columns are: task, neuron, value, unit."
    )


@pytest.mark.parametrize(
    ("column", "dtype", "kind"),
    [
        ("layer", pa.float64(), "an integer, found double"),
        ("neuron", pa.string(), "an integer, found string"),
        ("score", pa.string(), "a number, found string"),
        ("task", pa.binary(), "text, found binary"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(
    tmp_path: Path, column: str, dtype: pa.DataType, kind: str
) -> None:
    assert refusal(tmp_path, ROWS, **{column: dtype}) == (
        f"column {column!r} of scores.parquet must be {kind}: cast it first."
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"score": float("nan")}, "task a, site given, layer 1, neuron 3, score nan"),
        ({"score": float("inf")}, "task a, site given, layer 1, neuron 3, score inf"),
        ({"score": float("-inf")}, "task a, site given, layer 1, neuron 3, score -inf"),
        (
            {"score": None},
            "task a, site given, layer 1, neuron 3, score missing or out of range",
        ),
        (
            {"task": None},
            "task missing or out of range, site given, layer 1, neuron 3, score 10.0",
        ),
        (
            {"layer": 40_000},
            "task a, site given, layer missing or out of range, neuron 3, score 10.0",
        ),
        (
            {"neuron": 2**31},
            "task a, site given, layer 1, neuron missing or out of range, score 10.0",
        ),
        ({"layer": -1}, "task a, site given, layer -1, neuron 3, score 10.0"),
        ({"neuron": -3}, "task a, site given, layer 1, neuron -3, score 10.0"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_ranked_is_shown(
    tmp_path: Path, change: dict[str, Any], found: str
) -> None:
    assert refusal(tmp_path, changed(13, **change)) == (
        f"every row of scores.parquet {COMPLETE} {found}: remove or mend such rows."
    )


def test_a_missing_site_is_refused(tmp_path: Path) -> None:
    rows = [row | {"site": None if number == 4 else "mlp"} for number, row in enumerate(ROWS)]
    assert f"{COMPLETE} task a, site missing or out of range, layer 0" in refusal(tmp_path, rows)


def test_a_neuron_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, [*ROWS, ROWS[23] | {"score": 99.0}]) == (
        "every neuron of scores.parquet must have one score in each task, found site given, "
        "layer 0, neuron 3 twice in task 'b'."
    )


def test_a_neuron_that_one_task_lacks_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, ROWS[:12] + ROWS[13:]) == (
        "every neuron of scores.parquet must have one score in each task, found site given, "
        "layer 1, neuron 2 only in b."
    )


def test_a_neuron_twice_in_one_task_instead_of_once_in_each_is_refused(tmp_path: Path) -> None:
    rows = changed(32, task="a")
    assert refusal(tmp_path, rows) == (
        "every neuron of scores.parquet must have one score in each task, found site given, "
        "layer 1, neuron 2 twice in task 'a'."
    )


@pytest.mark.parametrize(("rows", "number"), [(ROWS[:20], 1), (ROWS[:1], 1)])
def test_one_task_cannot_be_compared(
    tmp_path: Path, rows: list[dict[str, Any]], number: int
) -> None:
    assert refusal(tmp_path, rows) == (
        f"scores.parquet must hold scores of at least two tasks to compare, found {number}."
    )


def test_a_file_without_rows_has_no_tasks(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.parquet", ROWS)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(AnalysisError, match=r"at least two tasks to compare, found 0\.$"):
        overlap_of_scores(path, [0.1], tmp_path / "out")


@pytest.mark.parametrize("make", ["missing", "text", "folder", "cut"])
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path: Path, make: str) -> None:
    path = tmp_path / "scores.parquet"
    if make == "text":
        path.write_text("task,layer,neuron,score\n", encoding="utf-8")
    elif make == "folder":
        path.mkdir()
    elif make == "cut":
        write(path, ROWS)
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AnalysisError) as caught:
        overlap_of_scores(path, [0.1], tmp_path / "out")
    message = str(caught.value)
    if make in ("missing", "folder"):
        assert message == f"there is no scores file {path}: give the path of a Parquet file."
    else:
        assert message.startswith(f"cannot read the scores file {path} as Parquet: ")
    assert "\n" not in message


def test_damage_behind_a_whole_footer_is_a_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.parquet", ROWS)
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(AnalysisError, match=r"cannot read the scores file .*scores\.parquet as P"):
        overlap_of_scores(path, [0.1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_fraction_outside_its_range_is_refused_before_the_file_is_read(
    tmp_path: Path, fraction: float
) -> None:
    with pytest.raises(AnalysisError) as caught:
        overlap_of_scores(tmp_path / "none.parquet", [0.1, fraction], tmp_path / "out")
    assert str(caught.value) == (
        f"each fraction must be in (0, 1], found {fraction:g}: give shares such as 0.01."
    )


def test_no_fraction_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="fractions must name at least one fraction, found n"):
        overlap_of_scores(tmp_path / "none.parquet", [], tmp_path / "out")


@pytest.mark.parametrize(
    ("within", "fraction", "population", "smallest"),
    [
        ("model", 0.04, "20 neurons of site 'given'", "0.05"),
        ("layer", 0.05, "10 neurons of site 'given' of layer 0", "0.1"),
    ],
)
def test_a_fraction_that_selects_nothing_is_refused(
    tmp_path: Path, within: Any, fraction: float, population: str, smallest: str
) -> None:
    path = write(tmp_path / "scores.parquet", ROWS)
    with pytest.raises(AnalysisError) as caught:
        overlap_of_scores(path, [fraction, 0.5], tmp_path / "out", within=within)
    assert str(caught.value) == (
        f"fraction {fraction} selects no neuron: {population} can be chosen from; the smallest "
        f"fraction is {smallest}."
    )


def test_a_fraction_given_twice_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.parquet", ROWS)
    once = overlap_of_scores(path, [0.1, 0.5], tmp_path / "once")
    assert overlap_of_scores(path, [0.5, 0.1, 0.5], tmp_path / "twice").equals(once)


def test_sites_are_ranked_and_compared_apart(tmp_path: Path) -> None:
    rows = [
        row | {"site": site, "score": row["score"] + 100 * (site == "up")}
        for site in ("up", "down")
        for row in ROWS
    ]
    path = write(tmp_path / "scores.parquet", rows)
    with_sites = overlap_of_scores(path, [0.1, 0.3], tmp_path / "out").to_pylist()
    plain = overlap_of_scores(
        write(tmp_path / "plain.parquet", ROWS), [0.1, 0.3], tmp_path / "plain"
    ).to_pylist()
    assert {row["site"] for row in plain} == {"given"}
    for site in ("up", "down"):
        of_site = [row | {"site": "given"} for row in with_sites if row["site"] == site]
        assert of_site == plain
    assert {row["metric"] for row in plain} == {"given"}
    assert {row["run"] for row in plain} == {None}


def by_arrow_dictionary(path: Path) -> None:
    types = {name: pa.dictionary(pa.int32(), pa.string()) for name in ("task", "site")}
    write(path, [row | {"site": "given"} for row in ROWS], **types)


def by_pandas_categories(path: Path) -> None:
    frame = pd.DataFrame(ROWS).astype({"task": "category", "layer": "int8", "neuron": "uint64"})
    frame.to_parquet(path)


def by_polars(path: Path) -> None:
    pl.DataFrame(ROWS).with_columns(score=pl.col("score").cast(pl.Float32)).write_parquet(path)


def by_polars_categories(path: Path) -> None:
    pl.DataFrame(ROWS).with_columns(
        task=pl.col("task").cast(pl.Categorical), score=pl.col("score").cast(pl.Int32)
    ).write_parquet(path)


def by_half_precision(path: Path) -> None:
    write(path, ROWS, score=pa.float16(), task=pa.large_string())


def by_string_view(path: Path) -> None:
    write(path, ROWS, task=pa.string_view())


@pytest.mark.parametrize(
    "make",
    [by_arrow_dictionary, by_pandas_categories, by_polars, by_polars_categories,
     by_half_precision, by_string_view],
)  # fmt: skip
def test_files_of_other_writers_give_the_same_result(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "other.parquet")
    plain = write(tmp_path / "scores.parquet", ROWS)
    expected = overlap_of_scores(plain, [0.1, 0.5], tmp_path / "plain")
    found = overlap_of_scores(tmp_path / "other.parquet", [0.1, 0.5], tmp_path / "other")
    assert found.equals(expected)


def test_a_file_name_is_not_a_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "scores[1]*?.parquet", ROWS)
    write(tmp_path / "scores1-ab.parquet", [row | {"task": "other"} for row in ROWS])
    table = overlap_of_scores(path, [0.5], tmp_path / "out")
    assert set(table["task_a"].to_pylist()) == {"a", "b"}


def test_folders_with_names_of_columns_add_no_values(tmp_path: Path) -> None:
    folder = tmp_path / "task=other" / "layer=9"
    folder.mkdir(parents=True)
    path = write(folder / "scores.parquet", ROWS)
    table = overlap_of_scores(path, [0.5], tmp_path / "out")
    assert set(table["task_a"].to_pylist()) == {"a", "b"}
    assert set(table["layer"].to_pylist()) == {None, 0, 1}


def test_names_with_quotes_commas_and_line_ends_survive_in_both_formats(tmp_path: Path) -> None:
    names = {"a": 'it\'s, "so"', "b": "Zeile\nzwei $x {y}"}
    rows = [row | {"task": names[row["task"]]} for row in ROWS]
    overlap_of_scores(write(tmp_path / "scores.parquet", rows), [0.5], tmp_path / "out")
    for table in ("selections", "overlap"):
        parquet, csv = both_formats(tmp_path / "out", table)
        pd.testing.assert_frame_equal(csv, parquet, check_dtype=False)
        assert set(parquet.iloc[:, parquet.columns.str.startswith("task")].to_numpy().ravel()) == (
            set(names.values())
        )


def both_formats(out: Path, table: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    parquet = pq.read_table(out / f"{table}.parquet").to_pandas().drop(columns="run")
    csv = pd.read_csv(out / f"{table}.csv").drop(columns="run")
    return parquet, csv


def test_parquet_and_csv_hold_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [row | {"score": float(random.normal())} for row in ROWS]
    path = write(tmp_path / "scores.parquet", rows)
    overlap_of_scores(path, [0.1, 0.3], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "overlap.csv", "overlap.parquet", "selections.csv", "selections.parquet",
    ]  # fmt: skip
    for table, num_rows in (("selections", 2 * (2 + 6)), ("overlap", 2 * 2 * 3)):
        parquet, csv = both_formats(tmp_path / "out", table)
        assert len(parquet) == num_rows
        pd.testing.assert_frame_equal(csv, parquet, check_dtype=False, check_exact=True)


def test_the_order_of_the_rows_given_changes_no_byte(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    results = []
    for name in ("one", "two"):
        rows = [ROWS[index] for index in random.permutation(len(ROWS))]
        out = tmp_path / name
        overlap_of_scores(write(tmp_path / f"{name}.parquet", rows), [0.1, 0.5], out)
        results.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert results[0] == results[1]


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.parquet", ROWS)
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(StoreError, match=r"out: .*Give a folder that can be written\.$"):
        overlap_of_scores(path, [0.5], tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_an_out_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.parquet", ROWS)
    steps: list[str] = []
    with pytest.raises(StoreError, match=r"/proc/none: .*Give a folder that can be written\.$"):
        overlap_of_scores(path, [0.5], Path("/proc/none"), on_step=steps.append)
    assert steps == ["given_scores"]


def test_each_step_is_told_before_it_runs(tmp_path: Path) -> None:
    steps: list[str] = []
    path = write(tmp_path / "scores.parquet", ROWS)
    overlap_of_scores(path, [0.5], tmp_path / "out", on_step=steps.append)
    assert steps == ["given_scores", "quotas", "ranks", "selections", "overlap"]
