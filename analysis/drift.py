"""From two runs over the same tasks to how far they differ, by task, site and layer.

The runs may be of one model in two precisions, of trained and of random weights, or of two
checkpoints: they need the same tasks and the same neurons. Importance, score and selection are
those of `analysis.overlap`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.errors import AnalysisError
from analysis.keeping import Analysis, committed_lineage, keep
from analysis.overlap import rank, score
from analysis.persistence import mantel_test
from analysis.settings import AnalysisSettings
from analysis.spearman import correlations_by_stratum
from analysis.steps import Steps
from storage import Store
from storage.sqlfiles import load_query, quote

__all__ = [
    "Drift",
    "compare_runs",
    "drift_by_layer",
    "drift_by_task",
    "drift_query",
    "persistence_of",
]


_OF_BOTH = ("importance", "ranks", "overlap", "drift_tasks")
"""Results of one run that are compared with those of the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """A finished comparison of two runs."""

    analysis: Analysis
    """Where it is kept."""
    left_out: tuple[str, ...]
    """Tasks and sites that only one of the runs has, such as ``"task 'c' (only in lab-1)"``."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two runs."""

    store: Store
    record: dict[str, Any]

    @property
    def run(self) -> str:
        return str(self.record["run"])

    @property
    def tasks(self) -> set[str]:
        return {task["task"] for task in self.record["tasks"]}

    @property
    def sites(self) -> set[str]:
        return {site["site"] for site in self.record["sites"]}

    def widths(self, site: str) -> dict[int, int]:
        """Number of neurons of each captured layer, in order."""
        sites = (s for s in self.record["sites"] if s["site"] == site)
        return dict(sorted((s["layer"], s["width"]) for s in sites))


