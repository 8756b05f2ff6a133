"""What the service can be asked, as functions of a store: no HTTP, no Ray, no processes.

Each takes the store and its own arguments and returns JSON-ready values with the column names of
the SQL views.
"""

import json
from collections.abc import Callable
from typing import Any

from analysis import AnalysisError
from analysis.neuron import NeuronView, open_neuron
from analysis.summary import AnalysisView, newest_analysis, query_rows
from ray_app.service.answers import json_ready
from storage import TABLES, ActlakeError, Store
from storage.catalog import fetch
from storage.sqlfiles import load_query
from storage.views import VIEWS

__all__ = ["QUESTIONS", "NotFoundError"]

EXAMPLES = {
    "example_runs": (),
    "example_loss": ("tokens",),
    "example_activity": ("stats",),
    "example_overlap": ("overlap",),
    "example_specific": ("selections",),
    "example_layers": ("selections",),
    "example_strongest": ("top", "samples"),
    "example_tokens": ("tokens",),
    "example_positions": ("tokens",),
}
"""Queries to start from, and the tables that each needs rows of."""

_VALUE = "share of the neurons selected for the task of the row that the task of the column selects"


class NotFoundError(ActlakeError):
    """The store has no such run, neuron or analysis."""


def schema(store: Store) -> dict[str, Any]:
    """Every view: name, purpose, grain and columns."""
    meanings = {
        name: TABLES[name].column_docs() if name in TABLES else load_query("storage", name).columns
        for name in VIEWS
    }
    columns: dict[str, list[dict[str, Any]]] = {name: [] for name in VIEWS}
    for row in _rows(store, "service_columns"):
        name, column = row["table_name"], row["column_name"]
        if name in columns:
            meaning = meanings[name].get(column, "")
            columns[name].append({"name": column, "type": row["data_type"], "meaning": meaning})
    return {"views": [_described(name) | {"columns": columns[name]} for name in VIEWS]}


def _described(name: str) -> dict[str, str]:
    source = TABLES[name] if name in TABLES else load_query("storage", name)
    return {"name": name, "purpose": source.purpose, "grain": source.grain}


def examples(store: Store) -> dict[str, Any]:
    """Queries to start from, of those whose tables have rows in the store."""
    there = {row["table_name"] for row in _rows(store, "service_tables")}
    queries = [
        load_query("ray_app", name) for name, needed in EXAMPLES.items() if there >= {*needed}
    ]
    return {"examples": [{"title": q.purpose.rstrip("."), "query": q.text} for q in queries]}


def runs(store: Store) -> dict[str, Any]:
    """The rows of the view runs, the newest first."""
    return {"runs": _rows(store, "service_runs")}


def run(store: Store, run: str) -> dict[str, Any]:
    """One run: its model, what it captures, its sites and its tasks."""
    record = _record(store, run)
    chosen = ("run", "study", "created", "reference", "model", "capture", "sites")
    return {key: record.get(key) for key in chosen} | {
        "tasks": _rows(store, "service_tasks", run=run)
    }


def neuron(
    store: Store,
    run: str,
    site: str,
    layer: int,
    neuron: int,
    task: str | None,
    count: int | None,
    per_sample: bool,
) -> dict[str, Any]:
    """One neuron: statistics by task, scores, examples with their text, and its experts."""
    _record(store, run)
    try:
        view = open_neuron(store, run, site=site, layer=layer, neuron=neuron)
    except AnalysisError as error:
        raise NotFoundError(str(error)) from error
    place = {"run": run, "site": site, "layer": layer, "neuron": neuron}
    return {
        **place,
        "width": view.width,
        "head": view.head,
        "modality": view.modality,
        "statistics": json_ready(view.statistics()),
        "scores": _scores(view),
        **_examples(view, task, count, per_sample),
        "experts": _rows(store, "service_experts", **place),
    }


def _scores(view: NeuronView) -> dict[str, Any] | None:
    found = view.newest_scores()
    if found is None:
        return None
    scored, rows = found
    return {
        "analysis": scored.analysis,
        "metric": scored.metric,
        "reference": scored.reference,
        "rows": json_ready(rows),
    }


