"""Analyses of a run as they are kept: one per question, with their lineage, seen when complete."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from analysis import AnalysisError, AnalysisSettings, analyse_run
from storage import StoreError, StoreFiles, layout, open_store, verify_store

SETTINGS = AnalysisSettings(fractions=[0.1, 0.5])
TABLES = ("importance", "scores", "selections", "overlap")


def test_the_same_question_is_answered_once(captured: Any) -> None:
    first = analyse_run(captured.store, captured.id, SETTINGS)
    told: list[str] = []
    again = analyse_run(
        captured.store,
        captured.id,
        AnalysisSettings(metrics=["abs", "abs"], fractions=[0.5, 0.1, 0.1], sites=["mlp", "attn"]),
        reference="mixed",
        on_step=told.append,
    )
    assert (first.is_new, again.is_new) == (True, False)
    assert (again.id, again.files) == (first.id, first.files)
    assert told == []
    assert captured.store.sql("select count(*) from analyses").fetchall() == [(1,)]


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": ["rms"]},
        {"fractions": [0.1]},
        {"within": "layer", "fractions": [0.2, 0.5]},
        {"sites": ["mlp"]},
        {"eps": {"attn": 0.5}},
        {"seed": 1},
        {"reference": "code"},
    ],
    ids=str,
)
def test_another_parameter_is_another_analysis(captured: Any, change: dict[str, Any]) -> None:
    first = analyse_run(captured.store, captured.id, SETTINGS)
    reference = change.pop("reference", None)
    settings = SETTINGS.model_copy(update=change)
    other = analyse_run(captured.store, captured.id, settings, reference=reference)
    assert other.is_new
    assert other.id != first.id
    ids = captured.store.sql("select distinct analysis from overlap order by 1").fetchall()
    assert ids == [(name,) for name in sorted((first.id, other.id))]


def test_made_again_elsewhere_the_tables_are_the_same_bytes(new_run: Callable[..., Any]) -> None:
    settings = AnalysisSettings(metrics=["abs", "rand", "mean"], fractions=[0.1, 0.5])
    made = []
    for name in ("one", "two"):
        run = new_run(name)
        made.append(analyse_run(run.store, run.id, settings))
        for file in made[-1].files:
            assert run.store.files.sha256(file.path) == file.sha256
    assert made[0] == made[1]
    assert [file.table for file in made[0].files] == list(TABLES)


def test_the_manifest_says_how_the_analysis_came_about(captured: Any) -> None:
    made = analyse_run(captured.store, captured.id, SETTINGS)
    manifest = captured.store.files.get_json(layout.analysis_manifest_path(made.id))
    assert manifest["parameters"] == {
        "reference": "mixed",
        "sites": ["attn", "mlp"],
        "metrics": ["abs"],
        "fractions": [0.1, 0.5],
        "within": "model",
        "eps": {"mlp": 1e-3, "attn": 1e-4},
        "seed": 0,
    }
    assert manifest["lineage"] == {
        "num_shards": 8,
        "shards": [[task, shard] for task in sorted(captured.tasks) for shard in (0, 1)],
    }
    assert (manifest["analysis"], manifest["run"]) == (made.id, captured.id)


def test_rows_are_as_many_as_the_grain_says(captured: Any) -> None:
    made = analyse_run(captured.store, captured.id, SETTINGS)
    selected = 3 * (1 + 6 + 5 + 25)  # Of 12 attn and 50 mlp neurons, at 0.1 and 0.5.
    assert {file.table: file.rows for file in made.files} == {
        "importance": 4 * 62,
        "scores": 3 * 62,
        "selections": selected,
        "overlap": 3 * 2 * 2 * ((2 + 1) + (3 + 1)),
    }
    for file in made.files:
        rows = captured.store.sql(f"select count(*) from {file.table}").fetchall()
        assert rows == [(file.rows,)]


def test_nothing_is_seen_of_an_analysis_that_was_stopped_before_its_manifest(
    captured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(files: StoreFiles, path: str, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreFiles, "put_json", stop)
        with pytest.raises(KeyboardInterrupt):
            analyse_run(captured.store, captured.id, SETTINGS)
    assert len(captured.store.files.list("analyses/*/*.parquet")) == len(TABLES)
    for view in (*TABLES, "analyses"):
        assert open_store(captured.store.files.root).sql(f"from {view}").fetchall() == []
    made = analyse_run(captured.store, captured.id, SETTINGS)
    assert made.is_new
    assert captured.store.sql("select count(*) from scores").fetchall() == [(3 * 62,)]


def test_an_analysis_reads_the_run_that_is_meant_and_no_other(new_run: Callable[..., Any]) -> None:
    run = new_run()
    alone = analyse_run(run.store, run.id, SETTINGS)
    shared = new_run("shared")
    other = type(shared)(shared.store.files.local(""))
    other.id = "run-2"
    for task in other.tasks:
        other.add(task, 7)
    other.finish()
    beside = analyse_run(shared.store, shared.id, SETTINGS)
    assert beside == alone
    assert analyse_run(shared.store, "run-2", SETTINGS).id != alone.id


def test_a_capture_that_is_not_complete_is_refused(unfinished: Any) -> None:
    with pytest.raises(AnalysisError) as caught:
        analyse_run(unfinished.store, unfinished.id, SETTINGS)
    assert str(caught.value) == (
        "the capture of run 'run-1' is not complete (4 of 8 shards are committed): finish it, or "
        "pass --partial to analyse what there is."
    )
    assert unfinished.store.files.list("analyses/**/*") == []


def test_what_there_is_can_be_analysed_and_is_another_analysis_than_the_whole(
    unfinished: Any,
) -> None:
    early = analyse_run(unfinished.store, unfinished.id, SETTINGS, partial=True)
    manifest = unfinished.store.files.get_json(layout.analysis_manifest_path(early.id))
    assert manifest["lineage"]["shards"] == [[task, 0] for task in sorted(unfinished.tasks)]
    for task in unfinished.tasks:
        unfinished.add(task, 1)
    whole = analyse_run(unfinished.store, unfinished.id, SETTINGS, partial=True)
    assert whole.is_new
    assert whole.id != early.id


def test_a_task_without_any_shard_is_refused_even_as_part(unfinished: Any) -> None:
    unfinished.store.files.local(layout.commit_path("run-1", "prose", 0)).unlink()
    with pytest.raises(AnalysisError) as caught:
        analyse_run(unfinished.store, unfinished.id, SETTINGS, partial=True)
    assert str(caught.value) == (
        "task 'prose' of run 'run-1' has no committed shard yet: capture more first."
    )


def test_an_unknown_reference_is_refused(captured: Any) -> None:
    with pytest.raises(AnalysisError) as caught:
        analyse_run(captured.store, captured.id, SETTINGS, reference="verse")
    assert str(caught.value) == (
        "reference must be a task of the run 'run-1', found 'verse': choose one of code, prose, "
        "numbers, mixed."
    )


def test_a_site_that_was_not_captured_is_refused(captured: Any) -> None:
    record = captured.store.run_record(captured.id)
    record["sites"] = [site for site in record["sites"] if site["site"] == "mlp"]
    captured.store.files.put_json(layout.run_path(captured.id), record)
    with pytest.raises(AnalysisError) as caught:
        analyse_run(captured.store, captured.id, AnalysisSettings(sites=["mlp", "attn"]))
    assert str(caught.value) == (
        "sites must be among those that the run captured (mlp), found 'attn'."
    )


def test_a_run_of_the_reference_alone_cannot_be_compared(new_run: Callable[..., Any]) -> None:
    run = new_run(tasks=("mixed",))
    with pytest.raises(AnalysisError, match="'run-1' has no task besides its reference: nothing"):
        analyse_run(run.store, run.id, SETTINGS)


def test_a_run_of_one_task_and_its_reference_has_scores_and_no_pairs(
    new_run: Callable[..., Any],
) -> None:
    run = new_run(tasks=("code", "mixed"))
    made = analyse_run(run.store, run.id, SETTINGS)
    assert {file.table: file.rows for file in made.files} == {
        "importance": 2 * 62, "scores": 62, "selections": 1 + 6 + 5 + 25, "overlap": 0,
    }  # fmt: skip


def test_a_fraction_too_small_for_a_site_writes_nothing(captured: Any) -> None:
    with pytest.raises(AnalysisError) as caught:
        analyse_run(captured.store, captured.id, AnalysisSettings(fractions=[0.05]))
    assert str(caught.value) == (
        "fraction 0.05 selects no neuron: 12 neurons of site 'attn' can be chosen from; the "
        "smallest fraction is 0.084."
    )
    assert captured.store.files.list("analyses/**/*") == []


@pytest.mark.parametrize("within", ["model", "layer"])
def test_the_smallest_fraction_that_is_named_works(captured: Any, within: Any) -> None:
    settings = AnalysisSettings(fractions=[0.01], within=within)
    with pytest.raises(AnalysisError) as caught:
        analyse_run(captured.store, captured.id, settings)
    smallest = float(str(caught.value).removesuffix(".").split()[-1])
    settings = AnalysisSettings(fractions=[smallest], within=within)
    made = analyse_run(captured.store, captured.id, settings)
    assert made.is_new
    smallest_size = "select min(size_a) from overlap where site = 'attn' and layer is null"
    assert captured.store.sql(smallest_size).fetchall() == [(1 if within == "model" else 2,)]


def test_a_run_that_is_not_there_is_refused(captured: Any) -> None:
    with pytest.raises(StoreError, match=r"no run 'run-9' in .*: the runs there are: run-1"):
        analyse_run(captured.store, "run-9", SETTINGS)


def test_an_altered_table_is_named_by_verify(captured: Any) -> None:
    made = analyse_run(captured.store, captured.id, SETTINGS)
    path = f"{layout.analysis_folder(made.id)}/overlap.parquet"
    file = captured.store.files.local(path)
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    problems = verify_store(captured.store).problems
    assert any(path in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": [0.1, 0]}, r"each fraction must be in \(0, 1\], found 0"),
        ({"fractions": [1.5]}, r"each fraction must be in \(0, 1\], found 1.5"),
        ({"fractions": [float("nan")]}, r"each fraction must be in \(0, 1\], found nan"),
        ({"fractions": []}, "at least 1 item"),
        ({"metrics": []}, "at least 1 item"),
        ({"metrics": ["max"]}, "'abs', 'rms', 'std', 'sqrt', 'freq', 'mean' or 'rand'"),
        ({"within": "head"}, "'model' or 'layer'"),
        ({"sites": ["mlp", "up"]}, "'mlp' or 'attn'"),
        ({"eps": {"mlp": 0}}, "greater than 0"),
        ({"eps": {"attn": float("inf")}}, "finite"),
        ({"eps": {"up": 1}}, "'mlp' or 'attn'"),
        ({"fraction": [0.1]}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AnalysisSettings.model_validate(change)
