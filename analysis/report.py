"""What a store says, gathered for one page: each figure with its rows and the query that gave them.

The page draws figures of four kinds, whose keys `analysis/web/report.js` explains. A figure shows
those rows of its query that its controls leave, so fractions and measures can be changed offline.
"""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import pyarrow as pa

from analysis.errors import AnalysisError
from analysis.summary import query_rows
from storage import Store
from storage.sqlfiles import filled, load_query

__all__ = ["make_report"]

_MAX_EXPERTS = 16
"""Most experts of a layer in the enrichment of one figure: the richest."""

_FRACTION = {"column": "fraction", "name": "top fraction"}

Figure = dict[str, Any]
Section = dict[str, Any]


def make_report(store: Store, run: str | None = None) -> dict[str, Any]:
    """Everything that the page shows, JSON-ready.

    A run is shown beside its random twin: the newest run of the same model and the same tasks with
    random weights. Of several analyses of one kind and run, the newest is shown and the others
    are named.

    Args:
        store: the store.
        run: id of the run to show, with its twin and what compares it with others; all if not
            given.

    Returns:
        ``store`` (its place), ``labels`` of runs, ``parts`` (each with a title and sections of
        figures) and ``queries`` (each with sql, columns and data, column by column).

    Raises:
        AnalysisError: if the store has no run.
        StoreError: if it has no run of that id.
    """
    if run is not None:
        store.run_record(run)
    runs = query_rows(store, "report_runs", runs=store.runs())
    runs.sort(key=lambda row: (row["created"], row["run"]))
    if not runs:
        raise AnalysisError(
            f"{store.files.root} has no run to report on: make one with `actlake capture STUDY "
            f"--store {store.files.root}`."
        )
    shown = [row["run"] for row in runs if run in (None, row["run"])]
    report = _Report(store, runs)
    parts = [report.subject(subject) for subject in _subjects(runs, shown)]
    parts += report.comparisons(shown)
    parts += report.alignments(shown)
    return {
        "store": store.files.root,
        "labels": report.labels,
        "parts": parts,
        "queries": report.queries,
    }


def _subjects(runs: list[dict[str, Any]], shown: list[str]) -> list[list[str]]:
    """Ids of the runs to show, each with that of its random twin if it has one, oldest first."""
    subjects = []
    for run in runs:
        twins = [one["run"] for one in runs if run["init"] != "random" and _are_twins(run, one)]
        subjects.append([run["run"], *twins[-1:]])
    paired = {subject[1] for subject in subjects if len(subject) == 2 and subject[0] in shown}
    return [one for one in subjects if one[0] in shown and one[0] not in paired]


