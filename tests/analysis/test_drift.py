"""Drift against NumPy and SciPy on runs made by hand, and every way in which runs do not fit."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import hypergeom, spearmanr

from analysis import AnalysisError, AnalysisSettings, compare_runs
from analysis.drift import drift_by_layer, drift_by_task, drift_query
from analysis.persistence import MOST_PERMUTATIONS, mantel_test
from storage import Store, StoreError, create_store, layout, verify_store
from written_runs import TASKS, WIDTHS, Importances, importances, write_run

EPS = {"mlp": 1e-3, "attn": 1e-4}


def settings(**changes: Any) -> AnalysisSettings:
    return AnalysisSettings.model_validate({"fractions": [0.15, 0.3]} | changes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two unlike runs, run-a and run-b."""
    made = create_store(tmp_path / "store")
    write_run(made, "run-a", importances(1))
    write_run(made, "run-b", importances(2), losses=(1.0, 1.25, 3.0))
    return made


def rows_of(store: Store, analysis: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = store.table(drift_query(analysis)).to_pylist()
    return rows


def selected(values: Importances, task: str, site: str, fraction: float, within: str) -> set[Any]:
    """(layer, neuron) of the top fraction by score; ties to the lower layer, then neuron."""
    layers = sorted({layer for _, s, layer in values if s == site})
    scores = [
        (-z / (values["mixed", site, layer][neuron] + EPS[site]), layer, neuron)
        for layer in layers
        for neuron, z in enumerate(values[task, site, layer])
    ]
    strata = [[s for s in scores if s[1] == n] for n in layers] if within == "layer" else [scores]
    chosen = set()
    for stratum in strata:
        quota = int(fraction * len(stratum) + 1e-9)
        chosen |= {(layer, neuron) for _, layer, neuron in sorted(stratum)[:quota]}
    return chosen


@pytest.mark.parametrize("within", ["model", "layer"])
def test_every_row_is_what_numpy_and_scipy_say(store: Store, within: str) -> None:
    a, b = importances(1), importances(2)
    made = compare_runs(store, "run-a", "run-b", settings(within=within)).analysis
    rows = rows_of(store, made.id)
    assert len(rows) == 3 * 2 * 2 * 3  # tasks, sites, fractions; two layers and the whole model
    for row in rows:
        task, site, layer = row["task"], row["site"], row["layer"]
        layers = [0, 1] if layer is None else [layer]
        x, y = (np.concatenate([v[task, site, n] for n in layers]) for v in (a, b))
        larger = np.maximum(x, y)
        errors = np.divide(np.abs(x - y), larger, out=np.zeros_like(x), where=larger > 0)
        assert row["population"] == len(x)
        assert row["correlation"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        assert row["error_median"] == pytest.approx(np.quantile(errors, 0.5), abs=1e-12)
        assert row["error_p90"] == pytest.approx(np.quantile(errors, 0.9), abs=1e-12)
        if task != "mixed":
            check_overlap(row, a, b, layers, within)
    assert {row["within"] for row in rows} == {within}
    assert {(row["run_a"], row["run_b"]) for row in rows} == {("run-a", "run-b")}


def check_overlap(
    row: dict[str, Any], a: Importances, b: Importances, layers: list[int], within: str
) -> None:
    chosen = [selected(v, row["task"], row["site"], row["fraction"], within) for v in (a, b)]
    in_a, in_b = ({key for key in side if key[0] in layers} for side in chosen)
    shared, union, size = len(in_a & in_b), len(in_a | in_b), row["population"]
    expected = len(in_a) * len(in_b) / size
    assert (row["size_a"], row["size_b"], row["shared"]) == (len(in_a), len(in_b), shared)
    assert row["share_of_a"] == (shared / len(in_a) if in_a else None)
    assert row["jaccard"] == (shared / union if union else None)
    assert row["expected"] == pytest.approx(expected)
    assert row["lift"] == (pytest.approx(shared / expected) if expected else None)
    tail = hypergeom.sf(shared - 1, size, len(in_a), len(in_b))
    assert row["p_value"] == pytest.approx(tail)


def test_losses_and_accuracies_are_of_counted_predicted_tokens(store: Store) -> None:
    made = compare_runs(store, "run-a", "run-b", settings()).analysis
    for row in rows_of(store, made.id):
        assert row["loss_a"] == pytest.approx(7 / 3)
        assert row["loss_b"] == pytest.approx(5.25 / 3)
        assert row["loss_difference"] == pytest.approx(-1.75 / 3)
        assert row["top1_a"] == pytest.approx(1 / 3)
        assert row["top1_b"] == pytest.approx(2 / 3)
        assert row["top1_difference"] == pytest.approx(1 / 3)


def test_the_reference_has_importances_but_no_selections(store: Store) -> None:
    made = compare_runs(store, "run-a", "run-b", settings()).analysis
    selections = ["size_a", "size_b", "shared", "share_of_a", "jaccard", "expected", "lift",
                  "p_value"]  # fmt: skip
    for row in rows_of(store, made.id):
        is_reference = row["task"] == "mixed"
        assert row["correlation"] is not None
        assert (row["size_a"] is None) is is_reference
        if is_reference:
            assert [row[name] for name in selections] == [None] * len(selections)


def test_runs_with_the_same_values_do_not_drift(store: Store) -> None:
    write_run(store, "run-a-again", importances(1))
    made = compare_runs(store, "run-a", "run-a-again", settings()).analysis
    for row in rows_of(store, made.id):
        assert row["correlation"] == 1.0
        assert (row["error_median"], row["error_p90"]) == (0.0, 0.0)
        assert (row["loss_difference"], row["top1_difference"]) == (0.0, 0.0)
        if row["size_a"]:
            assert (row["share_of_a"], row["jaccard"]) == (1.0, 1.0)
            assert row["shared"] == row["size_a"] == row["size_b"]
            assert row["lift"] == pytest.approx(row["population"] / row["size_a"])


def test_opposite_orders_correlate_by_minus_one(store: Store) -> None:
    rising = {key: np.arange(1.0, len(z) + 1) for key, z in importances(1).items()}
    falling = {key: z[::-1].copy() for key, z in rising.items()}
    write_run(store, "rising", rising)
    write_run(store, "falling", falling)
    made = compare_runs(store, "rising", "falling", settings()).analysis
    rows = [row for row in rows_of(store, made.id) if row["layer"] is not None]
    assert {row["correlation"] for row in rows} == {-1.0}
    assert {row["error_median"] for row in rows if row["site"] == "attn"} == {
        np.quantile(np.abs(falling["code", "attn", 0] - rising["code", "attn", 0])
                    / np.maximum(falling["code", "attn", 0], rising["code", "attn", 0]), 0.5)
    }  # fmt: skip


def test_scaling_all_importances_changes_the_error_alone(store: Store) -> None:
    doubled = {key: 2 * z + 2 for key, z in importances(1).items()}
    shifted = {key: z + 1 for key, z in importances(1).items()}
    write_run(store, "doubled", doubled)
    write_run(store, "shifted", shifted)
    made = compare_runs(store, "shifted", "doubled", settings()).analysis
    rows = rows_of(store, made.id)
    assert {row["correlation"] for row in rows} == {1.0}
    assert {(row["error_median"], row["error_p90"]) for row in rows} == {(0.5, 0.5)}


def test_neurons_that_are_all_tied_have_no_correlation(store: Store) -> None:
    write_run(store, "flat", {key: np.ones_like(z) for key, z in importances(1).items()})
    made = compare_runs(store, "run-a", "flat", settings()).analysis
    assert {row["correlation"] for row in rows_of(store, made.id)} == {None}
    assert {row["correlation"] for row in drift_by_task(store, made.id, "abs")} == {None}


def test_swapping_the_runs_mirrors_the_drift(store: Store) -> None:
    forth = rows_of(store, compare_runs(store, "run-a", "run-b", settings()).analysis.id)
    back = rows_of(store, compare_runs(store, "run-b", "run-a", settings()).analysis.id)
    for row, mirrored in zip(forth, back, strict=True):
        for name in ("correlation", "error_median", "error_p90", "shared", "jaccard", "p_value"):
            assert row[name] == pytest.approx(mirrored[name], abs=1e-12), name
        assert row["size_a"] == mirrored["size_b"]
        assert row["loss_difference"] == -mirrored["loss_difference"]


def test_other_tokens_are_noticed(store: Store) -> None:
    write_run(store, "other-text", importances(1), first_token=8)
    same = compare_runs(store, "run-a", "run-b", settings()).analysis
    other = compare_runs(store, "run-a", "other-text", settings()).analysis
    assert {row["same_inputs"] for row in rows_of(store, same.id)} == {True}
    assert {row["same_inputs"] for row in rows_of(store, other.id)} == {False}


def test_the_same_question_is_answered_once_and_the_record_names_both_runs(store: Store) -> None:
    made = compare_runs(store, "run-a", "run-b", settings()).analysis
    paths = [f"analyses/analysis={made.id}/{name}.parquet" for name in ("drift", "persistence")]
    again = compare_runs(store, "run-a", "run-b", settings()).analysis
    other = compare_runs(store, "run-a", "run-b", settings(metrics=["rms"])).analysis
    assert made.is_new
    assert not again.is_new
    assert (again.id, again.files) == (made.id, made.files)
    assert other.id != made.id
    record = store.files.get_json(layout.analysis_manifest_path(made.id))
    shards = [[task, 0] for task in TASKS]
    assert record["run"] == "run-a"
    assert record["parameters"]["run_b"] == "run-b"
    assert record["lineage"] == {
        name: {"run": run, "num_shards": 3, "shards": shards}
        for name, run in (("run_a", "run-a"), ("run_b", "run-b"))
    }
    assert [file["path"] for file in record["files"]] == paths
    assert verify_store(store).problems == []


def test_computing_a_drift_again_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    again = create_store(tmp_path / "again")
    write_run(again, "run-a", importances(1))
    write_run(again, "run-b", importances(2), losses=(1.0, 1.25, 3.0))
    first, second = (compare_runs(s, "run-a", "run-b", settings()).analysis for s in (store, again))
    assert first == second


def test_runs_of_two_stores_drift_as_in_one(store: Store, tmp_path: Path) -> None:
    other = create_store(tmp_path / "other")
    write_run(other, "run-b", importances(2), losses=(1.0, 1.25, 3.0))
    write_run(other, "run-a", importances(2), losses=(1.0, 1.25, 3.0))
    within_one = rows_of(store, compare_runs(store, "run-a", "run-b", settings()).analysis.id)
    for run in ("run-b", "run-a"):  # A run of the same id in another store is another capture.
        made = compare_runs(store, "run-a", run, settings(), store_b=other).analysis
        record = store.files.get_json(layout.analysis_manifest_path(made.id))
        assert record["lineage"]["store_b"] == other.files.root
        ids = {"analysis": None, "run_b": None}
        assert [r | ids for r in rows_of(store, made.id)] == [r | ids for r in within_one]
    assert not other.files.exists("analyses")


def test_what_only_one_run_has_is_left_out_and_named(store: Store) -> None:
    fewer = {key: z for key, z in importances(2).items() if key[0] != "prose" and key[1] == "mlp"}
    write_run(store, "fewer", fewer)
    made = compare_runs(store, "run-a", "fewer", settings())
    assert made.left_out == ("task 'prose' (only in run-a)", "site 'attn' (only in run-a)")
    rows = rows_of(store, made.analysis.id)
    assert {(row["task"], row["site"]) for row in rows} == {("code", "mlp"), ("mixed", "mlp")}


def test_summaries_put_fractions_side_by_side_and_the_least_alike_layers_first(
    store: Store,
) -> None:
    values = importances(1)
    mended = {key: z if key[2] == 0 else importances(2)[key] for key, z in values.items()}
    write_run(store, "half", mended)
    made = compare_runs(store, "run-a", "half", settings(metrics=["freq", "abs"])).analysis
    by_task = drift_by_task(store, made.id, "abs")
    assert [(row["task"], row["site"]) for row in by_task] == [
        (task, site) for task in TASKS for site in ("mlp", "attn")
    ]
    assert {tuple(row["fractions"]) for row in by_task} == {(0.15, 0.3)}
    rows = {(r["task"], r["site"], r["fraction"]): r for r in rows_of(store, made.id)
            if r["layer"] is None and r["metric"] == "abs"}  # fmt: skip
    for row in by_task:
        same = [rows[row["task"], row["site"], fraction] for fraction in (0.15, 0.3)]
        assert row["shares"] == [r["share_of_a"] for r in same]
        assert row["correlation"] == same[0]["correlation"]
    by_layer = drift_by_layer(store, made.id, "abs", 2)
    assert [(row["site"], row["layer"]) for row in by_layer] == [
        ("mlp", 1), ("mlp", 0), ("attn", 1), ("attn", 0),
    ]  # fmt: skip
    assert [row["correlation"] for row in by_layer][1::2] == [1.0, 1.0]
    assert len(drift_by_layer(store, made.id, "abs", 1)) == 2


Change = Callable[[Store], None]


def run_of(*, widths: dict[tuple[str, int], int] = WIDTHS, **changes: Any) -> Change:
    tasks = changes.pop("tasks", TASKS)
    return lambda store: write_run(
        store, "odd", importances(3, widths=widths, tasks=tasks), **changes
    )


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            run_of(tasks=("mixed", "music")),
            (
                "the runs must have a task in common besides the reference 'mixed', found code, "
                "prose in run-a and music in odd: compare runs over the same tasks."
            ),
        ),
        (
            run_of(reference="prose"),
            (
                "both runs must score against the same reference task, found 'mixed' in run-a and "
                "'prose' in odd: compare runs of studies with the same reference."
            ),
        ),
        (
            run_of(reference=None),
            (
                "both runs must score against the same reference task, found 'mixed' in run-a and "
                "none in odd: compare runs of studies with the same reference."
            ),
        ),
        (
            run_of(widths=WIDTHS | {("attn", 2): 8, ("mlp", 2): 20}),
            (
                "both runs must have the same neurons, at site 'attn' found 2 layers in run-a "
                "and 3 in odd: compare runs of models of one shape, captured at the same layers."
            ),
        ),
        (
            run_of(widths={("mlp", 0): 20, ("mlp", 2): 20}),
            (
                "both runs must have the same neurons, at site 'mlp' found layer 1 only in run-a: "
                "compare runs of models of one shape, captured at the same layers."
            ),
        ),
        (
            run_of(widths=WIDTHS | {("mlp", 1): 2000}),
            (
                "both runs must have the same neurons, at site 'mlp' found 20 neurons of layer 1 "
                "in run-a and 2,000 in odd: compare runs of models of one shape, captured at the "
                "same layers."
            ),
        ),
        (
            run_of(widths={("patch", 0): 20}),
            (
                "the sites to compare must be captured by both runs, found attn, mlp in run-a and "
                "patch in odd: choose sites that both have."
            ),
        ),
        (
            run_of(commit=False),
            (
                "the capture of run 'odd' is not complete (2 of 3 shards are committed): finish it "
                "with `actlake capture` first."
            ),
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    store: Store, write: Change, message: str
) -> None:
    write(store)
    with pytest.raises(AnalysisError) as caught:
        compare_runs(store, "run-a", "odd", settings())
    assert str(caught.value) == message
    assert not store.files.exists("analyses")


def test_a_run_is_not_compared_with_itself(store: Store) -> None:
    with pytest.raises(AnalysisError) as caught:
        compare_runs(store, "run-a", "run-a", settings(), store_b=create_store(store.files.root))
    assert str(caught.value) == (
        "the two runs must differ, found 'run-a' twice: name another run to compare with."
    )


def test_a_site_that_one_run_lacks_cannot_be_asked_for(store: Store) -> None:
    write_run(store, "mlp-only", {k: z for k, z in importances(3).items() if k[1] == "mlp"})
    with pytest.raises(AnalysisError, match="found attn, mlp in run-a and mlp in mlp-only: choose"):
        compare_runs(store, "run-a", "mlp-only", settings(sites=["attn"]))


def test_a_run_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match=r"no run 'run-c' in .*: the runs there are: run-a, run-b"):
        compare_runs(store, "run-a", "run-c", settings())