def compare_runs(
    store: Store,
    run_a: str,
    run_b: str,
    settings: AnalysisSettings,
    *,
    store_b: Store | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Drift:
    """Compute how far run B is from run A and keep it as table ``drift`` of a store.

    Args:
        store: the store that holds run A and gets the result.
        run_a: id of the first run.
        run_b: id of the second run.
        settings: metrics, fractions, sites and so on, used for both runs.
        store_b: the store that holds run B, if it is another one.
        on_step: called with the name of each step before it runs.

    Raises:
        AnalysisError: if the runs are one and the same, are not complete, or differ in reference,
            layers or widths, or share no task; or if a site or fraction does not fit them.
        StoreError: if there is no such run, or the result cannot be written.
    """
    other = store if store_b is None or store_b.files.root == store.files.root else store_b
    a, b = _Side(store, store.run_record(run_a)), _Side(other, other.run_record(run_b))
    if a.store is b.store and a.run == b.run:
        raise AnalysisError(
            f"the two runs must differ, found {a.run!r} twice: name another run to compare with."
        )
    reference = _common_reference(a, b)
    tasks = _common_tasks(a, b, reference)
    sites = _common_sites(a, b, settings)
    parameters = {
        "run_b": b.run,
        "reference": reference,
        "tasks": tasks,
        **settings.parameters(sites),
    }
    lineage: dict[str, Any] = {name: _lineage(side) for name, side in (("run_a", a), ("run_b", b))}
    if a.store is not b.store:
        lineage["store_b"] = b.store.files.root
    key = {"run": a.run, "parameters": parameters, "lineage": lineage}
    tables = ("drift", "persistence")
    analysis = keep(store, "drift", key, tables, lambda: _compute(a, b, parameters, on_step))
    return Drift(analysis=analysis, left_out=_left_out(a, b, settings))


def drift_by_task(store: Store, analysis: str, metric: str) -> list[dict[str, Any]]:
    """The drift of each task and site over the whole model, by one of the metrics of a drift.

    Columns of the table ``drift``, but ``fractions``, ``shares`` (share_of_a) and ``lifts`` are
    lists, from the smallest fraction up.
    """
    return _rows(store, "drift_by_task", {"analysis": analysis, "metric": metric})


def drift_by_layer(store: Store, analysis: str, metric: str, count: int) -> list[dict[str, Any]]:
    """The `count` layers of each site that correlate least, the least first.

    Columns of the table ``drift`` at its smallest fraction: correlation and errors are means over
    tasks, share_of_a and lift those of all tasks together.
    """
    params = {"analysis": analysis, "metric": metric, "count": count}
    return _rows(store, "drift_by_layer", params)


def persistence_of(store: Store, analysis: str, metric: str) -> list[dict[str, Any]]:
    """Rows of table ``persistence`` over the whole model, by site and fraction."""
    return _rows(store, "persistence_rows", {"analysis": analysis, "metric": metric})


def drift_query(analysis: str) -> str:
    """SQL that gives all rows of a drift."""
    return load_query("analysis", "drift_rows").text.format(analysis=quote(analysis))


def _rows(store: Store, name: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = store.table(load_query("analysis", name).text, params).to_pylist()
    return rows


def _compute(
    a: _Side, b: _Side, parameters: dict[str, Any], on_step: Callable[[str], None]
) -> Steps:
    steps = Steps(a.store.connect(), on_step)
    in_one_store = a.store is b.store
    # With the same numbers for names, rows of both runs are joined by the numbers.
    steps.intern({a.run, b.run, *a.tasks, *b.tasks, *parameters["metrics"], *parameters["sites"]})
    steps_b = steps if in_one_store else Steps(b.store.connect(), on_step)
    _measure(b, steps_b, parameters)
    for name in _OF_BOTH:
        if in_one_store:
            steps.rename(name, f"{name}_b")
        else:
            steps.take(steps_b, name, into=f"{name}_b")
    if in_one_store:
        steps.forget("scores", "quotas")
    _measure(a, steps, parameters)
    steps.run("drift_pairs")
    steps.run("drift_strata")
    steps.give("drift_correlations", correlations_by_stratum(steps.table("drift_strata")))
    steps.run("drift_errors")
    steps.run("drift_shared", {"reference": parameters["reference"]})
    names = {"run_a": a.run, "run_b": b.run, "within": parameters["within"]}
    steps.run("drift", names)
    steps.run("persistence_pairs")
    steps.give("mantel", _mantel_tests(steps.table("persistence_pairs")))
    steps.run("persistence", names)
    return steps


def _measure(side: _Side, steps: Steps, parameters: dict[str, Any]) -> None:
    """Leave the tables `_OF_BOTH` of one run behind."""
    score(steps, side.run, parameters)
    rank(steps, parameters["fractions"], parameters["within"])
    steps.run("overlap", {"within": parameters["within"]})
    steps.run("drift_tasks", {"run": side.run})


def _mantel_tests(pairs: pa.Table) -> pa.Table:
    """Tests of the overlap matrices of both runs, from rows of persistence_pairs.sql."""
    keys = ["metric", "site", "fraction", "layer"]
    num_tasks = len({*pairs["task_a"].to_pylist(), *pairs["task_b"].to_pylist()})
    num_pairs = num_tasks * (num_tasks - 1) // 2
    tests = pairs.select(keys).take(np.arange(0, pairs.num_rows, max(num_pairs, 1)))
    first, second = (
        pairs[name].to_numpy().reshape(tests.num_rows, num_pairs) for name in ("share_a", "share_b")
    )
    correlation, p_value, num_permutations = mantel_test(first, second, num_tasks)
    return (
        tests.append_column("correlation", pa.array(correlation, from_pandas=True))
        .append_column("p_value", pa.array(p_value, from_pandas=True))
        .append_column("num_permutations", pa.array([num_permutations] * tests.num_rows))
    )


def _lineage(side: _Side) -> dict[str, Any]:
    advice = "finish it with `actlake capture` first"
    shards = committed_lineage(side.store, side.record, partial=False, advice=advice)
    return {"run": side.run, **shards}


def _common_reference(a: _Side, b: _Side) -> str:
    references = [side.record["reference"] for side in (a, b)]
    if references[0] != references[1] or references[0] is None:
        found = " and ".join(
            f"{'none' if name is None else repr(name)} in {side.run}"
            for name, side in zip(references, (a, b), strict=True)
        )
        raise AnalysisError(
            f"both runs must score against the same reference task, found {found}: compare runs of "
            "studies with the same reference."
        )
    return str(references[0])


def _common_tasks(a: _Side, b: _Side, reference: str) -> list[str]:
    if not (a.tasks & b.tasks) - {reference}:
        of_a, of_b = (", ".join(sorted(side.tasks - {reference})) for side in (a, b))
        raise AnalysisError(
            f"the runs must have a task in common besides the reference {reference!r}, found "
            f"{of_a or 'none'} in {a.run} and {of_b or 'none'} in {b.run}: compare runs over the "
            "same tasks."
        )
    return sorted(a.tasks & b.tasks)


def _common_sites(a: _Side, b: _Side, settings: AnalysisSettings) -> list[str]:
    sites = sorted(settings.sites or a.sites & b.sites)
    if not sites or not set(sites) <= a.sites & b.sites:
        of_a, of_b = (", ".join(sorted(side.sites)) for side in (a, b))
        raise AnalysisError(
            f"the sites to compare must be captured by both runs, found {of_a} in {a.run} and "
            f"{of_b} in {b.run}: choose sites that both have."
        )
    for site in sites:
        _check_same_neurons(a, b, site)
    return sites


def _check_same_neurons(a: _Side, b: _Side, site: str) -> None:
    of_a, of_b = a.widths(site), b.widths(site)
    if len(of_a) != len(of_b):
        found = f"{len(of_a)} layers in {a.run} and {len(of_b)} in {b.run}"
    elif of_a.keys() != of_b.keys():
        layer = min(of_a.keys() ^ of_b.keys())
        found = f"layer {layer} only in {a.run if layer in of_a else b.run}"
    elif of_a != of_b:
        layer = min(layer for layer in of_a if of_a[layer] != of_b[layer])
        found = (
            f"{of_a[layer]:,} neurons of layer {layer} in {a.run} and {of_b[layer]:,} in {b.run}"
        )
    else:
        return
    raise AnalysisError(
        f"both runs must have the same neurons, at site {site!r} found {found}: compare runs of "
        "models of one shape, captured at the same layers."
    )


def _left_out(a: _Side, b: _Side, settings: AnalysisSettings) -> tuple[str, ...]:
    found = [("task", name, name in a.tasks) for name in sorted(a.tasks ^ b.tasks)]
    if not settings.sites:
        found += [("site", name, name in a.sites) for name in sorted(a.sites ^ b.sites)]
    return tuple(
        f"{kind} {name!r} (only in {a.run if in_a else b.run})" for kind, name, in_a in found
    )
