"""Models are cut so that the largest stage is as small as can be."""

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ray_app.models.loading import ModelFiles, load_stage
from ray_app.models.parts import find_parts
from ray_app.models.sizes import PartSizes, balanced_cut, measure_parts
from ray_app.models.transformers_models import CausalModel
from ray_app.study import ModelSettings


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=9).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    )
)
def test_no_other_cut_has_a_smaller_largest_stage(drawn: tuple[list[int], int]) -> None:
    costs, num_stages = drawn
    cut = balanced_cut(costs, num_stages)
    assert [layer for layers in cut for layer in layers] == list(range(len(costs)))
    assert all(len(layers) > 0 for layers in cut)
    largest = max(sum(costs[layer] for layer in layers) for layers in cut)
    for inner in combinations(range(1, len(costs)), num_stages - 1):
        bounds = (0, *inner, len(costs))
        sums = (sum(costs[a:b]) for a, b in pairwise(bounds))
        assert largest <= max(sums)


def test_embedding_and_head_weigh_and_the_embedding_does_no_work() -> None:
    sizes = PartSizes(layers=(1,) * 8, front=4, tail=4, tied=4)
    assert sizes.cut(2, by_work=False) == [range(4), range(4, 8)]
    assert sizes.cut(2, by_work=True) == [range(6), range(6, 8)]
    assert sizes.of_stage(range(4)) == sizes.of_stage(range(4, 8)) == 8
    assert sizes.of_stage(range(8)) == 12


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt"])
def test_measured_bytes_are_those_that_stages_hold(
    deep_model_folder: Callable[[str], Path], family: str, quantization: str
) -> None:
    folder = deep_model_folder(family)
    config = transformers.AutoConfig.from_pretrained(folder)
    settings = ModelSettings(source=str(folder), quantization=quantization)
    architecture = CausalModel.of(config)
    parts = find_parts(architecture.skeleton(), architecture)
    sizes = measure_parts(architecture.skeleton(), parts, settings)
    for layers in (range(2), range(2, 4), range(4, 6), range(6)):
        stage = load_stage(settings, ModelFiles(name=str(folder), fingerprint=""), layers)
        held = sum(p.numel() * p.element_size() for p in stage.model.parameters())
        assert sizes.of_stage(layers) == held, layers


def test_half_precision_takes_half_the_bytes(deep_model_folder: Callable[[str], Path]) -> None:
    folder = deep_model_folder("llama")
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = CausalModel.of(config)
    parts = find_parts(architecture.skeleton(), architecture)
    full, half = (
        measure_parts(
            architecture.skeleton(), parts, ModelSettings(source=str(folder), dtype=dtype)
        )
        for dtype in ("float32", "bfloat16")
    )
    assert torch.tensor(full.layers).equal(torch.tensor(half.layers) * 2)
    assert (full.front, full.tail) == (half.front * 2, half.tail * 2)
