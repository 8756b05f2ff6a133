"""Input projections: the weights through which the neurons of an MLP read the residual stream.

A plain MLP has one, here called ``up``; a gated one computes act(gate(x)) * up(x) and has both,
as two maps or fused into one. Which is which is told by behaviour: a neuron follows the sign of
what ``up`` gives it, and no activation function gives the gate's half away like that.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from analysis.experts import Projection
from ray_app.models.errors import ModelError
from ray_app.models.loading import (
    ModelFiles,
    load_architecture,
    load_model,
    load_stage,
    read_tensor,
)
from ray_app.models.sites import SiteLocation, linear_shape
from ray_app.models.timm_models import timm_name
from ray_app.study import ModelSettings

__all__ = ["InputProjections", "first_map"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the rows of a projection are."""

    module: str
    """Dotted name of the linear map."""
    start: int
    """Its first output that belongs to the projection."""


class InputProjections:
    """Reads the input projections of a model, layer by layer, in float32 and not quantised.

    A trained one is read from the checkpoint alone. Where that has no tensor of its name, and where
    weights are random, the layer is built, as a stage of its own; models of timm are built whole.
    """

    def __init__(
        self, settings: ModelSettings, files: ModelFiles, sites: Sequence[SiteLocation]
    ) -> None:
        """Look at the structure of a model.

        Args:
            settings: which model; its dtype and quantisation do not matter.
            files: from `locate_model`.
            sites: its sites 'mlp'.

        Raises:
            ModelError: if the model's configuration cannot be read.
        """
        exact = {"dtype": "float32", "quantization": "none"}
        self._settings = settings.model_copy(update=exact)
        self._files = files
        self._sites = {site.layer: site for site in sites}
        self._skeleton: Any = load_architecture(self._settings, files).skeleton()
        self._is_timm = timm_name(files.name) is not None

    def rows(self, layer: int, projection: Projection) -> NDArray[np.float32]:
        """The weights of one projection of a layer: (neurons, width of the residual stream).

        Raises:
            ModelError: if the layer has no such projection, or its weights cannot be read.
        """
        site = self._sites[layer]
        places = _places(self._skeleton, site)
        if projection not in places:
            raise ModelError(
                f"projection must be up for {self._settings.source!r}, whose MLPs are plain, found "
                f"{projection!r}: only gated MLPs have a gate."
            )
        place = places[projection]
        weight = self._weight(place.module, layer)
        if isinstance(self._skeleton.get_submodule(place.module), Conv1D):
            weight = weight.T
        chosen = weight[place.start : place.start + site.width]
        rows: NDArray[np.float32] = chosen.float().contiguous().numpy()
        return rows

    def _weight(self, module: str, layer: int) -> Tensor:
        if self._is_timm:
            model = self._whole
        else:
            stored = None
            if self._settings.init == "pretrained":
                # Checkpoints saved from the bare model leave its prefix out.
                bare = module.removeprefix(f"{self._skeleton.base_model_prefix}.")
                names = frozenset(f"{name}.weight" for name in (module, bare))
                stored = read_tensor(self._settings, self._files, names)
            if stored is not None:
                return stored
            model = load_stage(self._settings, self._files, range(layer, layer + 1)).model
        weight: Any = model.get_submodule(module).weight
        return weight.detach()  # type: ignore[no-any-return]

    @cached_property
    def _whole(self) -> nn.Module:
        return load_model(self._settings, self._files)


def first_map(model: nn.Module, site: SiteLocation) -> str:
    """Name of the linear map of a site 'mlp' whose input is that of the whole MLP.

    Raises:
        ModelError: if the MLP has no map before its output projection.
    """
    parent, _, last = site.module.rpartition(".")
    before = _maps_before(model.get_submodule(parent), last)
    if not before:
        raise ModelError(
            f"the MLP of layer {site.layer} ({parent}) has no linear map before {last!r}, so what "
            "enters it is not known: name its output projection in model.site_modules.mlp."
        )
    return f"{parent}.{next(iter(before))}"


def _maps_before(mlp: nn.Module, last: str) -> dict[str, int]:
    """Outputs of the linear maps of an MLP that stand before its output projection, by name."""
    linear = {
        name: linear_shape(module)[1]
        for name, module in mlp.named_children()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return {name: linear[name] for name in list(linear)[: list(linear).index(last)]}


def _places(model: nn.Module, site: SiteLocation) -> dict[Projection, _Place]:
    """The projections that feed a site 'mlp'.

    Raises:
        ModelError: if the MLP is of another kind than plain or gated.
    """
    parent, _, last = site.module.rpartition(".")
    mlp = model.get_submodule(parent)
    maps = _maps_before(mlp, last)
    before, widths = list(maps), list(maps.values())
    if widths == [site.width]:
        return {"up": _Place(f"{parent}.{before[0]}", 0)}
    halves: list[tuple[str, int]] = []
    if widths in ([site.width] * 2, [2 * site.width]):
        halves = [(before[0], 0), (before[-1], site.width if len(before) == 1 else 0)]
    follows = [_follows_sign(mlp, last, before, half, site.width) for half in halves]
    if sorted(follows) != [False, True]:
        raise ModelError(
            f"the MLP of layer {site.layer} ({parent}) is neither plain nor gated: its linear maps "
            f"are {', '.join([*maps, last])}, and which rows are those of its neurons is not known."
        )
    places = [_Place(f"{parent}.{name}", start) for name, start in halves]
    up = follows.index(True)
    return {"up": places[up], "gate": places[1 - up]}


def _follows_sign(
    mlp: nn.Module, last: str, before: Sequence[str], half: tuple[str, int], width: int
) -> bool:
    """Whether all neurons turn their sign if what one projection gives them turns its own.

    Args:
        mlp: runs without weights, on outputs of its first maps that are given.
        last: name of its output projection.
        before: names of the maps before it.
        half: name of the map of the projection, and its first output that belongs to it.
        width: number of neurons.
    """
    generator = torch.Generator().manual_seed(0)
    maps = {name: mlp.get_submodule(name) for name in before}
    outputs = {
        name: torch.randn((1, 1, linear_shape(module)[1]), generator=generator)
        for name, module in maps.items()
    }
    entering = torch.zeros((1, 1, linear_shape(maps[half[0]])[0]), device="meta")
    seen: list[Tensor] = []

    def read(module: nn.Module, args: Any) -> Any:
        seen.append(args[0])
        return (args[0].to("meta"),)

    with ExitStack() as hooks, torch.inference_mode():
        hooks.callback(mlp.get_submodule(last).register_forward_pre_hook(read).remove)
        for name, module in maps.items():
            give = partial(lambda given, *_: given, outputs[name])
            hooks.callback(module.register_forward_hook(give).remove)
        mlp(entering)
        outputs[half[0]][..., half[1] : half[1] + width] *= -1
        mlp(entering)
    return torch.equal(seen[0], -seen[1])
