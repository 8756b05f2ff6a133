"""What a store says, gathered for one page: each figure with its rows and the query that gave them.

The page draws figures of four kinds, whose keys `analysis/web/report.js` explains. A figure shows
those rows of its query that its controls leave, so fractions and measures can be changed offline.
"""

import json
import shlex
from collections.abc import Callable
from math import isfinite
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from analysis.errors import AnalysisError
from analysis.summary import query_rows
from analysis.variants import Variant, names_of, variants_of
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
    random weights. Analyses of one kind and run with different settings are choices of one section,
    the newest first; of those with the same settings, the newest is shown and the others are named.

    Args:
        store: the store.
        run: id of the run to show, with its twin and what compares it with others; all if not
            given.

    Returns:
        ``store`` (its name), ``labels`` of runs, ``parts`` (each with a title and sections; see
        `analysis/web/report.js`) and ``queries`` (each with sql, columns and data, column by
        column).

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
    for row in runs:
        row["model"] = store.run_record(row["run"])["model"]["source"]
    shown = [row["run"] for row in runs if run in (None, row["run"])]
    report = _Report(store, runs)
    parts = [report.subject(subject) for subject in _subjects(runs, shown)]
    parts += report.comparisons(shown)
    parts += report.alignments(shown)
    return {
        # Not its place: the page is passed on to people who need not know this machine's folders.
        "store": PurePosixPath(store.files.root).name,
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
        sections = [self._overview(runs), *self._selections(runs)]
        for run in runs:
            sections += self._measured(run, is_first=run == runs[0])
        twin = " and its random twin" if len(runs) > 1 else ""
        return {"title": self._label(runs[0]) + twin, "sections": sections}

    def _measured(self, run: str, *, is_first: bool) -> list[Section]:
        """What the model was put through; what it was not is told of the first run alone."""
        of = f"--run {shlex.quote(run)}"
        made = []
        for title, table, figures, nothing, command in (
            ("Pruning curves", "ablation_effects", self._pruning,
             "Nothing was pruned yet", f"ablate STORE {of}"),
            ("Cross-evaluation", "cross_evaluations", self._crossing,
             "Nothing was cross-evaluated yet", f"crosseval STORE {of}"),
            ("Routing", "routing", self._routing,
             "No token was routed to experts, which `actlake experts` makes, yet",
             "routing STORE EXPERTS"),
        ):  # fmt: skip
            variants = self._variants(table, run)
            if variants:
                notes = {one.id: [f"Of {self._label(run)}. {one.note()}"] for one in variants}
                made.append(self._section(title, variants, figures, notes))
            elif is_first:
                made.append(_missing(title, nothing, command))
        return made

    def comparisons(self, runs: list[str]) -> list[Section]:
        """Every two runs of which one is shown and that were compared."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self._analyses:
            pair = row["run"], row["parameters"].get("run_b")
            if "drift" in row["tables"] and set(pair) & set(runs):
                found.setdefault(pair, []).append(row)
        if not found:
            text = "No two runs were compared yet"
            missing = _missing("Runs compared", text, "drift STORE RUN_A RUN_B")
            return [{"title": "Between runs", "sections": [missing]}]
        made = []
        for (a, b), rows in found.items():
            variants = variants_of(rows)
            sections = [
                self._section("Persistence", variants, self._persistence),
                self._section("Drift", variants, self._drift),
            ]
            title = f"From {self._label(a)} (A) to {self._label(b)} (B)"
            drawn = [one for one in sections if "choices" in one]
            made.append({"title": title, "sections": drawn or sections})
        return made

    def alignments(self, runs: list[str]) -> list[Section]:
        """Experts and selections, for all runs that were aligned together."""
        found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self._analyses:
            of = tuple(sorted(row["parameters"].get("references", ())))
            if "cluster_alignment" in row["tables"] and set(of) & set(runs):
                found.setdefault(of, []).append(row)
        if not found:
            text = "No experts, which `actlake experts` makes, were compared with selections yet"
            missing = _missing("Experts", text, "align STORE EXPERTS")
            return [{"title": "Experts", "sections": [missing]}]
        made = []
        for of, rows in found.items():
            variants = variants_of(rows)
            sections = [
                self._section("Alignment by layer", variants, self._alignment),
                self._section("Experts x tasks", variants, self._enrichment),
            ]
            title = f"Experts and selections of {', '.join(map(self._label, of))}"
            made.append({"title": title, "sections": sections})
        return made

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
        notes = []
        if len(runs) == 1 and self._init[runs[0]] != "random":
            ask = "actlake capture STUDY --store STORE --new-run --set model.init=random"
            notes = [f"It has no random twin to stand beside it: `{ask}` makes one."]
        choice = {"name": runs[0], "notes": notes, "figures": figures}
        return {"title": "Model and tasks", "choices": [choice]}

    def _selections(self, runs: list[str]) -> list[Section]:
        """Overlap and layer profiles, trained beside random."""
        titles = ("Overlap of tasks", "Layers")
        found = self._variants("overlap", runs[0])
        if not found:
            text, command = "The run was not analysed yet", "analyse STORE --run "
            return [_missing(title, text, command + shlex.quote(runs[0])) for title in titles]
        beside = {one.id: [one, *self._like(one, runs[1:])] for one in found}
        notes = {name: [one.note() for one in shown] for name, shown in beside.items()}
        for told in notes.values():
            if len(told) < len(runs):
                ask = f"actlake analyse STORE --run {shlex.quote(runs[1])}"
                told.append(f"The random twin has no analysis like it: `{ask}` makes one.")
        overlap = self._section(titles[0], found, lambda one: self._overlap(beside[one.id]), notes)
        layers = self._section(titles[1], found, lambda one: self._layers(beside[one.id]), notes)
        if "missing" in overlap:  # A selection has one task besides the reference.
            overlap = {
                "title": titles[0],
                "missing": "The run has no two tasks besides its reference.",
            }
        return [overlap, layers]

    def _like(self, variant: Variant, twins: list[str]) -> list[Variant]:
        """Of each twin the overlap with the most nearly same settings; none if too far."""
        near = []
        for twin in twins:
            others = [
                one
                for one in self._variants("overlap", twin)
                if variant.metric in one.parameters["metrics"]
                and variant.parameters["within"] == one.parameters["within"]
            ]
            # The newest of those that are equally near.
            near += [max(others, key=variant.likeness)] if others else []
        return near

    def _overlap(self, beside: list[Variant]) -> list[Figure]:
        return self._figures(
            "report_overlap", _selected(beside),
            {
                "kind": "heat", "title": "Neurons that two tasks share",
                "controls": [_FRACTION], "panels": ["site", "run"],
                "row": "task_a", "column": "task_b", "value": "share_of_a",
                "percent": ["share_of_a"],
                "text": "Percent of the neurons selected for the row's task that are selected for "
                "the column's as well, over the whole model. By chance it is the fraction.",
            },
        )  # fmt: skip

    def _layers(self, beside: list[Variant]) -> list[Figure]:
        return self._figures(
            "report_layers", _selected(beside),
            {
                "kind": "lines", "title": "Where selected neurons lie",
                "controls": [_FRACTION], "panels": ["site", "run"], "x": "layer",
                "series": ["task"], "values": [{"column": "share"}], "percent": ["share"],
                "zero": True,
                "text": "Percent of each task's selected neurons that lie in each layer.",
            },
        )  # fmt: skip

    def _pruning(self, found: Variant) -> list[Figure]:
        controls = [{"column": "measure"}, {"column": "kind", "name": "replaced by"}]
        return self._figures(
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

    def _crossing(self, found: Variant) -> list[Figure]:
        return self._figures(
            "cross_matrix", {"analysis": found.id},
            {
                "kind": "heat", "title": "What pruning for one task leaves of each",
                "row": "task", "column": "evaluated", "value": "ratio", "percent": ["ratio"],
                "text": "Percent of each column's top-1 accuracy that is left when the row's task "
                f"is pruned to {found.parameters['target']:.0%} of its own. Rows whose target was "
                "not reached lost all neurons: see reached in the rows.",
            },
        )  # fmt: skip

    def _routing(self, found: Variant) -> list[Figure]:
        routers = (
            "Each token keeps a share of the experts of every layer that has them, chosen by: "
            "truth, the largest mass, which is the sum of absolute activations and takes computing "
            "all; learned, a small network that reads the input of the MLP; centroid, the mean "
            "rows that are nearest to that input; random, chance."
        )
        lines = {
            "kind": "lines", "panels": ["experts", "method", "task"], "x": "share_of_experts",
            "series": ["router"],
        }  # fmt: skip
        masses = ["mass_kept", "mass_kept_std", "mass_ratio", "mass_ratio_std"]
        percent = ["share_of_experts", *masses, "top1", "top1_lower", "top1_upper"]
        return self._figures(
            "report_routing", {"analysis": found.id},
            {
                **lines, "title": "Mass that routers keep", "present": ["mass_kept"],
                "picks": [
                    {"column": "mass_kept", "spread": "mass_kept_std",
                     "name": "share of a token's mass"},
                    {"column": "mass_ratio", "spread": "mass_ratio_std",
                     "name": "share of the most that so many experts hold"},
                ],
                "percent": percent, "zero": True,
                "text": f"{routers} Mean over layers; shaded: one standard deviation over layers, "
                "if there are several.",
            },
            {
                **lines, "title": "Accuracy with the experts that routers keep",
                "picks": [
                    {"column": "top1", "lower": "top1_lower", "upper": "top1_upper",
                     "name": "top-1"},
                    {"column": "loss", "lower": "loss_lower", "upper": "loss_upper",
                     "name": "loss (nats)"},
                ],
                "percent": percent, "free": True,
                "text": "How well the task is predicted with these experts and nothing of the "
                "others, beside all of them (all). Shaded: 95 % interval over samples of the "
                "change against all. Every panel has its own scale.",
            },
        )  # fmt: skip

    def _drift(self, found: Variant) -> list[Figure]:
        picks = [
            {"column": "correlation", "name": "rank correlation of importance"},
            {"column": "error_median", "name": "median relative error of importance"},
            {"column": "share_of_a", "name": "share of A's selection that B selects"},
        ]
        percent = ["share_of_a", "top1_difference"]
        return self._figures(
            "report_drift", {"analysis": found.id, "metric": found.metric},
            {
                "kind": "table", "title": "Drift by task", "absent": ["layer"],
                "controls": [_FRACTION], "panels": ["site"],
                "columns": ["task", "correlation", "error_median", "error_p90", "share_of_a",
                            "lift", "loss_difference", "top1_difference"],
                "percent": percent,
                "text": "Over the whole model: Spearman's correlation of importance in A and B, "
                "its relative error, the share of A's selection that B shares, and B - A of loss "
                "and top-1.",
            },
            {
                "kind": "lines", "title": "Drift by layer", "present": ["layer"],
                "controls": [_FRACTION], "picks": picks, "panels": ["site"], "x": "layer",
                "series": ["task"], "percent": percent,
            },
        )  # fmt: skip

    def _persistence(self, found: Variant) -> list[Figure]:
        params = {"analysis": found.id, "metric": found.metric}
        return self._figures(
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
                "controls": [_FRACTION], "panels": ["site"], "x": "layer",
                "percent": ["selected_a", "selected_b", "same_neurons", "same_by_chance"],
                "values": [{"column": "selected_a", "name": "A"},
                           {"column": "selected_b", "name": "B"}],
                "zero": True,
                "text": "Percent of all tasks' selected neurons that lie in each layer.",
            },
        )  # fmt: skip

    def _alignment(self, found: Variant) -> list[Figure]:
        params = {"analysis": found.id, "metric": found.metric, "fraction": None}
        combination = ["experts", "method", "experts_run", "run"]
        of = {"experts_run": "made of ", "run": "scores of "}
        return self._figures(
            "alignment_by_layer", params,
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

    def _enrichment(self, found: Variant) -> list[Figure]:
        params = {"analysis": found.id, "metric": found.metric, "count": _MAX_EXPERTS}
        return self._figures(
            "report_enrichment", params,
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

    def _variants(self, table: str, run: str) -> list[Variant]:
        """The analyses of a run that made a table."""
        return variants_of(
            row for row in self._analyses if row["run"] == run and table in row["tables"]
        )

    def _section(
        self,
        title: str,
        variants: list[Variant],
        figures: Callable[[Variant], list[Figure]],
        notes: dict[str, list[str]] | None = None,
    ) -> Section:
        """One choice for each analysis that has something to draw; a sentence if none has.

        Args:
            title: of the section.
            variants: the analyses, the first to be shown first.
            figures: draws one.
            notes: what to tell of each, by id; its own note if not given.
        """
        choices = [
            {
                "name": name,
                "notes": [one.note()] if notes is None else notes[one.id],
                "figures": figures(one),
            }
            for name, one in zip(names_of(variants), variants, strict=True)
        ]
        drawn = [choice for choice in choices if choice["figures"]]
        if not drawn:
            return {"title": title, "missing": "The analyses of this kind have nothing to draw."}
        return {"title": title, "choices": drawn}

    def _label(self, run: str) -> str:
        return self.labels.get(run, run)


def _missing(title: str, text: str, command: str) -> Section:
    return {"title": title, "missing": f"{text}: `actlake {command}` does it."}


def _selected(variants: list[Variant]) -> dict[str, Any]:
    """Parameters of the queries of selections."""
    return {"analyses": [one.id for one in variants], "metric": variants[0].metric}


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
