"""Whether the neurons that a task selects lie together in experts, layer by layer.

After Pochinkov, Jones and Rahman (2024, arXiv 2408.17324), with controls that the paper lacks. Of
a layer with d neurons in C experts, a task selects the s of highest score. Let y_i be how many of
them lie in the i experts that hold most. Then, over the first x = min(s, C) experts,

    AUC = (y_0 + ... + y_(x-1)) / (x * y_x),

which is largest (`best_area`) if the selected neurons fill experts one by one, and is compared with
that of s neurons drawn at random. Adjusted mutual information (Vinh, Epps and Bailey, 2010) says
how much the experts tell of the selection beyond chance, and the hypergeometric distribution how
likely an expert holds as many selected neurons by chance (Zhang et al., 2023, arXiv 2305.18390).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import hypergeom

from analysis.errors import AnalysisError
from analysis.experts import EXPERT_SITE, run_of_experts
from analysis.keeping import Analysis, committed_lineage, keep
from analysis.overlap import rank, score
from analysis.settings import AnalysisSettings
from analysis.steps import Steps
from storage import TABLES, Store
from storage.sqlfiles import load_query

__all__ = [
    "AlignmentSettings",
    "align_experts",
    "alignment_by_layer",
    "alignment_by_run",
    "alignment_curve",
    "area",
    "best_area",
    "mutual_information",
    "simulated_areas",
]

_TABLES = ("cluster_alignment", "cluster_enrichment")

Counts = NDArray[np.int64]
_Row = dict[str, Any]


class AlignmentSettings(BaseModel):
    """What is compared with experts: the selections of tasks, and chance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    selection: AnalysisSettings = Field(
        default_factory=lambda: AnalysisSettings(within="layer", sites=[EXPERT_SITE]),
        description="Metrics and fractions of the neurons that tasks select in each layer.",
    )
    simulations: int = Field(
        1000, ge=2, description="Random selections that each is compared with."
    )
    seed: int = Field(0, ge=0, description="Seed of the random selections.")

    def parameters(self) -> dict[str, Any]:
        """All that decides the result, JSON-ready."""
        chance = {"simulations": self.simulations, "simulation_seed": self.seed}
        return {**self.selection.parameters([EXPERT_SITE]), "within": "layer", **chance}


