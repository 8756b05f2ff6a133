"""A captured run of images says of every neuron and image what the plain model does."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.nn.functional import cross_entropy

from analysis.neuron import open_neuron
from analysis.summary import task_accuracy
from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.recompute import recompute_samples
from ray_app.run import Run, begin_run
from ray_app.study import load_study
from storage import create_store, verify_store

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "timm": ("blocks.{}.mlp.fc2", "blocks.{}.attn.proj"),
    "timm-registers": ("blocks.{}.mlp.fc2", "blocks.{}.attn.proj"),
    "timm-distilled": ("blocks.{}.mlp.fc2", "blocks.{}.attn.proj"),
    "vit": ("vit.layers.{}.mlp.fc2", "vit.layers.{}.attention.o_proj"),
    "deit": ("deit.layers.{}.mlp.fc2", "deit.layers.{}.attention.o_proj"),
    "dinov2": ("dinov2.encoder.layer.{}.mlp.fc2", "dinov2.encoder.layer.{}.attention.o_proj"),
}
"""Modules whose inputs are the sites mlp and attn."""

PREFIXES = {
    "timm": ["[CLS]"],
    "timm-registers": ["[CLS]", "[REG]", "[REG]"],
    "timm-distilled": ["[CLS]", "[DIST]"],
    "vit": ["[CLS]"],
    "deit": ["[CLS]", "[DIST]"],
    "dinov2": ["[CLS]"],
}


def plain_model(
    kind: str, folder: Path
) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor]]:
    """The original model and its evaluation transform, without anything of actlake."""
    if kind.startswith("timm"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return model, create_transform(**resolve_data_config({}, model=model))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    return model, lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]


def run_plainly(
    kind: str, folder: Path, rows: list[dict[str, Any]]
) -> tuple[dict[tuple[str, int], np.ndarray], torch.Tensor]:
    """Inputs of both sites, (positions, neurons) by site and layer, and logits of all images."""
    model, transform = plain_model(kind, folder)
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for site, pattern in zip(("mlp", "attn"), KINDS[kind], strict=True):
        for layer in range(4):
            model.get_submodule(pattern.format(layer)).register_forward_pre_hook(
                lambda _, args, key=(site, layer): found.setdefault(key, []).append(args[0])
            )
    images = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    with torch.no_grad():
        output = [model(transform(image)[None]) for image in images]
    logits = torch.cat([getattr(each, "logits", each) for each in output])
    return {key: torch.cat(z).flatten(0, 1).double().numpy() for key, z in found.items()}, logits


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_and_predictions_are_those_of_the_plain_model(
    write_vision_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    vision_folder: Callable[[str], Path],
    kind: str,
) -> None:
    kept = ["capture.pooled=[max, mean]", "capture.values={encoding: float32}"]
    run = capture_locally(write_vision_study(kind), None, *kept)
    assert run.record["model"]["modality"] == "image"
    for task in ("crabs", "fish", "all"):
        key = {"run": run.id, "task": task}
        rows = (
            run.store.sql("from samples where run = $run and task = $task order by sample", key)
            .to_arrow_table()
            .to_pylist()
        )
        wanted = {"crabs": {"crab"}, "fish": {"trout", "shark"}}.get(task)
        assert wanted is None or {row["label"] for row in rows} == wanted
        activations, logits = run_plainly(kind, vision_folder(kind), rows)
        check_statistics(run, task, activations)
        check_pooled(run, task, activations)
        check_top(run, task, activations)
        check_values(run, task, activations)
        check_predictions(run, task, rows, logits)


def check_statistics(run: Run, task: str, activations: dict[tuple[str, int], np.ndarray]) -> None:
    for (site, layer), z in activations.items():
        found = run.store.sql(
            "from neuron_stats where run = $run and task = $task and site = $site "
            "and layer = $layer order by neuron",
            {"run": run.id, "task": task, "site": site, "layer": layer},
        ).fetchnumpy()
        assert set(found["n"]) == {len(z)}
        slack = 2e-6 * np.abs(z).max(0)
        for name, expected in {
            "mean": z.mean(0), "std": z.std(0), "rms": np.sqrt(np.square(z).mean(0)),
            "abs": np.abs(z).mean(0), "min": z.min(0), "max": z.max(0),
        }.items():  # fmt: skip
            difference = np.abs(found[name] - expected)
            assert (difference <= 5e-5 * np.abs(expected) + slack).all(), (site, layer, name)
        if site == "attn":
            assert set(np.asarray(found["head"])) == set(range(3))


def check_pooled(run: Run, task: str, activations: dict[tuple[str, int], np.ndarray]) -> None:
    for (site, layer), z in activations.items():
        found = run.store.sql(
            "from pooled_activations where run = $run and task = $task and site = $site "
            "and layer = $layer order by sample, neuron",
            {"run": run.id, "task": task, "site": site, "layer": layer},
        ).fetchnumpy()
        num_samples = len(set(found["sample"]))
        by_sample = z.reshape(num_samples, -1, z.shape[1])
        slack = 2e-6 * np.abs(z).max()
        for name, expected in {"max": by_sample.max(1), "mean": by_sample.mean(1)}.items():
            values = found[name].reshape(num_samples, -1)
            np.testing.assert_allclose(values, expected, rtol=0, atol=slack, err_msg=name)


def check_top(run: Run, task: str, activations: dict[tuple[str, int], np.ndarray]) -> None:
    """Values are those of the plain model, and lie where it has them."""
    for (site, layer), z in activations.items():
        found = run.store.sql(
            "from top_activations where run = $run and task = $task and site = $site "
            "and layer = $layer order by kind, neuron, rank",
            {"run": run.id, "task": task, "site": site, "layer": layer},
        ).fetchnumpy()
        samples = run.store.sql(
            "select sample from samples where run = $run and task = $task order by sample",
            {"run": run.id, "task": task},
        ).fetchnumpy()["sample"]
        by_sample = z.reshape(len(samples), -1, z.shape[1])
        slack = 2e-6 * np.abs(z).max()
        ordered = np.sort(z, axis=0)
        expected = np.stack([ordered[:-6:-1].T, ordered[:5].T]).reshape(-1)
        np.testing.assert_allclose(found["value"], expected, rtol=0, atol=slack)
        where = np.searchsorted(samples, found["sample"]), found["position"], found["neuron"]
        np.testing.assert_allclose(by_sample[where], found["value"], rtol=0, atol=slack)
        shown = open_neuron(run.store, run.id, site=site, layer=layer, neuron=0)
        for row in shown.examples(task=task):
            assert row["token"].startswith("[")
            assert row["before"] == row["after"] == ""


def check_values(run: Run, task: str, activations: dict[tuple[str, int], np.ndarray]) -> None:
    for (site, layer), z in activations.items():
        blocks = list(run.store.matrix_blocks(site, layer, task, run=run.id))
        sample, position, values = (
            np.concatenate([getattr(block, name) for block in blocks])
            for name in ("sample", "position", "values")
        )
        found = values[np.lexsort((position, sample))]
        np.testing.assert_allclose(found, z, rtol=0, atol=2e-6 * np.abs(z).max())


def check_predictions(
    run: Run, task: str, rows: list[dict[str, Any]], logits: torch.Tensor
) -> None:
    found = run.store.sql(
        "from predictions where run = $run and task = $task order by sample",
        {"run": run.id, "task": task},
    ).to_arrow_table()
    classes = ["crab", "trout", "shark", "spider"]
    labels = torch.tensor([classes.index(row["label"]) for row in rows])
    assert found["label_id"].to_pylist() == labels.tolist()
    assert found["predicted_id"].to_pylist() == logits.argmax(1).tolist()
    assert found["top1"].to_pylist() == (logits.argmax(1) == labels).tolist()
    assert all(found["top10"].to_pylist())
    losses = cross_entropy(logits, labels, reduction="none").numpy()
    np.testing.assert_allclose(found["loss"].to_numpy(), losses, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm-registers", "timm-distilled", "vit", "deit"])
def test_positions_are_told_apart_and_the_study_says_which_count(
    write_vision_study: Callable[..., Path], capture_locally: Callable[..., Run], kind: str
) -> None:
    patches = [f"[PATCH {row},{column}]" for row in range(4) for column in range(4)]
    settings = {"tokens": 40, "special_tokens": "exclude"}
    run = capture_locally(write_vision_study(kind, capture=settings))
    table = run.store.sql("from tokens where task = 'all' and sample = 0 order by position")
    tokens = table.to_arrow_table()
    prefix = PREFIXES[kind]
    assert tokens["token"].to_pylist() == [*prefix, *patches]
    assert tokens["is_special"].to_pylist() == [True] * len(prefix) + [False] * 16
    assert tokens["counted"].to_pylist() == [False] * len(prefix) + [True] * 16
    assert tokens["loss"].null_count == len(tokens)
    assert run.store.sql("select distinct n from stats").fetchall() == [(16 * 3,)]


@pytest.mark.parametrize(
    ("kind", "init"),
    [("timm-registers", "pretrained"), ("dinov2", "pretrained"), ("vit", "random")],
)
def test_one_to_four_stages_write_the_same_files(
    write_vision_study: Callable[..., Path], tmp_path: Path, kind: str, init: str
) -> None:
    path = write_vision_study(kind)
    # The second batch is smaller than the first, and there are two shards.
    overrides = [
        f"model.init={init}", "capture.tokens=70", "resources.stages=4", "capture.pooled=[mean]"
    ]  # fmt: skip
    images = yaml.safe_load(path.read_text(encoding="utf-8"))["tasks"]["all"]
    study = load_study(path, [*overrides, f"tasks={{all: {json.dumps(images)}}}"])
    model = inspect_model(study)
    found = []
    for num_stages in (1, 2, 3, 4):
        store = create_store(tmp_path / f"store-{num_stages}")
        run = begin_run(store, study, model, threads=1)
        cut = model.sizes.cut(num_stages, by_work=True)
        stages = [build_stage(spec) for spec in run.stage_specs(cut)]
        driver.capture(run, LocalWorkers(*stages), NoProgress())
        assert verify_store(store).problems == []
        others = store.files.list("runs/*/[pt]*/*/shard-*.parquet")
        assert len(others) == 2 * len(run.shards)
        stagewise = [
            store.table(f"from {table} order by task, shard, site, layer, neuron").combine_chunks()
            for table in ("stats", "pooled", "top")
        ]
        found.append((run.id, {path: store.files.sha256(path) for path in others}, stagewise))
    for other in found[1:]:
        assert other == found[0]


def test_random_weights_of_timm_are_those_that_timm_draws(
    write_vision_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    vision_folder: Callable[[str], Path],
) -> None:
    run = capture_locally(write_vision_study("timm"), None, "model.init=random")
    (row,) = (
        run.store.sql("from samples where task = 'all' and sample = 0").to_arrow_table().to_pylist()
    )
    _, transform = plain_model("timm", vision_folder("timm"))
    torch.manual_seed(0)
    model = timm.create_model(f"local-dir:{vision_folder('timm')}").eval()
    with torch.no_grad():
        logits = model(transform(Image.open(io.BytesIO(row["image"])))[None])[0]
    query = "select loss from predictions where task = 'all' and sample = 0"
    ((loss,),) = run.store.sql(query).fetchall()
    assert loss == pytest.approx(float(-logits.log_softmax(0)[row["label_id"]]), abs=1e-5)


def test_samples_of_a_finished_run_are_computed_again(
    write_vision_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    run = capture_locally(write_vision_study("timm"))
    report = recompute_samples(run.store, run.id, 5)
    assert (report.num_samples, report.num_tokens, report.problems) == (5, 5 * 17, [])
    assert report.largest_loss_difference < 1e-5


def test_a_model_without_a_head_is_captured_without_predictions(
    write_vision_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    write_images: Callable[..., Path],
) -> None:
    images = {"dataset": "parquet", "data_files": str(write_images())}
    fish = {"label_column": "label", "superclasses": "cifar20", "superclass": "fish"}
    tasks = {"fish": images | fish, "all": images}
    run = capture_locally(write_vision_study("timm-headless", tasks=tasks))
    assert run.store.sql("from predictions").fetchall() == []
    assert run.store.sql("select distinct n from neuron_stats").fetchall() == [(6 * 17,)]
    assert verify_store(run.store).problems == []
    assert recompute_samples(run.store, run.id, 2).problems == []


def test_classes_are_counted_one_by_one(
    write_vision_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    run = capture_locally(write_vision_study("vit"))
    by_class = run.store.sql("from class_accuracy where task = 'fish' order by label_id")
    by_hand = run.store.sql(
        "select run, task, label, label_id, count(*), avg(loss::double), avg(top1::int), "
        "avg(top10::int) from predictions where task = 'fish' group by all order by label_id"
    )
    assert [row[:5] for row in by_class.fetchall()] == [row[:5] for row in by_hand.fetchall()]
    for found, expected in zip(by_class.fetchall(), by_hand.fetchall(), strict=True):
        assert found[5:] == pytest.approx(expected[5:])
    (accuracy,) = [row for row in task_accuracy(run.store, run.id) if row["task"] == "fish"]
    assert accuracy["predictions"] == sum(row[4] for row in by_class.fetchall())
