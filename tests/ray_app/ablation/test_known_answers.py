"""A model whose neurons are known: selections find them, and pruning them kills one task alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from analysis import AblationSettings, AnalysisError, CrossSettings
from analysis.overlap import run_parameters
from analysis.selection import random_like
from ray_app.ablation.crossing import cross_evaluate
from ray_app.ablation.curves import pruning_curves, rank_run
from ray_app.ablation.masks import UNPRUNED, Ablation
from ray_app.commands import ablation as commands
from ray_app.models.errors import ModelError
from ray_app.run import Run
from ray_app.study import StudyError

LAYERS = {"a": 0, "b": 1}
FRACTION = 8 / 48
"""As many neurons as carry one task, of those at site mlp."""


def one(run: Run, query: str) -> dict[str, Any]:
    (row,) = run.store.table(query).to_pylist()
    return row


def test_selection_finds_the_carriers_and_their_removal_kills_their_task_alone(
    known_run: Run,
    carriers: dict[str, np.ndarray],
    draw: Callable[..., Any],
    open_engine: Callable[..., Any],
) -> None:
    settings = AblationSettings(
        fractions=[FRACTION / 2, FRACTION],
        sites=["mlp"],
        kinds=["zero", "mean", "peak", "resample"],
        every_task=True,
        seeds=2,
    )
    parameters = run_parameters(known_run.record, settings, None)
    for task, ranking in rank_run(known_run, parameters).items():
        found = ranking.top(FRACTION)
        assert found.keys() == {("mlp", LAYERS[task])}
        assert found["mlp", LAYERS[task]].tolist() == carriers[task].tolist()
        with pytest.raises(AnalysisError, match=r"fraction 0\.01 selects no neuron: 48 neurons"):
            ranking.top(0.01)

    samples = draw(known_run)
    opener = open_engine(known_run, samples)
    made = pruning_curves(known_run, samples, settings, opener)
    rows = known_run.store.table(
        "select * from evaluations where chosen_by <> 'random' and label_id is null"
    ).to_pylist()
    unpruned = {row["evaluated"]: row for row in rows if row["task"] is None}
    # <s> precedes nothing here, so every counted prediction follows a token of a cycle.
    assert {task: row["top1_share"] for task, row in unpruned.items()} == dict.fromkeys("ab", 1) | {
        "both": 1
    }
    for row in rows:
        if row["task"] is None or row["fraction"] != FRACTION or row["kind"] == "resample":
            continue
        if row["evaluated"] == row["task"]:
            assert row["top1_share"] == 0, row
        elif row["evaluated"] != "both":
            same = {
                name: row[name]
                for name in ("n", "mean_loss", "top1_share", "top10_share", "loss_change")
            }
            assert row["kind"] != "zero" or same == {
                name: unpruned[row["evaluated"]][name] for name in same
            }
    # Two controls that miss a layer's carriers, or hit some: never all of them.
    effect = one(
        known_run,
        "from ablation_effects where task = 'a' and evaluated = 'a' and measure = 'top1' "
        f"and kind = 'zero' and fraction = {FRACTION}",
    )
    assert effect["selected_change"] == -1
    assert effect["excess"] < 0
    assert effect["num_random"] == 2
    curve = one(
        known_run,
        "from selectivity where task = 'a' and retained = 'b' and measure = 'top1' "
        "and kind = 'zero' and chosen_by = 'score'",
    )
    assert (curve["max_difference"], curve["area_ratio"]) == (100, 2)
    again = pruning_curves(known_run, samples, settings, opener)
    assert (again.id, again.is_new) == (made.id, False)


def test_iterative_selection_keeps_what_it_removed_and_goes_on_from_the_ablated_model(
    known_run: Run, draw: Callable[..., Any], open_engine: Callable[..., Any]
) -> None:
    samples = draw(known_run)
    settings = AblationSettings(
        tasks=["a"], fractions=[FRACTION / 2, FRACTION], sites=["mlp"], iterative=True, seeds=0
    )
    pruning_curves(known_run, samples, settings, open_engine(known_run, samples))
    rows = known_run.store.table(
        "select top1_share from evaluations where task = 'a' and evaluated = 'a' order by fraction"
    ).to_pylist()
    assert [row["top1_share"] for row in rows] == [0.5, 0]


def test_stages_compute_what_the_whole_model_does_and_controls_match_by_layer(
    known_run: Run, draw: Callable[..., Any], open_engine: Callable[..., Any]
) -> None:
    samples = draw(known_run)
    widths = {(s["site"], s["layer"]): s["width"] for s in known_run.record["sites"]}
    neurons = {("attn", 1): np.array([3]), ("mlp", 0): np.arange(5), ("mlp", 1): np.arange(9, 20)}
    drawn = [random_like(neurons, widths, seed=seed, name="a") for seed in range(3)]
    for control in drawn:
        assert {key: len(set(chosen.tolist())) for key, chosen in control.items()} == {
            key: len(chosen) for key, chosen in neurons.items()
        }
        assert all(chosen.max() < widths[key] for key, chosen in control.items())
    assert len({str(control) for control in drawn}) == 3
    smaller = random_like({("mlp", 1): np.arange(4)}, widths, seed=0, name="a")
    assert set(smaller["mlp", 1].tolist()) < set(drawn[0]["mlp", 1].tolist())

    measured = []
    for cut in ([range(2)], [range(1), range(1, 2)]):
        opener = open_engine(known_run, samples, *cut)
        with opener(reference="both", kinds=["peak"]) as engine:
            asked: list[tuple[Ablation, str]] = [(UNPRUNED, "both")]
            for kind in ("zero", "mean", "peak", "resample"):
                asked.append((engine.ablation(kind, neurons, seed=1), "both"))
            scores = engine.evaluate(asked)
            stats = engine.recapture(asked[1][0], ["a", "both"])
        measured.append(
            (
                scores,
                stats.sort_by(
                    [(n, "ascending") for n in ("task", "shard", "site", "layer", "neuron")]
                ),
            )
        )
    (whole, stats), (cut_up, stats_cut_up) = measured
    assert stats.equals(stats_cut_up)
    for ours, theirs in zip(whole, cut_up, strict=True):
        for name, values in ours.sums.items():
            assert np.array_equal(values, theirs.sums[name]), name
    assert len({str(scores.sums["loss"]) for scores in whole}) == 5


def test_bisection_takes_the_fewest_neurons_that_reach_the_target(
    known_run: Run, draw: Callable[..., Any], open_engine: Callable[..., Any]
) -> None:
    samples = draw(known_run)
    opener = open_engine(known_run, samples)
    # Each neuron carries an eighth of its task, so two of them are the first to reach 0.8.
    cross_evaluate(known_run, samples, CrossSettings(sites=["mlp"], upper=0.5), opener)
    rows = known_run.store.table("from cross_evaluations").to_pylist()
    ratios = {(row["task"], row["evaluated"]): row["ratio"] for row in rows}
    for task, other in (("a", "b"), ("b", "a")):
        assert ratios[task, task] == pytest.approx(0.75)
        assert ratios[task, other] == 1
    assert {row["num_removed"] for row in rows} == {2}
    # Attention's neurons write nothing, so no number of them makes the task fall.
    made = cross_evaluate(known_run, samples, CrossSettings(sites=["attn"]), opener)
    query = "from cross_evaluations where analysis = $analysis"
    for row in known_run.store.table(query, {"analysis": made.id}).to_pylist():
        assert (row["reached"], row["fraction"], row["ratio"]) == (False, 1, 1)
    with pytest.raises(AnalysisError, match=r"fraction 0\.005 selects no neuron"):
        cross_evaluate(known_run, samples, CrossSettings(upper=0.005), opener)


def test_evaluation_samples_are_those_that_the_capture_left(
    known_run: Run, draw: Callable[..., Any], tmp_path: Path
) -> None:
    samples = draw(known_run)
    query = "select count(*) as n from {} where run = '{}'"
    assert one(known_run, query.format("evaluation_samples", known_run.id))["n"] == 8 + 8 + 8
    used = {
        (row["task"], row["source"])
        for row in known_run.store.table("select task, source from samples").to_pylist()
    }
    drawn = {
        (row["task"], row["source"])
        for row in known_run.store.table("select task, source from evaluation_samples").to_pylist()
    }
    members = {task: {s.split("/")[-1] for t, s in used if task in (t, s[0])} for task in "ab"}
    assert len(drawn) == 24
    for task, source in drawn:
        name = task if task in members else source[0]
        assert source.split("/")[-1] not in members[name]
    assert draw(known_run) == samples
    study = (tmp_path / "known.yaml").read_text(encoding="utf-8")
    other = tmp_path / "other.yaml"
    other.write_text(f"{study}\nevaluation: {{tokens: 100000}}\n", encoding="utf-8")
    more = draw(known_run, other)
    # Twelve of each went into the capture; tasks take what is left, and leave the mixture nothing.
    assert "both" not in more.shards
    assert "note: the evaluation documents of a end at 108 of the 100,000" in more.notes[0]
    with pytest.raises(StudyError, match="task 'both' has no documents to evaluate on"):
        more.of("both")


def test_an_exported_checkpoint_scores_the_same_in_plain_transformers(
    known_run: Run,
    tmp_path: Path,
    draw: Callable[..., Any],
    open_engine: Callable[..., Any],
) -> None:
    samples = draw(known_run)
    settings = AblationSettings(fractions=[FRACTION / 2], sites=["mlp"], seeds=0)
    pruning_curves(known_run, samples, settings, open_engine(known_run, samples))
    out = tmp_path / "pruned"
    export = {"task": "a", "fraction": FRACTION / 2, "out": out, "reference": None}
    root = str(known_run.store.files.root)
    commands.prune(root, None, **export, options={"sites": ["mlp"]})
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    losses = []
    rows = known_run.store.table("from evaluation_samples where task = 'a'").to_pylist()
    for row in rows:
        ids = torch.tensor([row["token_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses += cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    expected = one(known_run, "from evaluations where task = 'a' and evaluated = 'a'")
    assert len(losses) == expected["n"]
    assert np.mean(losses) == pytest.approx(expected["mean_loss"], rel=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(out).encode("a0 b1") == [2, 11]
    with pytest.raises(AnalysisError, match="kind must be zero, mean or peak"):
        commands.prune(root, None, **export, options={"kind": "resample"})
    with pytest.raises(ModelError, match="--out must not exist yet"):
        commands.prune(root, None, **export, options={})
    with pytest.raises(ModelError, match=r"only --kind zero .*o_proj has no bias"):
        commands.prune(root, None, **export | {"out": tmp_path / "mean"}, options={"kind": "mean"})
    with pytest.raises(AnalysisError, match=r"target must be in \(0, 1\).*, found 1\.2"):
        commands.crosseval(
            root, None, study=None, tokens=None, reference=None, options={"target": 1.2}
        )
