"""Sites are found by structure in every family, and confirmed by a probe batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from ray_app.models.sites import confirm_sites, empty_model, find_sites


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("family", "attn", "mlp"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("llama-mha", "self_attn.o_proj", "mlp.down_proj"),
        ("mistral", "self_attn.o_proj", "mlp.down_proj"),
        ("qwen2", "self_attn.o_proj", "mlp.down_proj"),
        ("qwen3", "self_attn.o_proj", "mlp.down_proj"),
        ("gemma", "self_attn.o_proj", "mlp.down_proj"),
        ("gemma2", "self_attn.o_proj", "mlp.down_proj"),
        ("gemma3", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
        ("gpt_neo", "attn.attention.out_proj", "mlp.c_proj"),
        ("gpt_neox", "attention.dense", "mlp.dense_4h_to_h"),
        ("opt", "self_attn.out_proj", "fc2"),
        ("phi", "self_attn.dense", "mlp.fc2"),
        ("phi3", "self_attn.o_proj", "mlp.down_proj"),
        ("olmo2", "self_attn.o_proj", "mlp.down_proj"),
    ],
)
def test_both_sites_are_found_and_confirmed(
    model_folder: Callable[[str], Path], family: str, attn: str, mlp: str
) -> None:
    model = load(model_folder(family))
    sites = find_sites(empty_model(model.config), model.config)
    confirm_sites(model, sites)
    assert [(site.layer, site.site) for site in sites] == [
        (layer, site) for layer in range(2) for site in ("attn", "mlp")
    ]
    assert sites[0].module.endswith(f".0.{attn}")
    assert sites[1].module.endswith(f".0.{mlp}")