def _examples(
    view: NeuronView, task: str | None, count: int | None, per_sample: bool
) -> dict[str, Any]:
    if view.top == 0:
        reason = f"run {view.run!r} kept no top activations (capture.top was 0, or its budget full)"
        return {"examples": None, "examples_missing": reason}
    found = view.examples(task=task, count=count, per_sample=per_sample)
    return {"examples": json_ready(found), "examples_missing": None}


def analyses(store: Store, run: str | None) -> dict[str, Any]:
    """The analyses of a run or of all, the newest first."""
    return {"analyses": [_analysis(row) for row in _analyses(store, run=run)]}


def overlap(
    store: Store, analysis: str, metric: str | None, fraction: float | None, site: str | None
) -> dict[str, Any]:
    """How many selected neurons every two tasks share, as a matrix for one site."""
    view, there = _view(store, analysis, metric, fraction)
    site = _site(site, view.sites)
    rows = [row for row in view.overlap() if row["site"] == site]
    tasks = sorted({row[key] for row in rows for key in ("task_a", "task_b")})
    shares = {(row["task_a"], row["task_b"]): row["share_of_a"] for row in rows}
    return {
        **there,
        "site": site,
        "tasks": tasks,
        "matrix": [[json_ready(shares.get((a, b))) for b in tasks] for a in tasks],
        "value": _VALUE,
        "by_chance": view.fraction,
        "rows": json_ready(rows),
    }


def layers(
    store: Store, analysis: str, metric: str | None, fraction: float | None, site: str | None
) -> dict[str, Any]:
    """In which layers the selected neurons of each task lie."""
    view, there = _view(store, analysis, metric, fraction)
    if site is not None:
        _site(site, view.sites)
    rows = [row for row in view.layer_profile() if site in (None, row["site"])]
    totals: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["site"], row["task"]
        totals[key] = totals.get(key, 0) + row["num_selected"]
    for row in rows:
        row["share"] = row["num_selected"] / totals[row["site"], row["task"]]
    return {**there, "site": site, "rows": json_ready(rows)}


def _view(
    store: Store, analysis: str, metric: str | None, fraction: float | None
) -> tuple[AnalysisView, dict[str, Any]]:
    """An analysis of overlap, and what every answer about it says."""
    found = _analyses(store, analysis=analysis)
    if not found or "overlap" not in found[0]["tables"]:
        raise NotFoundError(
            f"there is no analysis of overlap {analysis!r}: GET /api/analyses names what there is."
        )
    run = found[0]["run"]
    view = newest_analysis(store, run, analysis=analysis, metric=metric, fraction=fraction)
    (known,) = query_rows(store, "newest_analysis", run=run, analysis=analysis)
    return view, {
        "analysis": analysis,
        "run": run,
        "reference": view.reference,
        "within": view.within,
        "metric": view.metric,
        "metrics": known["metrics"],
        "fraction": view.fraction,
        "fractions": known["fractions"],
        "sites": list(view.sites),
    }


def _site(wanted: str | None, sites: tuple[str, ...]) -> str:
    if wanted is None:
        return "mlp" if "mlp" in sites else sites[0]
    if wanted not in sites:
        raise AnalysisError(
            f"site must be one that the analysis has ({', '.join(sites)}), found {wanted!r}."
        )
    return wanted


def _analyses(
    store: Store, *, run: str | None = None, analysis: str | None = None
) -> list[dict[str, Any]]:
    return _rows(store, "service_analyses", run=run, analysis=analysis)


def _analysis(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"parameters": json.loads(row["parameters"])}


def _record(store: Store, run: str) -> dict[str, Any]:
    if run not in store.runs():
        raise NotFoundError(f"there is no run {run!r}: GET /api/runs names those there are.")
    return store.run_record(run)


def _rows(store: Store, name: str, **params: Any) -> list[dict[str, Any]]:
    """JSON-ready rows of one SQL file of this package."""
    table = fetch(store.connection, load_query("ray_app", name).text, params)
    rows: list[dict[str, Any]] = json_ready(table.to_pylist())
    return rows


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    question.__name__: question
    for question in (schema, examples, runs, run, neuron, analyses, overlap, layers)
}
"""Everything but SQL, by name."""
