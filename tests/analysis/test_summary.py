"""What a summary and the pictures are made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from analysis import AnalysisError, AnalysisSettings, analyse_run
from analysis.figures import draw_layers, draw_overlap, save_figures
from analysis.summary import newest_analysis
from storage import layout


def made_at(run: Any, settings: AnalysisSettings, created: str) -> str:
    """Id of a new analysis, as if it had been made at some time."""
    made = analyse_run(run.store, run.id, settings)
    path = layout.analysis_manifest_path(made.id)
    manifest = run.store.files.get_json(path)
    run.store.files.put_json(path, manifest | {"created": created})
    return made.id


def test_the_last_analysis_is_meant_whatever_its_id(captured: Any) -> None:
    times = ["2026-03-01 10:00:00", "2026-03-02 09:00:00", "2026-02-01 23:00:00"]
    ids = [
        made_at(captured, AnalysisSettings(fractions=[0.5], seed=seed), time)
        for seed, time in enumerate(times)
    ]
    assert newest_analysis(captured.store, captured.id).analysis == ids[1]


def test_abs_and_the_smallest_fraction_are_shown_unless_others_are_asked_for(
    captured: Any,
) -> None:
    settings = AnalysisSettings(metrics=["rms", "abs", "freq"], fractions=[0.5, 0.1])
    analyse_run(captured.store, captured.id, settings, reference="prose")
    view = newest_analysis(captured.store, captured.id)
    assert (view.metric, view.fraction, view.reference) == ("abs", 0.1, "prose")
    assert (view.within, view.sites) == ("model", ("attn", "mlp"))
    other = newest_analysis(captured.store, captured.id, metric="freq", fraction=0.5)
    assert (other.metric, other.fraction) == ("freq", 0.5)
    with pytest.raises(AnalysisError, match=r"has \(abs, freq, rms\), found 'std'\.$"):
        newest_analysis(captured.store, captured.id, metric="std")


def test_the_profile_counts_every_layer_and_sums_to_the_selection(captured: Any) -> None:
    analyse_run(captured.store, captured.id, AnalysisSettings(fractions=[0.1]))
    rows = newest_analysis(captured.store, captured.id).layer_profile()
    assert len(rows) == 3 * (2 + 3)
    assert 0 in {row["num_selected"] for row in rows}
    for site, size in (("attn", 1), ("mlp", 5)):
        for task in captured.tasks[:-1]:
            of_task = [r for r in rows if (r["site"], r["task"]) == (site, task)]
            assert [row["layer"] for row in of_task] == list(range(2 + (site == "mlp")))
            assert sum(row["num_selected"] for row in of_task) == size


def test_top_neurons_are_the_highest_scores_with_their_importance(captured: Any) -> None:
    analyse_run(captured.store, captured.id, AnalysisSettings(fractions=[0.5]))
    rows = newest_analysis(captured.store, captured.id).top_neurons(2)
    assert len(rows) == 2 * 2 * 3
    best = captured.store.sql(
        "select layer, neuron, score, importance from scores join importance "
        "using (task, site, layer, neuron) where task = 'prose' and site = 'mlp' "
        "order by score desc limit 2"
    ).fetchall()
    assert best == [
        (row["layer"], row["neuron"], row["score"], row["importance"])
        for row in rows
        if (row["task"], row["site"]) == ("prose", "mlp")
    ]


def test_pictures_show_the_numbers_of_the_analysis(captured: Any, tmp_path: Path) -> None:
    analyse_run(captured.store, captured.id, AnalysisSettings(fractions=[0.5]))
    view = newest_analysis(captured.store, captured.id)
    panel = next(a for a in draw_overlap(view).axes if a.get_title() == "site mlp")
    names = [label.get_text() for label in panel.get_xticklabels()]
    assert names == ["code", "numbers", "prose"]
    shares = {(r["task_a"], r["task_b"]): r["share_of_a"] for r in view.overlap()
              if r["site"] == "mlp"}  # fmt: skip
    shown = {
        (names[int(text.get_position()[1])], names[int(text.get_position()[0])]): text.get_text()
        for text in panel.texts
    }
    assert shown == {pair: f"{100 * share:.0f}" for pair, share in shares.items()}
    lines = next(a for a in draw_layers(view).axes if a.get_title() == "site mlp").get_lines()
    for line in lines[:3]:
        assert sum(line.get_ydata()) == pytest.approx(100)
    for path in save_figures(view, tmp_path / "new" / "pictures"):
        assert matplotlib.image.imread(path).shape[2] == 4


def test_a_single_task_has_a_profile_and_no_matrix(
    new_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = new_run(tasks=("code", "mixed"))
    analyse_run(run.store, run.id, AnalysisSettings(fractions=[0.5]))
    view = newest_analysis(run.store, run.id)
    assert view.overlap() == []
    assert save_figures(view, tmp_path / "pictures") == [tmp_path / "pictures" / "layers.png"]
