"""Experts as Ray tasks: the same as in one process, and so are their mistakes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.experts import ExpertSettings
from ray_app.capture.errors import CaptureError
from ray_app.experts import WeightsSpec, split_layers
from ray_app.models.loading import load_architecture, locate_model
from ray_app.models.sites import find_sites
from ray_app.study import ModelSettings
from ray_app.tasks import split_layers_on_ray

pytestmark = pytest.mark.ray


def test_layers_are_split_as_in_one_process(
    ray_cluster: None, model_folder: Callable[[str], Path]
) -> None:
    model = ModelSettings(source=str(model_folder("llama")))
    files = locate_model(model)
    architecture = load_architecture(model, files)
    found = find_sites(architecture.skeleton(), architecture)
    spec = WeightsSpec(
        model=model,
        fingerprint=files.fingerprint,
        sites=tuple(site for site in found if site.site == "mlp"),
    )
    settings = ExpertSettings(clusters=7)
    by_task = sorted(split_layers_on_ray(spec, settings, [0, 1]), key=lambda one: one.layer)
    for one, other in zip(by_task, split_layers(spec, settings, [0, 1]), strict=True):
        assert np.array_equal(one.labels, other.labels)
        assert one.inertia == pytest.approx(other.inertia)
    changed = replace(spec, fingerprint="sha256:0")
    with pytest.raises(CaptureError, match="differ from those the run was planned with"):
        list(split_layers_on_ray(changed, settings, [0, 1]))
