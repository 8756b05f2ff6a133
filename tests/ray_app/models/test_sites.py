"""Sites are found by structure in every family, and confirmed by a probe batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from ray_app.models.loading import ModelError
from ray_app.models.sites import SiteLocation, confirm_sites, find_sites
from ray_app.models.transformers_models import CausalModel
from ray_app.plan import inspect_model
from ray_app.run import Run
from ray_app.study import load_study


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
    architecture = CausalModel.of(model.config)
    sites = find_sites(architecture.skeleton(), architecture)
    confirm_sites(model, sites, architecture)
    assert [(site.layer, site.site) for site in sites] == [
        (layer, site) for layer in range(2) for site in ("attn", "mlp")
    ]
    assert sites[0].module.endswith(f".0.{attn}")
    assert sites[1].module.endswith(f".0.{mlp}")


@pytest.fixture
def llama(model_folder: Callable[[str], Path]) -> transformers.PreTrainedModel:
    return load(model_folder("llama"))


def sites_of(model: transformers.PreTrainedModel) -> dict[tuple[str, int], SiteLocation]:
    return {
        (site.site, site.layer): site for site in find_sites(model, CausalModel.of(model.config))
    }


def test_sites_have_the_widths_of_the_configuration(llama: transformers.PreTrainedModel) -> None:
    sites = sites_of(llama)
    assert {(site.width, site.head_dim) for site in sites.values() if site.site == "mlp"} == {
        (72, None)
    }
    assert {(site.width, site.head_dim) for site in sites.values() if site.site == "attn"} == {
        (32, 8)
    }


def test_a_module_of_another_width_is_refused(llama: transformers.PreTrainedModel) -> None:
    site = replace(sites_of(llama)["mlp", 1], module="model.layers.1.mlp.up_proj")
    with pytest.raises(
        ModelError,
        match=r"site 'mlp' of layer 1 \(model\.layers\.1\.mlp\.up_proj\) must be read once per "
        r"forward pass with shape \(8, 72\), found \[\(8, 32\)\]: name the right modules",
    ):
        confirm_sites(llama, [site], CausalModel.of(llama.config))


def test_a_module_that_never_runs_is_refused(llama: transformers.PreTrainedModel) -> None:
    unused = llama.model.layers[1].mlp
    unused.forward = lambda hidden: hidden
    with pytest.raises(
        ModelError, match=r"site 'mlp' of layer 1 \(.*down_proj\) .* found no call at all"
    ):
        confirm_sites(llama, list(sites_of(llama).values()), CausalModel.of(llama.config))


def test_a_module_that_runs_twice_is_refused(llama: transformers.PreTrainedModel) -> None:
    site = sites_of(llama)["attn", 0]
    llama.model.layers[1] = llama.model.layers[0]
    with pytest.raises(ModelError, match=r"found \[\(8, 32\), \(8, 32\)\]"):
        confirm_sites(llama, [site], CausalModel.of(llama.config))


def test_an_attention_site_that_does_not_mix_positions_is_refused(
    llama: transformers.PreTrainedModel,
) -> None:
    site = replace(sites_of(llama)["attn", 0], module="model.layers.0.self_attn.q_proj")
    with pytest.raises(
        ModelError, match=r"site 'attn' of layer 0 \(.*q_proj\) does not mix positions"
    ):
        confirm_sites(llama, [site], CausalModel.of(llama.config))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_swapped_sites_are_refused(model_folder: Callable[[str], Path], family: str) -> None:
    model = load(model_folder(family))
    right = find_sites(model, CausalModel.of(model.config))
    other = {"attn": "mlp", "mlp": "attn"}
    swapped = [replace(site, site=other[site.site]) for site in right]
    with pytest.raises(ModelError, match=r"mix(es)? positions.*name.* in model.site_modules"):
        confirm_sites(model, swapped, CausalModel.of(model.config))


def test_confirming_leaves_no_hook_behind(llama: transformers.PreTrainedModel) -> None:
    confirm_sites(llama, list(sites_of(llama).values()), CausalModel.of(llama.config))
    for module in llama.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


MIXTURE_OF_EXPERTS = transformers.MixtralConfig(
    vocab_size=400, hidden_size=32, intermediate_size=72, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, max_position_embeddings=128,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip


@pytest.fixture
def mixture_study(
    tmp_path: Path,
    write_study: Callable[..., Path],
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> Path:
    """A study of a model whose MLPs are mixtures of experts, which are not recognised."""
    folder = tmp_path / "mixture"
    transformers.AutoModelForCausalLM.from_config(MIXTURE_OF_EXPERTS).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return write_study(model={"source": str(folder)})


def test_an_unknown_structure_is_refused_with_the_modules_that_there_are(
    mixture_study: Path,
) -> None:
    with pytest.raises(ModelError) as caught:
        inspect_model(load_study(mixture_study))
    message = str(caught.value)
    assert "found 1 candidates for attention's output projection and 0 for the MLP's" in message
    assert "model.site_modules: {attn: 'model.layers.{layer}.self_attn.o_proj'" in message
    assert "linear modules of a layer are: model.layers.0.self_attn.q_proj, " in message


def test_sites_named_by_hand_are_captured_in_an_unknown_structure(
    mixture_study: Path, capture_locally: Callable[..., Run]
) -> None:
    run = capture_locally(
        mixture_study,
        None,
        "model.site_modules={attn: 'model.layers.{layer}.self_attn.o_proj'}",
        "capture.sites=[attn]",
    )
    found = run.store.sql("select distinct site, layer, n from neuron_stats order by all")
    assert found.fetchall() == [("attn", 0, 160), ("attn", 1, 160)]


def test_a_site_named_by_hand_that_is_not_there_is_refused_with_the_modules_that_there_are(
    write_study: Callable[..., Path],
) -> None:
    study = load_study(write_study(), ["model.site_modules={mlp: 'model.layers.{layer}.mlp.down'}"])
    with pytest.raises(
        ModelError,
        match=r"model\.site_modules\.mlp: the model has no module 'model\.layers\.0\.mlp\.down'; "
        r"modules of layer 0 are: .*model\.layers\.0\.mlp\.down_proj",
    ):
        inspect_model(study)


def test_heads_named_by_hand_may_be_of_another_size_than_queries() -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=72, v_head_dim=10, qk_nope_head_dim=6, qk_rope_head_dim=2,
        first_k_dense_replace=1,
    )  # fmt: skip
    by_hand = {
        "attn": "model.layers.{layer}.self_attn.o_proj",
        "mlp": "model.layers.{layer}.mlp.down_proj",
    }
    attn, mlp = find_sites(
        CausalModel.of(config).skeleton(), CausalModel.of(config), by_hand=by_hand
    )
    assert (attn.width, attn.head_dim) == (40, 10)
    assert (mlp.width, mlp.head_dim) == (72, None)


def test_a_model_without_attention_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(
        ModelError, match=r"the architecture MambaForCausalLM has no attention heads: actlake"
    ):
        find_sites(CausalModel.of(config).skeleton(), CausalModel.of(config))


def test_a_model_that_neither_writes_nor_classifies_is_refused() -> None:
    with pytest.raises(ModelError, match="'vits' has no causal language model and no image class"):
        CausalModel.of(transformers.VitsConfig())


def test_attention_that_transformers_cannot_run_is_refused_with_the_one_that_it_can(
    write_study: Callable[..., Path],
) -> None:
    with pytest.raises(
        ModelError, match=r"model\.attention: sdpa is not supported .* 'gpt_neo': set .* to eager"
    ):
        inspect_model(load_study(write_study(family="gpt_neo")))
