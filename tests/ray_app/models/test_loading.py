"""Models that cannot be found or read are refused in one sentence that says why."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from ray_app.hub import OutOfReachError
from ray_app.models import loading
from ray_app.models.loading import ModelError, load_config, load_model, load_tokenizer, locate_model
from ray_app.study import ModelSettings


@pytest.fixture
def folder(tmp_path: Path, model_folder: Callable[[str], Path]) -> Path:
    """A model folder that a test may spoil."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder without config\.json: give the folder that"):
        locate_model(ModelSettings(source=str(tmp_path)))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model.gguf", "model.gguf"])
def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(source: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.source '{source}' does not exist: give a Hugg"):
        locate_model(ModelSettings(source=source))


NOT_REACHED = (
    r"model\.source 'some/model' is no folder or file here and not in the local cache, and the hub "
    r"cannot be asked for it \(it does not answer\): check the id and the network"
)
REFUSED = (
    r"the configuration of model\.source 'some/model' cannot be loaded.*: 401 Client Error; check "
    "the id, the network and access rights"
)


@pytest.mark.parametrize(
    ("unreachable", "message"), [("it does not answer", NOT_REACHED), (None, REFUSED)]
)
def test_a_hub_that_does_not_answer_is_told_from_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch, unreachable: str | None, message: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("401 Client Error")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(loading, "why_unreachable", lambda: unreachable)
    error = ModelError if unreachable is None else OutOfReachError
    with pytest.raises(error, match=message):
        locate_model(ModelSettings(source="some/model"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, share: float) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    settings = ModelSettings(source=str(folder))
    with pytest.raises(
        ModelError,
        match=r"the weights of model\.source '.*' cannot be loaded: .+; its files may be",
    ):
        load_model(settings, locate_model(settings))


def test_a_configuration_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{nonsense")
    settings = ModelSettings(source=str(folder))
    with pytest.raises(ModelError, match=r"the configuration of .* is not a valid JSON file"):
        load_config(settings, locate_model(settings))


def test_an_architecture_that_transformers_does_not_know_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "oracle"}')
    settings = ModelSettings(source=str(folder))
    with pytest.raises(ModelError, match=r"oracle.*; actlake needs a decoder that transformers'"):
        load_config(settings, locate_model(settings))


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    settings = ModelSettings(source=str(folder))
    with pytest.raises(ModelError, match=r"the tokenizer of model\.source '.*' cannot be loaded: "):
        load_tokenizer(settings, locate_model(settings))


def test_the_fingerprint_tells_weights_and_configurations_apart(folder: Path) -> None:
    settings = ModelSettings(source=str(folder))
    fingerprints = {locate_model(settings).fingerprint}
    assert fingerprints == {locate_model(settings).fingerprint}
    for name in ("model.safetensors", "config.json"):
        path = folder / name
        path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
        fingerprints.add(locate_model(settings).fingerprint)
    assert len(fingerprints) == 3


def test_random_initialisation_depends_on_its_seed_alone(folder: Path) -> None:
    def weights(**changes: object) -> torch.Tensor:
        settings = ModelSettings.model_validate(
            {"source": str(folder), "init": "random", **changes}
        )
        model = load_model(settings, locate_model(settings))
        return model.get_parameter("model.layers.1.mlp.down_proj.weight").clone()

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weights()
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(weights(), first)
    assert not torch.equal(weights(init_seed=1), first)
    assert torch.equal(weights(dtype="bfloat16"), first.bfloat16())
    assert not torch.equal(weights(init="pretrained"), first)


def test_models_come_in_evaluation_mode_without_gradients(folder: Path) -> None:
    settings = ModelSettings(source=str(folder), dtype="bfloat16")
    model = load_model(settings, locate_model(settings))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
