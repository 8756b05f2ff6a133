"""One neuron: what it did in each task, how it scored, and what excites it most.

These are the numbers behind `actlake neuron`.
"""

from dataclasses import dataclass
from typing import Any

from analysis.errors import AnalysisError
from analysis.summary import AnalysisView, has_analysis, newest_analysis, query_rows
from storage import Store, layout

__all__ = ["NeuronView", "open_neuron"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronView:
    """One neuron of a run; made by `open_neuron`."""

    store: Store
    """The store."""
    run: str
    """Id of the run."""
    site: str
    """Its site."""
    layer: int
    """Its layer."""
    neuron: int
    """Its index inside site and layer."""
    width: int
    """Neurons of its site and layer."""
    head: int | None
    """Its attention head; None at the MLP."""
    modality: str
    """'language' or 'image'."""
    top: int
    """Activations of each kind that the run keeps of a neuron."""

    def statistics(self) -> list[dict[str, Any]]:
        """task, head, n, mean, std, abs, freq, min and max of each task."""
        return self._rows("neuron_statistics", run=self.run)

    def scores(self, view: AnalysisView) -> list[dict[str, Any]]:
        """task, importance, score, rank, population and fractions (it was selected in), best first.

        Args:
            view: the analysis, and its metric; empty if it did not look at this site.
        """
        return self._rows(
            "neuron_scores", analysis=view.analysis, metric=view.metric, within=view.within
        )

    def newest_scores(self) -> tuple[AnalysisView, list[dict[str, Any]]] | None:
        """The last analysis of the run and its `scores`; None if the run has no analysis."""
        if not has_analysis(self.store, self.run):
            return None
        view = newest_analysis(self.store, self.run)
        return view, self.scores(view)

    def examples(
        self,
        *,
        task: str | None = None,
        count: int | None = None,
        per_sample: bool = False,
        context: int = 32,
    ) -> list[dict[str, Any]]:
        """Where it was highest, best first, and then where it was lowest.

        Args:
            task: of this task; of all tasks together if not given.
            count: most rows of each kind; as many as are kept if not given.
            per_sample: only the best of each sample. There may be fewer than `count` then.
            context: tokens of a text on either side.

        Returns:
            kind ('highest' or 'lowest'), rank (from 1), value, task, sample, position, source,
            label, and the text before the token, of the token, and after it.

        Raises:
            AnalysisError: if the run keeps fewer, or has no such task.
        """
        if self.top == 0:
            raise AnalysisError(
                f"run {self.run!r} kept no top activations (it has {self._kept()}): capture it "
                "again with --set capture.top=5, or a larger capture.budget_gb if it has one, and "
                "--new-run."
            )
        if count is not None and count > self.top:
            raise AnalysisError(
                f"at most {self.top} activations of each kind can be shown, because run "
                f"{self.run!r} kept no more, found {count}: ask for fewer, or capture with a "
                "larger capture.top."
            )
        tasks = [known["task"] for known in self.store.run_record(self.run)["tasks"]]
        if task is not None and task not in tasks:
            raise AnalysisError(
                f"task must be one of run {self.run!r} ({', '.join(tasks)}), found {task!r}."
            )
        return self._rows(
            "neuron_examples",
            run=self.run,
            task=task,
            per_sample=per_sample,
            count=self.top if count is None else count,
            # Patches have no text, and their neighbours lie on all sides.
            context=0 if self.modality == "image" else context,
        )

    def _kept(self) -> str:
        kept = query_rows(self.store, "kept_tables", folder=layout.run_folder(self.run))
        return ", ".join(row["table_name"] for row in kept) or "no committed shard"

    def _rows(self, name: str, **params: Any) -> list[dict[str, Any]]:
        chosen = {"site": self.site, "layer": self.layer, "neuron": self.neuron}
        return query_rows(self.store, name, **chosen, **params)


def open_neuron(store: Store, run: str, *, site: str, layer: int, neuron: int) -> NeuronView:
    """A neuron of a run.

    Args:
        store: the store.
        run: id of the run.
        site: one that was captured.
        layer: one of its captured layers.
        neuron: index inside site and layer.

    Raises:
        StoreError: if the store has no such run.
        AnalysisError: if the run has no such neuron; says which it has.
    """
    record = store.run_record(run)
    sites = sorted({known["site"] for known in record["sites"]})
    if site not in sites:
        raise AnalysisError(
            f"site must be one that run {run!r} captured ({', '.join(sites)}), found {site!r}."
        )
    by_layer = {known["layer"]: known for known in record["sites"] if known["site"] == site}
    if layer not in by_layer:
        raise AnalysisError(
            f"layer must be one that run {run!r} captured at site {site!r} "
            f"({_ranges(sorted(by_layer))}), found {layer}."
        )
    width, head_dim = by_layer[layer]["width"], by_layer[layer]["head_dim"]
    if not 0 <= neuron < width:
        raise AnalysisError(
            f"neuron must be from 0 to {width - 1} at site {site!r} in layer {layer} of run "
            f"{run!r}, found {neuron}."
        )
    return NeuronView(
        store=store,
        run=run,
        site=site,
        layer=layer,
        neuron=neuron,
        width=width,
        head=None if head_dim is None else neuron // head_dim,
        modality=record["model"]["modality"],
        top=record["capture"]["top"],
    )


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers for people: '0 to 29', or '0, 5, 7'."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first == len(numbers) - 1:
        return f"{first} to {last}"
    return ", ".join(map(str, numbers))
