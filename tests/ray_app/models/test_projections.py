"""Input projections read layer by layer are, bit for bit, those of the loaded model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm.layers
import torch
from torch import nn

from ray_app.models import loading, projections
from ray_app.models.errors import ModelError
from ray_app.models.loading import load_architecture, load_model, locate_model
from ray_app.models.projections import InputProjections
from ray_app.models.sites import SiteLocation, find_sites
from ray_app.study import ModelSettings
from tests.conftest import FAMILIES

_PLAIN = {
    "gpt2": "mlp.c_fc", "gpt_neo": "mlp.c_fc", "gpt_neox": "mlp.dense_h_to_4h", "opt": "fc1",
    "phi": "mlp.fc1",
}  # fmt: skip


def reader(settings: ModelSettings) -> InputProjections:
    files = locate_model(settings)
    architecture = load_architecture(settings, files)
    sites = find_sites(architecture.skeleton(), architecture)
    return InputProjections(settings, files, [site for site in sites if site.site == "mlp"])


def expected(layer: nn.Module, family: str) -> dict[str, torch.Tensor]:
    """The rows as whoever knows the family would read them."""
    if family in _PLAIN:
        weight = layer.get_submodule(_PLAIN[family]).weight
        return {"up": weight.T if family == "gpt2" else weight}
    if family == "phi3":
        gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
        return {"gate": gate, "up": up}
    return {"gate": layer.mlp.gate_proj.weight, "up": layer.mlp.up_proj.weight}


@pytest.mark.parametrize(
    ("family", "init"),
    [
        *((family, "pretrained") for family in FAMILIES),
        *((family, "random") for family in ("llama", "gpt2", "opt", "phi3")),
    ],
)
def test_rows_are_those_of_the_loaded_model(
    family: str, init: str, model_folder: Callable[[str], Path]
) -> None:
    settings = ModelSettings.model_validate(
        {"source": str(model_folder(family)), "init": init, "init_seed": 3, "attention": "eager"}
    )
    model = load_model(settings, locate_model(settings))
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    # Neither rounding nor quantisation of a run has a part in what its neurons' rows are.
    rows = reader(settings.model_copy(update={"dtype": "float16", "quantization": "int8"}))
    for index, layer in enumerate(layers):
        wanted = expected(layer, family)
        for projection, weight in wanted.items():
            found = torch.from_numpy(rows.rows(index, projection))
            assert torch.equal(found, weight), projection
    if "gate" not in wanted:
        with pytest.raises(ModelError, match=r"projection must be up for .*found 'gate'"):
            rows.rows(0, "gate")


def test_of_a_checkpoint_one_tensor_is_read_and_no_model_built(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built")

    rows = reader(ModelSettings(source=str(model_folder("llama"))))
    monkeypatch.setattr(projections, "load_stage", refuse)
    monkeypatch.setattr(loading, "load_stage", refuse)
    assert rows.rows(1, "gate").shape == (72, 32)


def test_rows_of_a_timm_model_are_those_of_its_first_map() -> None:
    settings = ModelSettings(source="timm:test_vit", init="random", init_seed=1)
    model = load_model(settings, locate_model(settings))
    found = torch.from_numpy(reader(settings).rows(len(model.blocks) - 1, "up"))
    assert torch.equal(found, model.blocks[-1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("mlp", "up", "gate"),
    [
        (timm.layers.GluMlp(8, 24), ("fc1", 0), ("fc1", 12)),
        (timm.layers.GluMlp(8, 24, act_layer=nn.ReLU, gate_last=False), ("fc1", 12), ("fc1", 0)),
        (timm.layers.SwiGLU(8, 12), ("fc1_x", 0), ("fc1_g", 0)),
    ],
)
def test_gates_are_told_by_what_they_do(
    mlp: nn.Module, up: tuple[str, int], gate: tuple[str, int]
) -> None:
    model = nn.ModuleDict({"mlp": mlp.to("meta")})
    site = SiteLocation(site="mlp", layer=0, module="mlp.fc2", width=12, head_dim=None)
    found = projections._places(model, site)
    assert {name: (p.module, p.start) for name, p in found.items()} == {
        "up": (f"mlp.{up[0]}", up[1]),
        "gate": (f"mlp.{gate[0]}", gate[1]),
    }
