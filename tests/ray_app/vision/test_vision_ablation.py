"""Images through ablated models: by class, after deaths of workers, and as a checkpoint of timm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml

from analysis import AblationSettings
from ray_app.ablation.curves import pruning_curves
from ray_app.capture.scheduling import Scheduler
from ray_app.commands import ablation as commands
from ray_app.models.loading import load_architecture, locate_model
from ray_app.run import Run
from ray_app.study import ModelSettings
from storage import verify_store

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ablated_classes_survive_deaths_and_leave_as_a_checkpoint(
    write_vision_study: Callable[..., Path],
    write_images: Callable[..., Path],
    capture_locally: Callable[..., Run],
    tmp_path: Path,
    draw: Callable[..., Any],
    open_engine: Callable[..., Any],
    inline_calls: Any,
    inline_pipeline: Any,
) -> None:
    path = write_vision_study("timm")
    run = capture_locally(path)
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    # The same images in another file: the capture's choice among its own says nothing of them.
    others = write_images(name="others.parquet")
    path.write_text(
        yaml.safe_dump(study | {"evaluation": {"data_files": str(others), "tokens": 200}}),
        encoding="utf-8",
    )
    samples = draw(run, path)
    settings = AblationSettings(
        tasks=["fish"], fractions=[0.3], kinds=["mean"], seeds=1, sites=["mlp"]
    )
    pipelines = []

    def dying(*stages: Any) -> Scheduler:
        pipelines.append(inline_pipeline(*stages, dies_at={2, 5}))
        return Scheduler(pipelines, inline_calls, max_deaths=4)

    opener = open_engine(run, samples, range(1), range(1, 4), make_workers=dying)
    pruning_curves(run, samples, settings, opener)
    assert pipelines[0].num_revivals > 0
    plain = open_engine(run, samples)
    rows = run.store.table("from evaluations where chosen_by = 'score'").to_pylist()
    with plain(reference="all", kinds=["mean"]) as engine:
        # Neurons of one and the same selection, evaluated without deaths in one stage.
        again = pruning_curves(run, samples, settings.model_copy(update={"seeds": 0}), plain)
        assert engine.unpruned(["fish"])["fish"].sums["n"].sum() == 12
    undisturbed = run.store.table(
        "from evaluations where chosen_by = 'score' and analysis = $analysis",
        {"analysis": again.id},
    ).to_pylist()
    for row in (*rows, *undisturbed):
        del row["analysis"]
    assert rows == undisturbed
    assert verify_store(run.store).problems == []

    whole = next(row for row in rows if row["evaluated"] == "fish" and row["label"] is None)
    classes = [row for row in rows if row["evaluated"] == "fish" and row["label"] is not None]
    assert {row["label"] for row in classes} == {"trout", "shark"}
    assert sum(row["n"] for row in classes) == whole["n"] == 12
    assert sum(row["n"] * row["top1_share"] for row in classes) == pytest.approx(
        12 * whole["top1_share"]
    )
    assert (whole["n_uncommon"], whole["top1_uncommon"]) == (0, None)
    assert whole["loss_change"] != 0

    out = tmp_path / "pruned"
    commands.prune(
        str(run.store.files.root), None, task="fish", fraction=0.3, out=out, reference=None,
        options={"sites": ["mlp"]},
    )  # fmt: skip
    zero = settings.model_copy(update={"kinds": ["zero"], "seeds": 0})
    made = pruning_curves(run, samples, zero, plain)
    query = (
        "from evaluations where analysis = $analysis and task = 'fish' and evaluated = 'fish' "
        "and label is null"
    )
    (expected,) = run.store.table(query, {"analysis": made.id}).to_pylist()
    exported = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    settings_of = ModelSettings(source=str(out))
    reader: Any = load_architecture(settings_of, locate_model(settings_of))
    losses = []
    for row in run.store.table("from evaluation_samples where task = 'fish'").to_pylist():
        with torch.no_grad():
            logits = exported(reader.reader(row["image"])[None])
        losses.append(float(logits.logsumexp(1)[0] - logits[0, row["label_id"]]))
    assert np.mean(losses) == pytest.approx(expected["mean_loss"], rel=1e-5)
