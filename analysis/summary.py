"""What a run and its last analysis say in short: the numbers behind `actlake summary` and plots."""

from dataclasses import dataclass
from typing import Any

from analysis.errors import AnalysisError
from storage import Store
from storage.sqlfiles import load_query

__all__ = ["AnalysisView", "has_analysis", "newest_analysis", "query_rows", "task_accuracy"]


def task_accuracy(store: Store, run: str) -> list[dict[str, Any]]:
    """task, predictions, loss (nats), top1 and top10 (shares) of each task, best predicted first.

    What is predicted are tokens, or the classes of images.
    """
    return query_rows(store, "task_accuracy", run=run)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisView:
    """One analysis at one metric and fraction."""

    store: Store
    """The store."""
    analysis: str
    """Id of the analysis."""
    reference: str
    """The reference task."""
    within: str
    """'model' or 'layer'."""
    metric: str
    """Importance metric."""
    fraction: float
    """Fraction of the neurons that was selected."""
    sites: tuple[str, ...]
    """Analysed sites."""

    def overlap(self) -> list[dict[str, Any]]:
        """site, task_a, task_b, share_of_a, lift and p_value over the whole model."""
        return self._rows("overlap_matrix")

    def top_neurons(self, count: int) -> list[dict[str, Any]]:
        """task, site, rank, layer, neuron, score and importance of the `count` highest scores."""
        return self._rows("top_neurons", count=count)

    def layer_profile(self) -> list[dict[str, Any]]:
        """site, task, layer and num_selected, for every layer."""
        return self._rows("layer_profile")

    def _rows(self, name: str, **params: Any) -> list[dict[str, Any]]:
        chosen = {"analysis": self.analysis, "metric": self.metric, "fraction": self.fraction}
        return query_rows(self.store, name, **chosen, **params)


def has_analysis(store: Store, run: str) -> bool:
    """Whether `newest_analysis` finds one."""
    return bool(query_rows(store, "newest_analysis", run=run, analysis=None))


def newest_analysis(
    store: Store,
    run: str,
    *,
    analysis: str | None = None,
    metric: str | None = None,
    fraction: float | None = None,
) -> AnalysisView:
    """The last analysis of a run, or the one that is named.

    Args:
        store: the store.
        run: id of the run.
        analysis: id of the analysis; the last one if not given.
        metric: one of its metrics; 'abs' if it has it, else its first, if not given.
        fraction: one of its fractions; the smallest if not given.

    Raises:
        AnalysisError: if the run has no analysis, or that has no such metric or fraction.
    """
    found = query_rows(store, "newest_analysis", run=run, analysis=analysis)
    if not found and analysis is not None:
        raise AnalysisError(
            f"run {run!r} has no analysis {analysis!r} of overlap: `actlake status "
            f"{store.files.root}` names those there are."
        )
    if not found:
        raise AnalysisError(
            f"run {run!r} has no analysis yet: make one with `actlake analyse {store.files.root}`."
        )
    row = found[0]
    metrics, fractions = row.pop("metrics"), row.pop("fractions")
    usual = "abs" if "abs" in metrics else metrics[0]
    return AnalysisView(
        store=store,
        metric=_one_of("metric", metric, metrics, usual),
        fraction=_one_of("fraction", fraction, fractions, min(fractions)),
        sites=tuple(row.pop("sites")),
        **row,
    )


def _one_of(name: str, wanted: Any, there: list[Any], usual: Any) -> Any:
    if wanted is None:
        return usual
    if wanted not in there:
        raise AnalysisError(
            f"{name} must be one that the analysis has ({', '.join(map(str, there))}), "
            f"found {wanted!r}."
        )
    return wanted


def query_rows(store: Store, name: str, **params: Any) -> list[dict[str, Any]]:
    """Rows of a query of this package.

    Args:
        store: the store.
        name: name of its SQL file.
        params: values of its parameters.
    """
    rows: list[dict[str, Any]] = store.table(load_query("analysis", name).text, params).to_pylist()
    return rows
