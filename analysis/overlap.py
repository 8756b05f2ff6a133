"""From importance to overlap: which neurons a task uses more than the reference, and who shares.

Importance and score follow Pochinkov and Schoots (2024, arXiv 2403.01267) and Pochinkov, Jones and
Rahman (2024, arXiv 2408.17324): score = importance in the task / (importance in the reference +
eps). `rms` is sqrt(E[z^2]) and `std` the standard deviation, as the papers define them. The top
fraction of neurons by score is selected, and the selections of any two tasks are compared with
what chance would share (hypergeometric distribution).
"""

import glob
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from analysis.keeping import Analysis, committed_lineage, keep
from analysis.settings import AnalysisSettings, PruningSettings, Within
from analysis.steps import Steps
from storage import QueryError, Store, StoreFiles
from storage.catalog import open_connection

__all__ = ["analyse_run", "no_neuron", "overlap_of_scores", "rank", "run_parameters", "score"]

_TABLES = ("importance", "scores", "selections", "overlap")

_MAX_LAYER, _MAX_NEURON = 2**15 - 1, 2**31 - 1
"""What the columns of the tables hold."""


def analyse_run(
    store: Store,
    run: str,
    settings: AnalysisSettings,
    *,
    reference: str | None = None,
    partial: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> Analysis:
    """Compute importance, scores, selections and overlap of a run and keep them in the store.

    The id is a digest of the run's committed shards and all parameters, so the same question of
    the same data is answered once.

    Args:
        store: the store.
        run: id of the run.
        settings: what to compute.
        reference: the task to score against; the study's own if not given.
        partial: whether to analyse a run whose capture is not complete.
        on_step: called with the name of each step before it runs.

    Raises:
        AnalysisError: if the run is not complete, or a task, site or fraction does not fit it.
    """
    record = store.run_record(run)
    parameters = run_parameters(record, settings, reference)
    lineage = committed_lineage(
        store,
        record,
        partial=partial,
        advice="finish it, or pass --partial to analyse what there is",
    )

    def compute() -> Steps:
        steps = Steps(store.connect(), on_step)
        score(steps, run, parameters, in_order=True)
        _select_and_compare(steps, parameters["fractions"], parameters["within"])
        return steps

    key = {"run": run, "parameters": parameters, "lineage": lineage}
    return keep(store, "overlap", key, _TABLES, compute)


def overlap_of_scores(
    scores: Path,
    fractions: Sequence[float],
    out: Path,
    *,
    within: Within = "model",
    threads: int | None = None,
    memory_limit: str | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> pa.Table:
    """Selections and overlap of scores of one's own, as Parquet and CSV files.

    Args:
        scores: Parquet file with columns task (text), layer and neuron (integers from 0), score
            (number; higher is more specific) and, if there are several sites, site (text).
        fractions: fractions of the neurons to select, each in (0, 1].
        out: folder to write ``selections`` and ``overlap`` to.
        within: select the top fraction of the whole model or of each layer.
        threads: most threads to use; all cores if not given.
        memory_limit: most memory, such as ``"4GB"``; DuckDB's own default if not given.
        on_step: called with the name of each step before it runs.

    Returns:
        The table ``overlap``.

    Raises:
        AnalysisError: if the file lacks a column, or a score is missing, doubled or no number.
        StoreError: if `out` cannot be written.
    """
    chosen = _checked_fractions(fractions)
    files = StoreFiles(out)
    site = _site_expression(scores)
    steps = Steps(open_connection(threads=threads, memory_limit=memory_limit), on_step)
    try:
        # DuckDB takes a path for a pattern.
        file = glob.escape(str(scores))
        steps.intern(["given"], "given_names", {"file": file}, site=site)
        steps.run("given_scores", {"file": file}, into="scores", site=site)
    except QueryError as error:
        raise _unreadable(scores, error) from error
    _check_scores(steps, scores)
    files.prepare()
    _select_and_compare(steps, chosen, within)
    for name in ("selections", "overlap"):
        files.put_batches(f"{name}.parquet", name, steps.batches(name))
        with files.writing(f"{name}.csv") as path:
            steps.write_csv(name, path)
    overlap: pa.Table = files.get_table("overlap.parquet")
    return overlap


def run_parameters(
    record: dict[str, Any], settings: AnalysisSettings | PruningSettings, reference: str | None
) -> dict[str, Any]:
    """All that decides an analysis of a run, JSON-ready, with defaults filled in.

    Args:
        record: the run's record.
        settings: what to compute.
        reference: the task to score against; the study's own if not given.

    Raises:
        AnalysisError: if the reference or a site does not fit the run.
    """
    chosen = reference or record["reference"]
    tasks = [task["task"] for task in record["tasks"]]
    if chosen is None:
        raise AnalysisError(
            f"the study of run {record['run']!r} named no reference: pass --reference with one of "
            f"{', '.join(tasks)}."
        )
    if chosen not in tasks:
        raise AnalysisError(
            f"reference must be a task of the run {record['run']!r}, found {chosen!r}: choose "
            f"one of {', '.join(tasks)}."
        )
    if len(tasks) < 2:
        raise AnalysisError(
            f"the run {record['run']!r} has no task besides its reference: nothing can be compared."
        )
    captured = sorted({site["site"] for site in record["sites"]})
    sites = sorted(set(settings.sites or captured))
    if missing := [site for site in sites if site not in captured]:
        raise AnalysisError(
            f"sites must be among those that the run captured ({', '.join(captured)}), "
            f"found {missing[0]!r}."
        )
    return {"reference": chosen, **settings.parameters(sites)}


def score(steps: Steps, run: str, parameters: dict[str, Any], *, in_order: bool = False) -> None:
    """Leave ``computed_importance`` and ``computed_scores`` of a run behind.

    Args:
        steps: on a connection with the views of the run's store.
        run: id of the run.
        parameters: ``sites``, ``metrics``, ``seed``, ``reference`` and ``eps`` by site.
        in_order: sort the rows, as tables that are kept are; it takes a third of the time.
    """
    asked = {key: parameters[key] for key in ("sites", "seed")}
    order = "order by metric, task, site, layer, neuron" if in_order else ""
    metrics = ", ".join(parameters["metrics"])
    names = [run, *parameters["metrics"], *parameters["sites"]]
    steps.intern(names, "captured_tasks", {"run": run})
    steps.run("importance", {"run": run, **asked}, metrics=metrics, order=order)
    eps = {f"eps_{site}": value for site, value in parameters["eps"].items()}
    steps.run("scores", {"reference": parameters["reference"], **eps}, order=order)


def rank(steps: Steps, fractions: Sequence[float], within: Within) -> None:
    """Leave ``computed_quotas`` and ``computed_ranks`` of ``computed_scores`` behind.

    Raises:
        AnalysisError: if a fraction selects no neuron.
    """
    steps.run("quotas", {"fractions": list(fractions), "within": within})
    empty = steps.first("empty_quota")
    if empty is not None:
        raise no_neuron(empty["fraction"], empty["population"], empty["site"], empty["stratum"])
    steps.run("ranks", {"within": within, "rest": 1 - max(fractions)})


def no_neuron(fraction: float, population: int, site: str, layer: int | None) -> AnalysisError:
    """The error that says that a fraction of so many neurons is none; layer None = whole model."""
    place = "" if layer is None else f" of layer {layer}"
    smallest = Context(prec=2, rounding=ROUND_CEILING).divide(1, population)
    return AnalysisError(
        f"fraction {fraction:g} selects no neuron: {population:,} neurons of site {site!r}{place} "
        f"can be chosen from; the smallest fraction is {smallest}."
    )


def _select_and_compare(steps: Steps, fractions: Sequence[float], within: Within) -> None:
    rank(steps, fractions, within)
    steps.run("selections", {"within": within})
    steps.run("overlap", {"within": within})


def _checked_fractions(fractions: Sequence[float]) -> list[float]:
    if not fractions:
        raise AnalysisError("fractions must name at least one fraction, found none.")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise AnalysisError(
                f"each fraction must be in (0, 1], found {fraction:g}: give shares such as 0.01."
            )
    return sorted(set(fractions))


def _site_expression(scores: Path) -> str:
    """SQL for the site of a row, after checking that the file has the columns it must have."""
    if not scores.is_file():
        raise AnalysisError(f"there is no scores file {scores}: give the path of a Parquet file.")
    try:
        schema = pq.read_schema(scores)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(scores, error) from error
    wanted = {"task": "text", "layer": "an integer", "neuron": "an integer", "score": "a number"}
    missing = [name for name in wanted if name not in schema.names]
    if missing:
        raise AnalysisError(
            f"{scores} must have the columns task, layer, neuron and score, and lacks "
            f"{', '.join(missing)}; its columns are: {', '.join(schema.names)}."
        )
    for name, kind in wanted.items():
        dtype = schema.field(name).type
        if not _is_kind(dtype, kind):
            raise AnalysisError(
                f"column {name!r} of {scores} must be {kind}, found {dtype}: cast it first."
            )
    return "site::varchar" if "site" in schema.names else "'given'"


def _unreadable(scores: Path, error: Exception) -> AnalysisError:
    reason = " ".join(str(error).split()).removesuffix(".")
    return AnalysisError(f"cannot read the scores file {scores} as Parquet: {reason}.")


def _is_kind(dtype: pa.DataType, kind: str) -> bool:
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if kind == "text":
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        return any(is_kind(dtype) for is_kind in kinds)
    whole = bool(pa.types.is_integer(dtype))
    return whole if kind == "an integer" else whole or bool(pa.types.is_floating(dtype))


def _check_scores(steps: Steps, file: Path) -> None:
    bad = steps.first("bad_scores")
    if bad is not None:
        raise AnalysisError(
            f"every row of {file} must have a task, a site, a layer from 0 to {_MAX_LAYER:,}, a "
            f"neuron from 0 to {_MAX_NEURON:,} and a finite score, found {_described(bad)}: remove "
            "or mend such rows."
        )
    odd = steps.first("uneven_scores")
    if odd is not None:
        tasks = odd.pop("tasks")
        doubled = next((task for task in tasks if tasks.count(task) > 1), None)
        found = f"twice in task {doubled!r}" if doubled else f"only in {', '.join(tasks)}"
        raise AnalysisError(
            f"every neuron of {file} must have one score in each task, found {_described(odd)} "
            f"{found}."
        )
    few = steps.first("too_few_tasks")
    if few is not None:
        raise AnalysisError(
            f"{file} must hold scores of at least two tasks to compare, found {few['num_tasks']}."
        )


def _described(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {'missing or out of range' if value is None else value}"
        for name, value in row.items()
    )
