"""``actlake drift`` on captures of a tiny model, from the command line to the printed table."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_app.run import Run
from storage import TABLES


@pytest.fixture
def two_runs(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], tmp_path: Path
) -> tuple[str, str, str]:
    """(store, run of given weights, run of random weights)."""
    store = tmp_path / "store"
    given = capture_locally(write_study(), store)
    random = capture_locally(write_study(name="tiny-random"), store, "model.init=random")
    return str(store), given.id, random.id


Actlake = Callable[..., tuple[int, str, str]]


def test_the_summary_fits_80_columns_and_names_tasks_and_layers(
    two_runs: tuple[str, str, str], actlake: Actlake
) -> None:
    _, given, random = two_runs
    status, out, err = actlake("drift", *two_runs, "--fractions", "0.02,0.05,0.1,0.2")
    assert status == 0
    assert "made: 96 rows of drift" in err  # 4 tasks, 2 sites, 4 fractions; 2 layers and whole
    lines = out.splitlines()
    assert lines[:2] == [f"drift from {given} (A)", f"        to {random} (B)"]
    assert max(map(len, lines)) <= 80
    for task in ("code", "prose", "numbers", "mixed"):
        assert sum(line.split()[:2] == [task, "attn"] or line.split()[:2] == [task, "mlp"]
                   for line in lines) == 1  # fmt: skip
    layers, persistence = (
        [line.split()[:2] for line in part.splitlines() if line.split()[:1] in (["mlp"], ["attn"])]
        for part in out[out.index("Layers that drift most") :].split("Do tasks share neurons")
    )
    assert sorted(layers) == [["attn", "0"], ["attn", "1"], ["mlp", "0"], ["mlp", "1"]]
    assert persistence == [
        [site, fraction] for site in ("attn", "mlp") for fraction in ("0.02", "0.05", "0.1", "0.2")
    ]
    assert "did not read the same tokens" not in out
    _, again, err = actlake("drift", *two_runs, "--fractions", "0.2,0.1,0.05,0.02")
    assert "was there already" in err
    assert again == out


def test_csv_and_json_hold_every_row_and_column(
    two_runs: tuple[str, str, str], actlake: Actlake
) -> None:
    options = ("--fractions", "0.05", "--metric", "rms", "--within", "layer")
    _, as_csv, _ = actlake("drift", *two_runs, *options, "--format", "csv")
    _, as_json, _ = actlake("drift", *two_runs, *options, "--format", "json")
    rows = json.loads(as_json)
    assert len(rows) == 4 * 2 * 3
    assert list(rows[0]) == [*TABLES["drift"].partitions, *TABLES["drift"].schema.names]
    assert {(row["metric"], row["within"], row["fraction"]) for row in rows} == {
        ("rms", "layer", 0.05)
    }
    lines = list(csv.DictReader(io.StringIO(as_csv)))
    assert [float(line["correlation"]) for line in lines] == [row["correlation"] for row in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "size"], "metrics"),
        (["--fractions", "2"], "each fraction must be in (0, 1], found 2"),
    ],
)
def test_wrong_options_end_with_one_sentence_and_status_2(
    two_runs: tuple[str, str, str], actlake: Actlake, options: list[str], message: str
) -> None:
    status, out, err = actlake("drift", *two_runs, *options)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_runs_that_cannot_be_compared_end_with_status_2(
    two_runs: tuple[str, str, str], actlake: Actlake
) -> None:
    store, given, _ = two_runs
    status, _, err = actlake("drift", store, given, given)
    assert status == 2
    assert err == (
        f"error: the two runs must differ, found {given!r} twice: name another run to compare "
        "with.\n"
    )


def test_the_second_run_may_be_in_another_store(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    tmp_path: Path,
    actlake: Actlake,
) -> None:
    study = write_study()
    one, two = (capture_locally(study, tmp_path / name) for name in ("one", "two"))
    assert one.id == two.id
    options = ("--store-b", str(tmp_path / "two"), "--fractions", "0.1", "--format", "json")
    status, out, _ = actlake("drift", str(tmp_path / "one"), one.id, two.id, *options)
    assert status == 0
    assert {row["correlation"] for row in json.loads(out)} == {1.0}
