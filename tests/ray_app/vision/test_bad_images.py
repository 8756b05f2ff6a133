"""Images, labels and models that cannot be used are named, and nothing is skipped in silence."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_app.capture import driver
from ray_app.capture.errors import CaptureError
from ray_app.capture.quarantine import Quarantine
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.models.errors import ModelError
from ray_app.models.images import ImageError, ImageReader
from ray_app.plan import inspect_model, make_plan
from ray_app.progress import NoProgress
from ray_app.run import Run
from ray_app.study import StudyError, load_study
from storage import verify_store

TIMM_KINDS = r"actlake captures the VisionTransformer kind, which are vit_\*, deit_\*, deit3_\*"


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 20, 4), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


GOOD = [encoded(Image.fromarray(noise(seed)[..., :3])) for seed in range(4)]
BROKEN = b"no picture"
TRANSPARENT = encoded(Image.fromarray(noise(9)))


@pytest.mark.parametrize("num_stages", [1, 2])
def test_images_that_cannot_be_read_are_named_set_aside_and_counted(
    write_vision_study: Callable[..., Path],
    write_images: Callable[..., Path],
    begin_locally: Callable[..., Run],
    num_stages: int,
) -> None:
    truncated = GOOD[0][: len(GOOD[0]) // 2]
    images = write_images([*GOOD, BROKEN, truncated, TRANSPARENT], ["crab"] * 7)
    tasks = {"all": {"dataset": "parquet", "data_files": str(images), "label_column": "label"}}
    study = write_vision_study(
        tasks=tasks, capture={"tokens": 1000}, reference=None, resources={"stages": num_stages}
    )
    run = begin_locally(study)
    model = inspect_model(load_study(study))
    specs = run.stage_specs(model.sizes.cut(num_stages, by_work=True))
    stages = [build_stage(spec) for spec in specs]
    with pytest.raises(
        CaptureError, match=r"\(parquet#[456]\).* fails, because the image .*max_quarantined is 0"
    ):
        driver.capture(run, LocalWorkers(*stages), NoProgress())
    driver.capture(run, LocalWorkers(*stages, quarantine=Quarantine(max_samples=3)), NoProgress())
    aside = dict(run.store.sql("select source, error from quarantine").fetchall())
    assert aside.keys() == {"parquet#4", "parquet#5", "parquet#6"}
    assert aside["parquet#4"] == "the image cannot be decoded: it is of no known format"
    assert aside["parquet#5"].startswith("the image cannot be decoded: ")
    assert aside["parquet#6"] == "the image has the channels RGBA, and the model reads RGB"
    assert run.store.sql("select distinct n from stats").fetchall() == [(4 * 17,)]
    assert run.store.sql("select count(*) from predictions").fetchall() == [(4,)]
    assert run.store.sql("select num_samples, num_quarantined from commits").fetchall() == [(4, 3)]
    assert verify_store(run.store).problems == []


def test_images_are_brought_to_the_models_channels_if_nothing_is_lost() -> None:
    grey = Image.fromarray(noise(1)[..., 0])
    colour = Image.fromarray(noise(1)[..., :3])

    def prepare(image: Image.Image) -> Any:
        return np.asarray(image, dtype=np.float32).reshape(*image.size, -1).transpose(2, 0, 1)

    for_colour, for_grey = ImageReader(3, prepare), ImageReader(1, prepare)
    for image in (grey, grey.convert("1"), colour, colour.quantize(16)):
        np.testing.assert_array_equal(for_colour(encoded(image)), prepare(image.convert("RGB")))
    np.testing.assert_array_equal(for_grey(encoded(grey)), prepare(grey))
    jpeg = encoded(colour, "JPEG")
    np.testing.assert_array_equal(for_colour(jpeg), prepare(Image.open(io.BytesIO(jpeg))))
    for reader, image in [
        (for_grey, colour),
        (for_colour, Image.fromarray(noise(2))),
        (for_colour, grey.convert("LA")),
        (for_colour, Image.fromarray(noise(3)[..., 0].astype(np.uint16))),
    ]:
        with pytest.raises(ImageError, match="the image has the channels"):
            reader(encoded(image))
    with pytest.raises(ModelError, match="the model reads images of 4 channels"):
        ImageReader(4, prepare)


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ({"superclass": "birds"}, r"tasks\.all\.superclass must be one of aquatic_mammals, fish,"),
        ({"superclass": None}, "superclasses, superclass and label_column choose rows together"),
        ({"superclasses": "cifar21"}, r"a table that ships with actlake \(cifar20\) or a YAML"),
        ({"label_column": "image"}, r"in no superclass of cifar20: correct the table"),
        ({"image_column": "picture"}, "there is no column 'picture' in the dataset"),
        ({"image_column": "number"}, "'number' must hold images or paths of image files, found"),
        ({"column": "label"}, r"tasks\.all\.column says nothing about images"),
    ],
)
def test_tasks_that_cannot_be_drawn_are_refused(
    write_vision_study: Callable[..., Path],
    write_images: Callable[..., Path],
    task: dict[str, Any],
    error: str,
) -> None:
    images = {"dataset": "parquet", "data_files": str(write_images()), "label_column": "label"}
    fish = {"superclasses": "cifar20", "superclass": "fish"}
    given = {key: value for key, value in (images | fish | task).items() if value is not None}
    path = write_vision_study(tasks={"all": given}, reference=None)

    def plan() -> None:
        study = load_study(path)
        make_plan(study, inspect_model(study))

    with pytest.raises(StudyError, match=error):
        plan()


@pytest.mark.parametrize("label", [4, -1, "whale"])
def test_a_label_that_is_no_class_of_the_model_is_refused(
    write_vision_study: Callable[..., Path], write_images: Callable[..., Path], label: Any
) -> None:
    images = write_images(labels=[label] * 24)
    tasks = {"all": {"dataset": "parquet", "data_files": str(images), "label_column": "label"}}
    study = load_study(write_vision_study(tasks=tasks, reference=None))
    with pytest.raises(
        StudyError, match=rf"the label '{label}' of parquet#\d+ is no class of the model, whose "
        r"classes are 0 to 3, or their names \(crab, trout, shark, spider, \.\.\.\)"
    ):  # fmt: skip
        make_plan(study, inspect_model(study))


def test_accuracy_of_a_model_without_a_head_is_refused(
    write_vision_study: Callable[..., Path],
) -> None:
    study = load_study(write_vision_study("timm-headless"))
    with pytest.raises(
        StudyError, match=r"tasks\.all\.label_column asks how well .* has no classification head"
    ):
        inspect_model(study)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ({"source": "timm:resnet18", "init": "random"}, rf"is a ResNet: .*{TIMM_KINDS}"),
        ({"source": "timm:vit_base_patch61_224"}, "did you mean vit_base_patch16_224"),
        ({"source": "timm:vit_base_patch16_224.nonsense"}, "nonsense"),
        (
            {"source": "timm:vit_tiny_patch16_224", "init": "random", "quantization": "int8"},
            "model.quantization: int8 is not there for models of timm",
        ),
    ],
)
def test_models_of_timm_that_cannot_be_captured_are_refused(
    write_vision_study: Callable[..., Path], model: dict[str, Any], error: str
) -> None:
    with pytest.raises(ModelError, match=error):
        inspect_model(load_study(write_vision_study(model=model)))


def test_a_table_of_ones_own_must_give_each_label_one_superclass(
    tmp_path: Path, write_vision_study: Callable[..., Path], write_images: Callable[..., Path]
) -> None:
    (tmp_path / "mine.yaml").write_text("legs: [crab, spider]\nfins: [trout, crab, shark]\n")
    images = {"dataset": "parquet", "data_files": str(write_images()), "label_column": "label"}
    mine = {"superclasses": str(tmp_path / "mine.yaml"), "superclass": "legs"}
    path = write_vision_study(tasks={"all": images | mine}, reference=None)
    study = load_study(path)
    with pytest.raises(StudyError, match="puts the label 'crab' in two places, legs and fins"):
        make_plan(study, inspect_model(study))
    (tmp_path / "mine.yaml").write_text("legs: [crab, spider]\nfins: [trout, shark]\n")
    assert make_plan(study, inspect_model(study)).tasks["all"].num_documents > 0