def test_a_fraction_too_small_for_one_neuron_is_refused(store: Store) -> None:
    with pytest.raises(
        AnalysisError, match=r"^fraction 0\.01 selects no neuron: 16 neurons of site"
    ):
        compare_runs(store, "run-a", "run-b", settings(fractions=[0.01]))


FIVE = ("art", "biology", "code", "law", "mixed", "prose")


def share_in_common(values: Importances, task_a: str, task_b: str, row: dict[str, Any]) -> float:
    """The mean of both directions, over the layer of a row or the whole model."""
    a, b = (selected(values, t, row["site"], row["fraction"], "model") for t in (task_a, task_b))
    a, b = ({key for key in side if row["layer"] in (None, key[0])} for side in (a, b))
    return (len(a & b) / max(len(a), 1) + len(a & b) / max(len(b), 1)) / 2


def test_persistence_is_what_permuting_all_orders_of_tasks_finds(tmp_path: Path) -> None:
    store = create_store(tmp_path / "five")
    values = [importances(seed, tasks=FIVE) for seed in (3, 4)]
    for run, its in zip(("run-a", "run-b"), values, strict=True):
        write_run(store, run, its)
    made = compare_runs(store, "run-a", "run-b", settings()).analysis
    rows = store.table("from persistence where analysis = $id", {"id": made.id}).to_pylist()
    assert len(rows) == 2 * 2 * 3
    tasks = [task for task in FIVE if task != "mixed"]
    num_tested = 0
    for row in rows:
        first, second = (
            np.array([[share_in_common(v, a, b, row) for b in tasks] for a in tasks])
            for v in values
        )
        above = np.triu_indices(5, 1)
        assert (row["num_tasks"], row["num_permutations"]) == (5, 120)
        if np.ptp(first[above]) == 0 or np.ptp(second[above]) == 0:
            assert (row["correlation"], row["p_value"]) == (None, None)
        else:
            found = [
                np.corrcoef(first[above], second[np.ix_(order, order)][above])[0, 1]
                for order in permutations(range(5))
            ]
            assert row["correlation"] == pytest.approx(found[0])
            assert row["p_value"] == np.mean([r >= found[0] - 1e-9 for r in found])
            num_tested += 1
        of_layer = store.table(
            "select sum(shared) / sum(size_a) as same, sum(expected) / sum(size_a) as chance, "
            "sum(size_a) as size_a, sum(size_b) as size_b "
            "from drift where analysis = $id and site = $site and fraction = $fraction "
            "and layer is not distinct from $layer",
            {"id": made.id, **{key: row[key] for key in ("site", "fraction", "layer")}},
        ).to_pylist()[0]
        assert row["same_neurons"] == pytest.approx(of_layer["same"])
        assert row["same_by_chance"] == pytest.approx(of_layer["chance"])
        assert row["lift"] == pytest.approx(of_layer["same"] / of_layer["chance"])
    assert num_tested > 6
    for side in ("selected_a", "selected_b"):
        layers = [row[side] for row in rows if row["layer"] is not None]
        assert sum(layers) == pytest.approx(2 * 2)
        assert {row[side] for row in rows if row["layer"] is None} == {1.0}


