"""Hours of a plan: weights, tokens and speed, and nothing that hides."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from ray_app.facts import inspect_model
from ray_app.hours import Hours, estimate_hours
from ray_app.models.sizes import PartSizes
from ray_app.placement import GPUS, Node, local_nodes, planned_nodes
from ray_app.study import GpuName, load_study

NODES = [Node(cpus=8, gpus=0, memory=1 << 30, gpu_memory=0)]
CUT = (range(1), range(1, 2))


@pytest.fixture
def hours_of(write_study: Callable[..., Path]) -> Callable[..., Hours]:
    """Hours of 1,000 tokens in two stages of 1 and 3 million weights."""

    def make(model: dict[str, Any] | None = None, **resources: Any) -> Hours:
        path = write_study(resources=resources)
        overrides = [f"model.{key}={value}" for key, value in (model or {}).items()]
        study = load_study(path, overrides)
        counts = PartSizes(layers=(1_000_000, 2_000_000), front=0, tail=1_000_000, tied=0)
        facts = replace(inspect_model(load_study(path)), counts=counts)
        return estimate_hours(study, facts, CUT, NODES, 1000)

    return make


def test_the_heaviest_stage_sets_the_pace_and_replicas_share_the_tokens(
    hours_of: Callable[..., Hours],
) -> None:
    one = hours_of(tflops=2.0)
    assert one.capture == pytest.approx(1000 * 2 * 3_000_000 / 2e12 / 3600)
    # Four tasks of 160 tokens.
    assert one.evaluation == pytest.approx(one.capture * 640 / 1000)
    assert hours_of(tflops=2.0, replicas=4).capture == pytest.approx(one.capture / 4)
    assert "2 TFLOP/s a stage (resources.tflops)" in one.assumption


@pytest.mark.parametrize(
    ("model", "resources", "assumption"),
    [
        ({}, {}, "0.28 TFLOP/s a stage (4 CPU thread(s) of 0.07, assumed)"),
        ({}, {"cpus_per_stage": 2}, "0.14 TFLOP/s a stage (2 CPU thread(s)"),
        ({}, {"gpus_per_stage": 1, "gpu": "A100-80GB"}, "5.85 TFLOP/s a stage (30% of the 19.5 of"),
        ({"dtype": "float16"}, {"gpus_per_stage": 1, "gpu": "A100-80GB"}, "93.6 TFLOP/s a stage"),
        ({"dtype": "float16", "quantization": "int8"}, {"gpus_per_stage": 2},
         "(10% of the 121 of one L4, for lack of resources.gpu, assumed)"),
    ],
)  # fmt: skip
def test_the_speed_is_said_with_where_it_is_from(
    hours_of: Callable[..., Hours],
    model: dict[str, Any],
    resources: dict[str, Any],
    assumption: str,
) -> None:
    assert assumption in hours_of(model, **resources).assumption


def test_every_gpu_that_a_study_may_name_is_known(write_study: Callable[..., Path]) -> None:
    assert set(get_args(GpuName)) == set(GPUS)
    study = load_study(write_study(resources={"gpu": "H100", "gpus_per_stage": 1}))
    [planned], [here] = planned_nodes(study), local_nodes()
    assert planned.gpu_memory == 80 << 30
    assert (planned.cpus, planned.gpus) == (here.cpus, here.gpus)
