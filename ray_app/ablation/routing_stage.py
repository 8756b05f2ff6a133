"""A stage whose tokens keep only the experts that a router chooses for them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.experts import EXPERT_SITE
from analysis.routing import KeptMass, Router
from analysis.selection import seed_of
from ray_app.ablation.routers import LayerRouters, RoutedLayer
from ray_app.ablation.stage import EvaluationSpec, EvaluationStage, OpenTrial, Trial
from ray_app.capture.recorders import SiteKey
from ray_app.capture.shards import Batch
from ray_app.capture.stage import load_stage_model
from ray_app.models.hooks import edit_inputs, read_inputs
from ray_app.models.parts import StageModel
from ray_app.models.projections import first_map

__all__ = ["RoutingSpec", "RoutingStage", "RoutingTrial", "build_routing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingSpec(EvaluationSpec):
    """All that a worker needs to build a stage that routes."""

    experts: Mapping[str, Mapping[int, LayerRouters]] = field(default_factory=dict)
    """Routers of the stage's layers, by id of the experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTrial(Trial):
    """One shard whose tokens keep some experts, or whose experts are looked at.

    Of the measures, ``predictions`` routes; ``inputs`` gives what routers learn from, and
    ``masses`` what all routers keep, both of the unpruned model.
    """

    experts: str
    """Id of the experts."""
    router: Router = "truth"
    """What chooses, where tokens are routed."""
    num_kept: tuple[int, ...] = ()
    """How many experts of each layer are kept; one number where tokens are routed."""
    layers: tuple[int, ...] = ()
    """Layers whose inputs are asked for."""
    seed: int = 0
    """Seed of random experts."""

    def seed_of(self, layer: int, batch: Batch) -> int:
        """Seed of the random experts of a layer in a batch."""
        return seed_of(self.seed, layer, *batch.samples.tolist())


def build_routing(spec: RoutingSpec, *, device: str = "cpu") -> "RoutingStage":
    """Load the layers of a stage; errors as `build_stage`."""
    return RoutingStage(load_stage_model(spec, device=device), spec)


class RoutingStage(EvaluationStage):
    """Runs trials and measures; trials that are no `RoutingTrial` as `EvaluationStage` does."""

    def __init__(self, model: StageModel, spec: RoutingSpec) -> None:
        super().__init__(model, spec)
        self._entrances: dict[int, nn.Module] = {
            site.layer: model.model.get_submodule(first_map(model.model, site))
            for site in spec.sites
            if site.site == EXPERT_SITE
        }
        self._routed = {
            name: {layer: RoutedLayer(routers, model.device) for layer, routers in layers.items()}
            for name, layers in spec.experts.items()
        }

    def _readers(self, trial: Trial) -> dict[SiteKey, Any]:
        if not isinstance(trial, RoutingTrial):
            return super()._readers(trial)
        layers = self._routed[trial.experts]
        if trial.measure == "inputs":
            chosen = [layer for layer in trial.layers if layer in layers]
            return {(EXPERT_SITE, layer): _Inputs(layers[layer]) for layer in chosen}
        if trial.measure == "masses":
            counts = list(trial.num_kept)
            return {(EXPERT_SITE, n): _Masses(layer, counts) for n, layer in layers.items()}
        return {}

    @contextmanager
    def _edited(self, opened: OpenTrial, batch: Batch) -> Iterator[None]:
        trial = opened.trial
        if not isinstance(trial, RoutingTrial):
            with super()._edited(opened, batch):
                yield
            return
        layers = self._routed[trial.experts]
        entered: dict[int, Tensor] = {}

        def enter(layer: int, x: Tensor) -> None:
            # OPT flattens its batch before the MLP: positions are rows either way.
            entered[layer] = x.flatten(0, -2)
            if reader := opened.readers.get((EXPERT_SITE, layer)):
                reader.enter(entered[layer], trial.seed_of(layer, batch))

        def route(layer: int, z: Tensor) -> Tensor:
            rows, seed = z.flatten(0, -2), trial.seed_of(layer, batch)
            scores = layers[layer].scores(trial.router, entered.pop(layer), rows, seed=seed)
            return layers[layer].keep(rows, scores, trial.num_kept[0]).view_as(z)

        is_routed = trial.measure == "predictions"
        exits = {n: self._modules[EXPERT_SITE, n] for n in layers} if is_routed else {}
        with (
            read_inputs({n: self._entrances[n] for n in layers}, enter),
            edit_inputs(exits, route),
        ):
            yield

    def _measured(self, closed: OpenTrial) -> list[Any]:
        if closed.trial.measure in ("inputs", "masses"):
            return [{layer: reader.result() for (_, layer), reader in closed.readers.items()}]
        return super()._measured(closed)


class _Reader:
    """Sees what enters an MLP, and then its activations."""

    def __init__(self, layer: RoutedLayer) -> None:
        self._layer = layer
        self._x = torch.empty(0)
        self._seed = 0

    def enter(self, x: Tensor, seed: int) -> None:
        """Take the (positions, width of the residual stream) inputs of the MLP."""
        self._x, self._seed = x, seed

    def _counted(self, z: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs and activations of the positions that count."""
        if counted is None:
            return self._x, z
        index = counted.to(z.device)
        return self._x.index_select(0, index), z.index_select(0, index)


class _Inputs(_Reader):
    """Keeps the inputs of an MLP and the masses of its experts."""

    def __init__(self, layer: RoutedLayer) -> None:
        super().__init__(layer)
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, z: Tensor, counted: Tensor | None) -> None:
        """Add (positions, width) activations."""
        x, z = self._counted(z, counted)
        self._kept.append((x.float().cpu().numpy(), self._layer.masses(z).cpu().numpy()))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, width of the residual stream) and (C, experts) float32, of C counted positions."""
        x, masses = zip(*self._kept, strict=True)
        return np.concatenate(x), np.concatenate(masses)


class _Masses(_Reader):
    """Adds up what routers keep."""

    def __init__(self, layer: RoutedLayer, counts: list[int]) -> None:
        super().__init__(layer)
        self._counts = counts
        self._sum: KeptMass | None = None

    def add(self, z: Tensor, counted: Tensor | None) -> None:
        """Add (positions, width) activations."""
        x, z = self._counted(z, counted)
        added = self._layer.kept_mass(x, z, self._counts, seed=self._seed)
        self._sum = added if self._sum is None else self._sum + added

    def result(self) -> KeptMass | None:
        """The sums; None if there were no batches."""
        return self._sum