def test_a_run_persists_in_itself_and_two_tasks_say_nothing(store: Store) -> None:
    write_run(store, "again", importances(1))
    made = compare_runs(store, "run-a", "again", settings()).analysis
    rows = store.table("from persistence where analysis = $id", {"id": made.id}).to_pylist()
    assert {row["same_neurons"] for row in rows if row["same_neurons"] is not None} == {1.0}
    assert {(row["num_tasks"], row["correlation"], row["p_value"]) for row in rows} == {
        (2, None, None)
    }


def test_many_tasks_are_permuted_at_random_and_the_same_way_each_time() -> None:
    random = np.random.default_rng(0)
    first = random.random((3, 45))
    second = np.stack([first[0] + 0.1 * random.random(45), random.random(45), np.full(45, 0.3)])
    found = mantel_test(first, second, 10)
    assert found[2] == MOST_PERMUTATIONS
    assert found[0][0] == pytest.approx(np.corrcoef(first[0], second[0])[0, 1])
    assert found[1][0] == 1 / MOST_PERMUTATIONS
    assert 0.01 < found[1][1] < 1
    assert np.isnan([found[0][2], found[1][2]]).all()
    for again, before in zip(mantel_test(first, second, 10), found, strict=True):
        np.testing.assert_array_equal(again, before)
