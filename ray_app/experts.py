"""From the weights of a run to experts, layer by layer: in this process, or as Ray tasks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from analysis import Analysis
from analysis.experts import (
    EXPERT_SITE,
    ExpertSettings,
    LayerExperts,
    expert_layers,
    keep_experts,
    pair_task,
    split_at_random,
    split_by_pairs,
    split_by_rows,
)
from analysis.pairs import neuron_pairs
from ray_app.capture.stage import locate_planned
from ray_app.models.projections import InputProjections
from ray_app.models.sites import SiteLocation
from ray_app.study import ModelSettings
from storage import Store

__all__ = ["LayerMap", "WeightsSpec", "make_experts", "split_layer", "split_layers", "weights_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsSpec:
    """All that a worker needs to read the weights of a run."""

    model: ModelSettings
    """Which model."""
    fingerprint: str
    """The weights that the run was planned with."""
    sites: tuple[SiteLocation, ...]
    """Its sites 'mlp'."""

    def open(self) -> InputProjections:
        """A reader of the weights.

        Raises:
            CaptureError: if the weights are not those of the run.
            ModelError: if they are not there.
        """
        return InputProjections(
            self.model, locate_planned(self.model, self.fingerprint), self.sites
        )


def weights_of(record: dict[str, Any]) -> WeightsSpec:
    """The weights of a run, from its record."""
    return WeightsSpec(
        model=ModelSettings.model_validate(record["model"]["settings"]),
        fingerprint=record["model"]["fingerprint"],
        sites=tuple(SiteLocation(**s) for s in record["sites"] if s["site"] == EXPERT_SITE),
    )


LayerMap = Callable[[WeightsSpec, ExpertSettings, Sequence[int]], Iterable[LayerExperts]]
"""Gives `split_layer` of every layer, in whatever order."""


def split_layers(
    spec: WeightsSpec, settings: ExpertSettings, layers: Sequence[int]
) -> Iterator[LayerExperts]:
    """Group the neurons of some layers by their weights, one after the other.

    Raises:
        CaptureError: if the weights are not those of the run.
        ModelError: if they cannot be read, or have no such projection.
    """
    weights = spec.open()
    for layer in layers:
        yield split_by_rows(weights.rows(layer, settings.projection), settings, layer)


def split_layer(spec: WeightsSpec, settings: ExpertSettings, layer: int) -> LayerExperts:
    """The same of one layer: what a Ray task does."""
    (found,) = split_layers(spec, settings, [layer])
    return found


def make_experts(
    store: Store,
    run: str,
    settings: ExpertSettings,
    *,
    mapper: LayerMap = split_layers,
    on_layer: Callable[[], None] = lambda: None,
) -> Analysis:
    """Group the neurons of a run into experts and keep them in the store.

    Args:
        store: the store that holds the run.
        run: id of the run.
        settings: how neurons are grouped.
        mapper: runs the layers of which weights are read; `split_layers` does so in this process.
        on_layer: called after each layer.

    Raises:
        AnalysisError: if the run has no MLP site, a layer has fewer neurons than experts, or no
            pairs of neurons were counted that the method reads.
        CaptureError: if the weights are not those of the run.
        ModelError: if the weights cannot be read, or have no such projection.
        StoreError: if there is no such run, or the store cannot be written.
    """
    record = store.run_record(run)
    widths = expert_layers(store, record, settings)

    def compute() -> Iterator[LayerExperts]:
        for found in _found(store, record, settings, widths, mapper):
            on_layer()
            yield found

    return keep_experts(store, record, settings, compute)


def _found(
    store: Store,
    record: dict[str, Any],
    settings: ExpertSettings,
    widths: dict[int, int],
    mapper: LayerMap,
) -> Iterable[LayerExperts]:
    if settings.method == "random":
        return (split_at_random(width, settings, layer) for layer, width in widths.items())
    if settings.method == "coactivation":
        run, task = record["run"], pair_task(record, settings)
        return (
            split_by_pairs(neuron_pairs(store, run, task, EXPERT_SITE, layer), settings, layer)
            for layer in widths
        )
    return mapper(weights_of(record), settings, sorted(widths))