def align_experts(
    store: Store,
    experts: Sequence[str],
    settings: AlignmentSettings,
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> Analysis:
    """Compare experts with the selections of tasks, in every combination of experts and runs.

    Each of the experts is compared with the scores of each run that any of them was made of: with
    those of a trained model and of its random twin, these are the four combinations of the paper.

    Args:
        store: the store.
        experts: ids of analyses of the kind experts; the first one's run is that of the result.
        settings: metrics, fractions and simulations.
        on_step: called with the name of each step before it runs.

    Raises:
        AnalysisError: if one of the experts is not there, a run is not complete or has no
            reference, layers differ in number or width, or a fraction selects no neuron.
    """
    of_run = {name: run_of_experts(store, name) for name in dict.fromkeys(experts)}
    runs = list(dict.fromkeys(of_run.values()))
    records = {run: store.run_record(run) for run in runs}
    _check_same_neurons(records)
    parameters = settings.parameters() | {
        "experts": list(of_run),
        "references": {run: _reference(record) for run, record in records.items()},
    }
    advice = "finish it with `actlake capture` first"
    lineage = {
        run: committed_lineage(store, record, partial=False, advice=advice)
        for run, record in records.items()
    }

    def compute() -> Steps:
        made = [_compare(store, run, parameters, on_step) for run in runs]
        results = Steps(store.connect(), on_step)
        for name, tables in zip(_TABLES, zip(*made, strict=True), strict=True):
            results.give(name, pa.concat_tables(tables))
        return results

    key = {"run": runs[0], "parameters": parameters, "lineage": lineage}
    return keep(store, "alignment", key, _TABLES, compute)


def alignment_by_layer(store: Store, analysis: str, metric: str, fraction: float) -> list[_Row]:
    """Mean and standard deviation over tasks, by combination of experts and run, and by layer.

    Columns experts, experts_run, method, run, layer, num_tasks, auc, auc_std, auc_best, auc_random,
    ami, ami_std and enriched (mean share of a task's selection that lies in experts which hold so
    many of it with a probability of at most 0.001 by chance).
    """
    params = {"analysis": analysis, "metric": metric, "fraction": fraction}
    return _rows(store, "alignment_by_layer", params)


def alignment_by_run(store: Store, analysis: str, metric: str, fraction: float) -> list[_Row]:
    """The same over all layers: one row per combination of experts and run."""
    params = {"analysis": analysis, "metric": metric, "fraction": fraction}
    return _rows(store, "alignment_by_run", params)


def alignment_curve(held: Counts) -> Counts:
    """y_0 .. y_x: selected neurons in the i experts that hold most, x = min(selected, experts).

    Args:
        held: (C,) selected neurons of each expert.
    """
    most_first = np.concatenate([[0], np.cumsum(np.sort(held)[::-1])])
    curve: Counts = most_first[: min(int(held.sum()), len(held)) + 1]
    return curve


def area(curve: Counts) -> float:
    """Area under a curve, relative to x * y_x; 0 if there is one step alone."""
    return float(curve[:-1].sum() / ((len(curve) - 1) * curve[-1]))


def best_area(sizes: Counts, num_selected: int) -> float:
    """The largest area that experts of these sizes allow: selected neurons fill them one by one."""
    filled = np.minimum(np.cumsum(np.sort(sizes)[::-1]), num_selected)
    return area(alignment_curve(np.diff(filled, prepend=0)))


@cache
def simulated_areas(
    sizes: tuple[int, ...], num_selected: int, num_simulations: int, seed: int
) -> NDArray[np.float64]:
    """Areas, sorted, of selections drawn at random without replacement.

    Args:
        sizes: neurons of each expert.
        num_selected: neurons of a selection.
        num_simulations: number of selections.
        seed: what is drawn depends on it and on the other arguments alone.
    """
    random = np.random.default_rng(seed)
    held = random.multivariate_hypergeometric(sizes, num_selected, size=num_simulations)
    return np.sort([area(alignment_curve(one)) for one in held])


def mutual_information(sizes: Counts, held: Counts) -> float | None:
    """Adjusted mutual information of experts and selection, after Vinh, Epps and Bailey (2010).

    (I - E[I]) / (H - E[I]), where H is the smaller of the two entropies and E[I] the mean over all
    selections of as many neurons: 1 if every expert is selected wholly or not at all, 0 on average
    by chance.

    Args:
        sizes: (C,) neurons of each expert.
        held: (C,) selected neurons of each.

    Returns:
        None if the experts are one, or the selection all neurons, of which nothing can be told.
    """
    total, selected = int(sizes.sum()), int(held.sum())
    largest = min(_entropy(sizes / total), _entropy(np.array([selected, total - selected]) / total))
    expected = _expected_information(tuple(np.sort(sizes).tolist()), selected)
    if largest - expected < 1e-12:
        return None
    information = float(_information(held, sizes, total, selected).sum())
    return (information - expected) / (largest - expected)


@cache
def _expected_information(sizes: tuple[int, ...], selected: int) -> float:
    total, expected = sum(sizes), 0.0
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        held = np.arange(max(0, selected - (total - size)), min(size, selected) + 1)
        probabilities = hypergeom.pmf(held, total, selected, size)
        expected += count * float(probabilities @ _information(held, size, total, selected))
    return expected


def _information(held: Counts, sizes: Any, total: int, selected: int) -> NDArray[np.float64]:
    """What each expert adds to the mutual information, in nats."""
    inside = held / total * _log(held * total, sizes * selected)
    rest = sizes - held
    added: NDArray[np.float64] = inside + rest / total * _log(
        rest * total, sizes * (total - selected)
    )
    return added


def _log(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    """Logarithm of a quotient; 0 where the numerator is 0, which is where it counts nothing."""
    is_there = np.asarray(numerator) > 0
    quotient = np.where(is_there, numerator, 1) / np.where(is_there, denominator, 1)
    logarithm: NDArray[np.float64] = np.log(quotient)
    return logarithm


def _entropy(shares: NDArray[np.float64]) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _compare(
    store: Store, run: str, parameters: dict[str, Any], on_step: Callable[[str], None]
) -> tuple[pa.Table, pa.Table]:
    """The tables `_TABLES` of the scores of one run."""
    steps = Steps(store.connect(), on_step)
    score(steps, run, {**parameters, "reference": parameters["references"][run]})
    rank(steps, parameters["fractions"], "layer")
    steps.run("expert_counts", {"experts": parameters["experts"], "run": run})
    steps.run("cluster_enrichment")
    steps.run("held_by_layer")
    simulation = parameters["simulations"], parameters["simulation_seed"]
    rows = [
        row | _aligned(np.array(row.pop("sizes")), np.array(row.pop("held")), *simulation)
        for row in steps.table("held_by_layer").to_pylist()
    ]
    aligned = pa.Table.from_pylist(rows, schema=TABLES["cluster_alignment"].schema)
    return aligned, steps.table("cluster_enrichment")


def _aligned(sizes: Counts, held: Counts, num_simulations: int, seed: int) -> dict[str, Any]:
    selected, curve = int(held.sum()), alignment_curve(held)
    found = area(curve)
    by_chance = simulated_areas(tuple(np.sort(sizes).tolist()), selected, num_simulations, seed)
    # Equal areas may differ in the last bit.
    as_large = int((by_chance >= found - 1e-12).sum())
    return {
        "num_neurons": int(sizes.sum()),
        "num_experts": len(sizes),
        "num_selected": selected,
        "curve": curve.tolist(),
        "auc": found,
        "auc_best": best_area(sizes, selected),
        "auc_random": float(by_chance.mean()),
        "auc_random_std": float(by_chance.std(ddof=1)),
        "p_value": (1 + as_large) / (1 + num_simulations),
        "ami": mutual_information(sizes, held),
    }


def _reference(record: dict[str, Any]) -> str:
    if record["reference"] is None:
        raise AnalysisError(
            f"the study of run {record['run']!r} named no reference, so its neurons have no scores "
            "to select by: capture a study with one."
        )
    return str(record["reference"])


def _check_same_neurons(records: dict[str, dict[str, Any]]) -> None:
    first, *others = (
        (run, {s["layer"]: s["width"] for s in record["sites"] if s["site"] == EXPERT_SITE})
        for run, record in records.items()
    )
    for run, widths in others:
        if widths != first[1]:
            shapes = (
                f"{len(w)} layers of {' or '.join(f'{n:,}' for n in sorted(set(w.values())))}"
                for w in (first[1], widths)
            )
            raise AnalysisError(
                f"experts can be compared only among models of one architecture, found "
                f"{next(shapes)} neurons in {first[0]} and {next(shapes)} in {run}: name experts "
                "of a twin of the same shape."
            )


def _rows(store: Store, name: str, params: dict[str, Any]) -> list[_Row]:
    rows: list[_Row] = store.table(load_query("analysis", name).text, params).to_pylist()
    return rows
