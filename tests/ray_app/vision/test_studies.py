"""The studies of images that ship with actlake say what the papers say."""

from pathlib import Path

from ray_app.study import load_study
from ray_app.superclasses import load_superclasses

STUDIES = Path(__file__).parents[3] / "studies"


def test_the_cifar20_study_has_every_superclass_against_all_training_images() -> None:
    study = load_study(STUDIES / "vit-cifar20-modularity.yaml")
    superclasses = set(load_superclasses("superclasses", "cifar20").values())
    assert study.reference == "all"
    assert study.tasks.keys() == {"all", *superclasses}
    for name, task in study.tasks.items():
        assert (task.dataset, task.split) == ("uoft-cs/cifar100", "train")
        assert (task.image_column, task.label_column) == ("img", "fine_label")
        assert task.superclass == (None if name == "all" else name)


def test_the_digits_study_has_a_task_for_each_digit() -> None:
    study = load_study(STUDIES / "digits-vit.yaml")
    filters = [dict(task.filter) for task in study.tasks.values() if task.mixture is None]
    assert filters == [{"label": str(digit)} for digit in range(10)]
    assert set(study.tasks["all"].mixture or ()) == study.tasks.keys() - {"all"}
