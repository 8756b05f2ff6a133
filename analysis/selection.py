"""Which neurons to remove: the top of a ranking, or as many at random."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.overlap import no_neuron, rank, score
from analysis.settings import Within
from analysis.steps import Steps
from storage.catalog import execute, open_connection
from storage.sqlfiles import load_query

__all__ = ["Neurons", "Ranking", "random_like", "rankings", "rankings_of_stats", "seed_of"]

Neurons = Mapping[tuple[str, int], np.ndarray]
"""(K,) int32 ascending indices of neurons by (site, layer); no entry is empty."""


def seed_of(*parts: Any) -> int:
    """A seed that depends on all parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True, slots=True, eq=False)
class _Stratum:
    """Neurons of one site that are ranked together, the highest score first."""

    site: str
    stratum: int | None
    """The layer, if neurons are ranked in each layer."""
    layers: np.ndarray
    neurons: np.ndarray

    def taken_by(self, selection: Neurons) -> np.ndarray:
        """(N,) bool: which of its neurons are in a selection."""
        taken = np.zeros(len(self.layers), dtype=bool)
        for (site, layer), chosen in selection.items():
            if site == self.site:
                taken |= (self.layers == layer) & np.isin(self.neurons, chosen)
        return taken


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """All neurons of a task from the highest score down, by site and, if so asked, by layer."""

    strata: tuple[_Stratum, ...]

    def count(self, fraction: float) -> int:
        """How many neurons a fraction selects."""
        return sum(_quota(fraction, stratum) for stratum in self.strata)

    def top(self, fraction: float, *, beside: Neurons | None = None) -> Neurons:
        """The top fraction of each site, or of each of its layers; arguments as `select`.

        Raises:
            AnalysisError: if no neuron is selected at some site or layer.
        """
        for stratum in self.strata:
            if _quota(fraction, stratum) == 0:
                raise no_neuron(fraction, len(stratum.layers), stratum.site, stratum.stratum)
        return self.select(fraction, beside=beside)

    def select(self, fraction: float, *, beside: Neurons | None = None) -> Neurons:
        """As `top`, where sites or layers of which the fraction is no neuron may go without.

        Args:
            fraction: in (0, 1].
            beside: neurons that are part of the selection whatever their score now is; the highest
                of the others fill it up.
        """
        found: dict[tuple[str, int], list[np.ndarray]] = {}
        for stratum in self.strata:
            # Sorting is stable: the taken ones come first, the others keep their order.
            order = np.argsort(~stratum.taken_by(beside or {}), kind="stable")
            chosen = order[: _quota(fraction, stratum)]
            layers, neurons = stratum.layers[chosen], stratum.neurons[chosen]
            for layer in np.unique(layers).tolist():
                found.setdefault((stratum.site, layer), []).append(neurons[layers == layer])
        return {key: np.sort(np.concatenate(found[key])) for key in sorted(found)}


def rankings(steps: Steps, run: str, parameters: dict[str, Any]) -> dict[str, Ranking]:
    """Rank all neurons of a run for each task but the reference.

    Args:
        steps: on a connection with the views of the run's store.
        run: id of the run.
        parameters: ``sites``, ``metrics`` (one), ``seed``, ``reference``, ``within`` and ``eps``.
    """
    within: Within = parameters["within"]
    score(steps, run, parameters)
    rank(steps, [1.0], within)
    steps.run("rankings")
    found: dict[str, list[_Stratum]] = {}
    for batch in steps.batches("rankings"):
        for row in batch.to_pylist():
            layers, neurons = (np.array(row[name], np.int32) for name in ("layers", "neurons"))
            stratum = _Stratum(row["site"], row["stratum"], layers, neurons)
            found.setdefault(row["task"], []).append(stratum)
    return {task: Ranking(tuple(strata)) for task, strata in found.items()}


def rankings_of_stats(stats: pa.Table, run: str, parameters: dict[str, Any]) -> dict[str, Ranking]:
    """Rank neurons by statistics that are in no store, such as those of an ablated model.

    Args:
        stats: rows of table ``stats`` with columns ``run`` and ``task``.
        run: id of the run.
        parameters: as for `rankings`.
    """
    connection = open_connection()
    connection.register("stats", stats)
    merged = load_query("storage", "neuron_stats").text.format()
    execute(connection, f"create temp view neuron_stats as {merged}")
    return rankings(Steps(connection, lambda step: None), run, parameters)


def random_like(
    neurons: Neurons, widths: Mapping[tuple[str, int], int], *, seed: int, name: str
) -> Neurons:
    """As many neurons of each site and layer, drawn at random without replacement.

    What a larger selection draws holds what a smaller one does, so that a curve over fractions
    removes ever more.

    Args:
        neurons: the selection to match.
        widths: number of neurons of each site and layer.
        seed: one of several controls.
        name: the task, so that controls of different tasks differ.
    """
    drawn = {}
    for key, chosen in neurons.items():
        random = np.random.default_rng(seed_of(seed, name, *key))
        drawn[key] = np.sort(random.permutation(widths[key])[: len(chosen)]).astype(np.int32)
    return drawn


def _quota(fraction: float, stratum: _Stratum) -> int:
    # As in quotas.sql: 0.29 * 100 is 28.999999999999996 in floating point.
    return int(np.floor(fraction * len(stratum.layers) + 1e-9))