def _are_twins(run: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(run[key] == other[key] for key in ("model", "tasks"))
    return same and other["init"] == "random"


@dataclass(frozen=True, slots=True)
class _Found:
    """An analysis, and what is older of its kind."""

    id: str
    parameters: dict[str, Any]
    older: list[str]

    @property
    def metric(self) -> str:
        """'abs' if it has it, else its first."""
        metrics = self.parameters["metrics"]
        return "abs" if "abs" in metrics else metrics[0]

    def note(self) -> str:
        """What it is called and shows, and what else there is."""
        others = [metric for metric in self.parameters["metrics"] if metric != self.metric]
        told = f"Analysis {self.id}, metric {self.metric}"
        told += f" (it also has {', '.join(others)})." if others else "."
        if self.older:
            told += f" Older ones are not shown: {', '.join(self.older)}."
        return told


class _Report:
    """Collects queries, and makes parts of what they found."""

    def __init__(self, store: Store, runs: list[dict[str, Any]]) -> None:
        self.queries: list[dict[str, Any]] = []
        self._store = store
        self._init = {row["run"]: row["init"] for row in runs}
        self._analyses = [
            {**row, "parameters": json.loads(row["parameters"])}
            for row in query_rows(store, "report_analyses")
        ]
        self.labels = {
            run: f"{run} (random weights)" for run, init in self._init.items() if init == "random"
        }

    def subject(self, runs: list[str]) -> Section:
        """One run, with its random twin if there is one."""
        sections = [self._overview(runs)]
        if len(runs) == 1 and self._init[runs[0]] != "random":
            ask = f"actlake capture STUDY --store {self._place()} --new-run --set model.init=random"
            sections[0]["notes"] = [f"It has no random twin to stand beside it: `{ask}` makes one."]
        sections += self._selections(runs)
        for run in runs:
            if run == runs[0] or self._newest("ablation_effects", run):
                sections.append(self._pruning(run))
            if run == runs[0] or self._newest("cross_evaluations", run):
                sections.append(self._crossing(run))
        twin = " and its random twin" if len(runs) > 1 else ""
        return {"title": self._label(runs[0]) + twin, "sections": sections}

    def comparisons(self, runs: list[str]) -> list[Section]:
        """Every two runs of which one is shown and that were compared, the newest drift of each."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self._analyses:
            pair = row["run"], row["parameters"].get("run_b")
            if "drift" in row["tables"] and set(pair) & set(runs):
                found.setdefault(pair, []).append(row)
        if not found:
            text = "No two runs were compared yet"
            missing = self._missing("Runs compared", text, "drift", "RUN_A RUN_B")
            return [{"title": "Between runs", "sections": [missing]}]
        return [
            {
                "title": f"From {self._label(a)} (A) to {self._label(b)} (B)",
                "sections": self._drift(_found(rows)),
            }
            for (a, b), rows in found.items()
        ]

    def alignments(self, runs: list[str]) -> list[Section]:
        """Experts and selections, for all runs that were aligned together: the newest of each."""
        found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self._analyses:
            of = tuple(sorted(row["parameters"].get("references", ())))
            if "cluster_alignment" in row["tables"] and set(of) & set(runs):
                found.setdefault(of, []).append(row)
        if not found:
            text = "No experts, which `actlake experts` makes, were compared with selections yet"
            missing = self._missing("Experts", text, "align", "EXPERTS")
            return [{"title": "Experts", "sections": [missing]}]
        return [
            {
                "title": f"Experts and selections of {', '.join(map(self._label, of))}",
                "sections": self._alignment(_found(rows)),
            }
            for of, rows in found.items()
        ]

    def _overview(self, runs: list[str]) -> Section:
        figures = self._figures(
            "report_runs", {"runs": runs},
            {"kind": "facts", "title": "Model and capture", "name": "run"},
        ) + self._figures(
            "report_tasks", {"runs": runs},
            {
                "kind": "table", "title": "Tasks", "panels": ["run"],
                "columns": ["task", "is_reference", "committed_tokens", "predictions", "loss",
                            "top1", "top10", "source"],
                "percent": ["top1", "top10"],
                "text": "How well the model predicts each task: loss in nats; top-1 and top-10 are "
                "how often what is right is the most probable, or among the ten most probable.",
            },
        )  # fmt: skip
        return {"title": "Model and tasks", "figures": figures}

    def _selections(self, runs: list[str]) -> list[Section]:
        """Overlap and layer profiles, trained beside random."""
        titles = ("Overlap of tasks", "Layers")
        found = self._newest("overlap", runs[0])
        if found is None:
            text, ask = "The run was not analysed yet", f"--run {shlex.quote(runs[0])}"
            return [self._missing(title, text, "analyse", ask) for title in titles]
        beside = [found]
        for twin in runs[1:]:
            of_twin = self._newest("overlap", twin, metric=found.metric)
            beside += [of_twin] if of_twin else []
        notes = [one.note() for one in beside]
        if len(beside) < len(runs):
            ask = f"actlake analyse {self._place()} --run {shlex.quote(runs[1])}"
            notes.append(f"The random twin has no analysis of {found.metric}: `{ask}` makes one.")
        params = {"analyses": [one.id for one in beside], "metric": found.metric}
        overlap = self._figures(
            "report_overlap", params,
            {
                "kind": "heat", "title": "Neurons that two tasks share",
                "controls": [_FRACTION], "panels": ["site", "run"],
                "row": "task_a", "column": "task_b", "value": "share_of_a", "percent": True,
                "text": "Percent of the neurons selected for the row's task that are selected for "
                "the column's as well, over the whole model. By chance it is the fraction.",
            },
        )  # fmt: skip
        layers = self._figures(
            "report_layers", params,
            {
                "kind": "lines", "title": "Where selected neurons lie",
                "controls": [_FRACTION], "panels": ["site", "run"], "x": "layer",
                "series": ["task"], "values": [{"column": "share"}], "percent": True, "zero": True,
                "text": "Percent of each task's selected neurons that lie in each layer.",
            },
        )  # fmt: skip
        made = []
        for title, figures in zip(titles, (overlap, layers), strict=True):
            section = {"title": title, "notes": notes, "figures": figures}
            # An overlap has two tasks besides the reference; a selection has one.
            nothing = {"title": title, "missing": "The run has no two tasks besides its reference."}
            made.append(section if figures else nothing)
        return made

    def _pruning(self, run: str) -> Section:
        title, found = "Pruning curves", self._newest("ablation_effects", run)
        if found is None:
            return self._missing(title, "Nothing was pruned yet", "ablate", f"--run {run}")
        controls = [{"column": "measure"}, {"column": "kind", "name": "replaced by"}]
        figures = self._figures(
            "report_curves", {"analysis": found.id},
            {
                "kind": "lines", "title": "A task without its own neurons, and without random ones",
                "controls": controls, "panels": ["task"], "x": "fraction", "series": ["chosen_by"],
                "values": [{"column": "change", "lower": "lower", "upper": "upper"}],
                "free": True, "zero": True,
                "text": "Change of the task's own measure as neurons are removed. Shaded: of the "
                "selection (score) its 95 % interval over samples; of random neurons, as many in "
                "each layer, the range of all controls. Every task has its own scale.",
            },
        ) + self._figures(
            "report_effects", {"analysis": found.id},
            {
                "kind": "table", "title": "Selection against random",
                "controls": [*controls, _FRACTION],
                "columns": ["task", "unpruned", "selected_change", "random_change", "excess",
                            "excess_lower", "excess_upper"],
                "text": "Excess is what the selection changes beyond random neurons, with its 95 % "
                "interval over samples and controls.",
            },
        )  # fmt: skip
        return {
            "title": title,
            "notes": [f"Of {self._label(run)}. {found.note()}"],
            "figures": figures,
        }

    def _crossing(self, run: str) -> Section:
        title, found = "Cross-evaluation", self._newest("cross_evaluations", run)
        if found is None:
            return self._missing(
                title, "Nothing was cross-evaluated yet", "crosseval", f"--run {run}"
            )
        target = found.parameters["target"]
        figures = self._figures(
            "cross_matrix", {"analysis": found.id},
            {
                "kind": "heat", "title": "What pruning for one task leaves of each",
                "row": "task", "column": "evaluated", "value": "ratio", "percent": True,
                "text": f"Percent of each column's top-1 accuracy that is left when the row's task "
                f"is pruned to {target:.0%} of its own. Rows whose target was not reached lost all "
                "neurons: see reached in the rows.",
            },
        )  # fmt: skip
        return {
            "title": title,
            "notes": [f"Of {self._label(run)}. {found.note()}"],
            "figures": figures,
        }

    def _drift(self, found: _Found) -> list[Section]:
        params = {"analysis": found.id, "metric": found.metric}
        picks = [
            {"column": "correlation", "name": "rank correlation of importance"},
            {"column": "error_median", "name": "median relative error of importance"},
            {"column": "share_of_a", "name": "share of A's selection that B selects"},
        ]
        drift = self._figures(
            "report_drift", params,
            {
                "kind": "table", "title": "Drift by task", "absent": ["layer"],
                "controls": [_FRACTION], "panels": ["site"],
                "columns": ["task", "correlation", "error_median", "error_p90", "share_of_a",
                            "lift", "loss_difference", "top1_difference"],
                "percent": ["share_of_a", "top1_difference"],
                "text": "Over the whole model: Spearman's correlation of importance in A and B, "
                "its relative error, the share of A's selection that B shares, and B - A of loss "
                "and top-1.",
            },
            {
                "kind": "lines", "title": "Drift by layer", "present": ["layer"],
                "controls": [_FRACTION], "picks": picks, "panels": ["site"], "x": "layer",
                "series": ["task"],
            },
        )  # fmt: skip
        made: list[Section] = []
        persistence = self._figures(
            "persistence_rows", params,
            {
                "kind": "table", "title": "Do tasks share neurons in the same way?",
                "percent": ["same_neurons", "same_neurons_spread", "same_by_chance"],
                "text": "Correlation of the two overlap matrices over pairs of tasks, with the p "
                "of Mantel's test; and the share of A's selections that B selects for the same "
                "task, against chance.",
            },
        ) + self._figures(
            "report_persistence", params,
            {
                "kind": "lines", "title": "Layers of all selected neurons",
                "controls": [_FRACTION], "panels": ["site"], "x": "layer", "percent": True,
                "values": [{"column": "selected_a", "name": "A"},
                           {"column": "selected_b", "name": "B"}],
                "zero": True,
                "text": "Percent of all tasks' selected neurons that lie in each layer.",
            },
        )  # fmt: skip
        if persistence:
            made.append({"title": "Persistence", "notes": [found.note()], "figures": persistence})
        return [*made, {"title": "Drift", "notes": [found.note()], "figures": drift}]

    def _alignment(self, found: _Found) -> list[Section]:
        params = {"analysis": found.id, "metric": found.metric}
        combination = ["experts", "method", "experts_run", "run"]
        of = {"experts_run": "made of ", "run": "scores of "}
        alignment = self._figures(
            "alignment_by_layer", {**params, "fraction": None},
            {
                "kind": "lines", "title": "Area under the curve",
                "controls": [_FRACTION], "panels": combination, "prefix": of, "x": "layer",
                "values": [{"column": "auc", "spread": "auc_std", "name": "tasks"},
                           {"column": "auc_best", "name": "best"},
                           {"column": "auc_random", "name": "chance"}],
                "text": "How far the neurons that tasks select in a layer lie together in its "
                "experts, for each combination of experts and the run whose scores select: mean "
                "over tasks, shaded one standard deviation, between chance and the best there "
                "could be.",
            },
            {
                "kind": "lines", "title": "Adjusted mutual information",
                "controls": [_FRACTION], "x": "layer", "series": combination, "prefix": of,
                "values": [{"column": "ami", "spread": "ami_std"}], "zero": True,
                "text": "Of experts and selection: 1 if every expert is selected wholly or not at "
                "all, 0 on average by chance. Shaded: one standard deviation over tasks.",
            },
        )  # fmt: skip
        enrichment = self._figures(
            "report_enrichment", {**params, "count": _MAX_EXPERTS},
            {
                "kind": "heat", "title": "Experts and tasks",
                "controls": [_FRACTION, {"column": "layer"}],
                "panels": ["experts", "method", "run"],
                "row": "expert", "column": "task", "value": "lift",
                "mark": {"column": "p_value", "most": 0.001},
                "text": "How many times as many of the task's selected neurons an expert holds as "
                "chance would give it, by the scores of the run that the experts were made of; "
                "framed where p <= 0.001. Of layers with more, the "
                f"{_MAX_EXPERTS} experts with the least p are shown: table cluster_enrichment has "
                "all.",
            },
        )  # fmt: skip
        return [
            {"title": "Alignment by layer", "notes": [found.note()], "figures": alignment},
            {"title": "Experts x tasks", "notes": [found.note()], "figures": enrichment},
        ]

    def _figures(self, query: str, params: dict[str, Any], *figures: Figure) -> list[Figure]:
        """Figures of one query, which is run once; none if it finds nothing."""
        sql = filled(load_query("analysis", query), params)
        table = self._store.table(sql)
        if not table.num_rows:
            return []
        data = [_json_column(column) for column in table.columns]
        name = f"{query}-{len(self.queries)}"
        self.queries.append({"name": name, "sql": sql, "columns": table.column_names, "data": data})
        return [{**figure, "query": len(self.queries) - 1} for figure in figures]

    def _newest(self, table: str, run: str, metric: str | None = None) -> _Found | None:
        rows = [
            row
            for row in self._analyses
            if row["run"] == run
            and table in row["tables"]
            and (metric is None or metric in row["parameters"]["metrics"])
        ]
        return _found(rows) if rows else None

    def _missing(self, title: str, text: str, command: str, arguments: str) -> Section:
        ask = f"actlake {command} {self._place()} {arguments}"
        return {"title": title, "missing": f"{text}: `{ask}` does it."}

    def _label(self, run: str) -> str:
        return self.labels.get(run, run)

    def _place(self) -> str:
        return shlex.quote(self._store.files.root)


def _found(rows: Iterable[dict[str, Any]]) -> _Found:
    newest, *older = rows
    return _Found(newest["analysis"], newest["parameters"], [row["analysis"] for row in older])


def _json_column(column: pa.ChunkedArray) -> list[Any] | dict[str, list[Any]]:
    """Values of a column; of text, ``values`` that differ and for each row a place in ``codes``."""
    if pa.types.is_string(column.type):
        encoded = column.combine_chunks().dictionary_encode()
        return {"values": encoded.dictionary.to_pylist(), "codes": encoded.indices.to_pylist()}
    # JSON has no number for those that are not finite, so their names.
    return [
        repr(value) if isinstance(value, float) and not isfinite(value) else value
        for value in column.to_pylist()
    ]
