"""Only the tensors that a stage needs are read, from every form of checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ray_app.models.errors import ModelError
from ray_app.models.loading import ModelFiles, load_stage
from ray_app.models.weights import read_tensors
from ray_app.study import ModelSettings


def load(folder: Path, layers: range) -> torch.nn.Module:
    settings = ModelSettings(source=str(folder))
    return load_stage(settings, ModelFiles(name=str(folder), fingerprint=""), layers).model


def equal_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture
def split_folder(tmp_path: Path, deep_model_folder: Callable[[str], Path]) -> Path:
    """The same model in many files with an index."""
    model = transformers.AutoModelForCausalLM.from_pretrained(deep_model_folder("llama"))
    model.save_pretrained(tmp_path / "split", max_shard_size="200KB")
    return tmp_path / "split"


def test_split_checkpoints_give_the_same_weights(
    split_folder: Path, deep_model_folder: Callable[[str], Path]
) -> None:
    for layers in (range(2), range(2, 4), range(4, 6), range(6)):
        assert equal_weights(load(split_folder, layers), load(deep_model_folder("llama"), layers))


def test_files_that_hold_nothing_of_a_stage_are_not_touched(split_folder: Path) -> None:
    places = json.loads((split_folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {places[n] for n in places if n.startswith(("model.layers.2.", "model.layers.3."))}
    assert len(needed) < len(set(places.values()))
    for file in set(places.values()) - needed:
        (split_folder / file).unlink()
    load(split_folder, range(2, 4))
    with pytest.raises(ModelError, match=r"the checkpoint's index names 'model-0.*not there"):
        load(split_folder, range(6))


def test_checkpoints_of_the_bare_model_lack_its_prefix_and_load_all_the_same(
    tmp_path: Path, deep_model_folder: Callable[[str], Path]
) -> None:
    folder = deep_model_folder("gpt2")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    whole.transformer.save_pretrained(tmp_path / "bare")
    assert "h.0.ln_1.weight" in read_tensors(str(tmp_path / "bare"), None, lambda name: True)
    for layers in (range(2), range(2, 4), range(4, 6)):
        assert equal_weights(load(tmp_path / "bare", layers), load(folder, layers))


def test_either_name_of_a_tied_weight_is_enough(
    tmp_path: Path, deep_model_folder: Callable[[str], Path]
) -> None:
    folder = deep_model_folder("llama-tied")
    shutil.copytree(folder, tmp_path / "head")
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "head" / "model.safetensors", {"format": "pt"})
    for layers in (range(2), range(2, 4), range(4, 6), range(6)):
        assert equal_weights(load(tmp_path / "head", layers), load(folder, layers))


def test_pickled_checkpoints_are_read(
    tmp_path: Path, deep_model_folder: Callable[[str], Path]
) -> None:
    folder = deep_model_folder("llama")
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert equal_weights(load(tmp_path / "pickled", range(2, 4)), load(folder, range(2, 4)))


def test_missing_tensors_are_named(
    tmp_path: Path, deep_model_folder: Callable[[str], Path]
) -> None:
    shutil.copytree(deep_model_folder("llama"), tmp_path / "short")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    state = model.state_dict()
    del state["model.layers.3.mlp.up_proj.weight"]
    (tmp_path / "short" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "short" / "pytorch_model.bin")
    load(tmp_path / "short", range(3))
    with pytest.raises(
        ModelError, match=r"lack 1 tensors, the first of them 'model.layers.3.mlp.up_proj.weight'"
    ):
        load(tmp_path / "short", range(3, 6))


def test_a_folder_without_weights_is_refused(
    tmp_path: Path, deep_model_folder: Callable[[str], Path]
) -> None:
    shutil.copytree(deep_model_folder("llama"), tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model.safetensors nor pytorch_model.bin is"):
        load(tmp_path / "empty", range(6))
