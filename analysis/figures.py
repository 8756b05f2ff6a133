"""Pictures of an analysis: overlap as heat maps, and where in model and experts selections lie."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.alignment import alignment_by_layer
from analysis.errors import AnalysisError
from analysis.summary import AnalysisView
from storage import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_alignment", "draw_layers", "draw_overlap", "save_alignment", "save_figures"]


def save_figures(view: AnalysisView, folder: Path) -> list[Path]:
    """Draw all pictures of an analysis as PNG files; their paths.

    A run of one task besides its reference has no overlap to draw.

    Raises:
        AnalysisError: if they cannot be written.
    """
    drawn = {"layers": draw_layers(view)}
    if view.overlap():
        drawn["overlap"] = draw_overlap(view)
    return [_save(figure, folder / f"{name}.png") for name, figure in drawn.items()]


def save_alignment(store: Store, analysis: str, metric: str, fraction: float, folder: Path) -> Path:
    """Draw how experts match selections as a PNG file; its path.

    Raises:
        AnalysisError: if it cannot be written.
    """
    rows = alignment_by_layer(store, analysis, metric, fraction)
    return _save(draw_alignment(rows, metric, fraction), folder / f"alignment-{fraction:g}.png")


def draw_overlap(view: AnalysisView) -> "Figure":
    """One heat map per site: percent of the row task's selection that the column task shares."""
    rows = view.overlap()
    figure = _figure(width=5.2 * len(view.sites) + 0.6, height=5.0)
    for axes, site in zip(_row_of_axes(figure, len(view.sites)), view.sites, strict=True):
        of_site = [row for row in rows if row["site"] == site]
        tasks = sorted({row["task_a"] for row in of_site})
        percent = np.full((len(tasks), len(tasks)), np.nan)
        for row in of_site:
            place = tasks.index(row["task_a"]), tasks.index(row["task_b"])
            percent[place] = 100 * (row["share_of_a"] or 0)
        _heat_map(axes, percent, tasks)
        axes.set_title(f"site {site}")
    figure.suptitle(
        f"Percent of the top {view.fraction:.1%} neurons ({view.metric}, against "
        f"{view.reference}) that two tasks share; chance is {view.fraction:.1%}",
        fontsize=10,
    )
    return figure


def draw_layers(view: AnalysisView) -> "Figure":
    """One panel per site: percent of each task's selected neurons that lie in each layer."""
    rows = view.layer_profile()
    figure = _figure(width=5.8 * len(view.sites), height=4.2)
    for axes, site in zip(_row_of_axes(figure, len(view.sites)), view.sites, strict=True):
        of_site = [row for row in rows if row["site"] == site]
        for task in sorted({row["task"] for row in of_site}):
            of_task = [row for row in of_site if row["task"] == task]
            counts = np.array([row["num_selected"] for row in of_task])
            layers = [row["layer"] for row in of_task]
            axes.plot(layers, 100 * counts / counts.sum(), label=task, marker=".")
        num_layers = len({row["layer"] for row in of_site})
        axes.axhline(100 / num_layers, color="0.6", linestyle=":", label="even")
        axes.set(title=f"site {site}", xlabel="layer", ylabel="percent of selected neurons")
        axes.set_ylim(bottom=0)
    figure.axes[-1].legend(fontsize=8)
    figure.suptitle(
        f"Where the top {view.fraction:.1%} neurons of each task lie ({view.metric}, against "
        f"{view.reference})",
        fontsize=10,
    )
    return figure


def draw_alignment(rows: list[dict[str, Any]], metric: str, fraction: float) -> "Figure":
    """Area under the curve and adjusted mutual information by layer, one line per combination.

    Args:
        rows: from `analysis.alignment.alignment_by_layer`.
        metric: importance metric.
        fraction: fraction of the neurons of each layer that tasks select.
    """
    figure = _figure(width=12, height=5.2)
    areas, information = _row_of_axes(figure, 2)
    pairs = sorted({(row["experts"], row["run"]) for row in rows})
    for experts, run in pairs:
        of_pair = [row for row in rows if (row["experts"], row["run"]) == (experts, run)]
        label = f"{experts} ({of_pair[0]['method']}), scores of {run}"
        layers = [row["layer"] for row in of_pair]
        for axes, name in ((areas, "auc"), (information, "ami")):
            mean, spread = (
                np.array([row[key] for row in of_pair], dtype=float)
                for key in (name, f"{name}_std")
            )
            (line,) = axes.plot(layers, mean, marker=".", label=label)
            axes.fill_between(
                layers, mean - spread, mean + spread, alpha=0.15, color=line.get_color()
            )
        if (experts, run) == pairs[0]:
            for key, text in (("auc_best", "best"), ("auc_random", "random selection")):
                heights = [row[key] for row in of_pair]
                areas.plot(layers, heights, color="0.5", linestyle=":", label=text)
    areas.set(title="area under the curve", xlabel="layer")
    information.set(title="adjusted mutual information", xlabel="layer")
    information.axhline(0, color="0.6", linestyle=":")
    figure.legend(
        *areas.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2
    )
    figure.suptitle(
        f"Experts and the top {fraction:.1%} neurons of each layer ({metric}): mean over tasks, "
        "shaded one standard deviation",
        fontsize=10,
    )
    return figure


def _save(figure: "Figure", path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise AnalysisError(
            f"cannot write pictures to {path.parent}: {error.strerror or error}. Give a folder "
            "that can be written."
        ) from error
    return path


def _figure(*, width: float, height: float) -> "Figure":
    # Not pyplot: it keeps global state and may want a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _row_of_axes(figure: "Figure", count: int) -> list["Axes"]:
    axes: Any = figure.subplots(1, count, squeeze=False)
    return list(axes[0])


def _heat_map(axes: "Axes", percent: np.ndarray, names: list[str]) -> None:
    image = axes.imshow(percent, cmap="viridis", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    middle = np.nanmax(percent) / 2
    for (row, column), value in np.ndenumerate(percent):
        if not np.isnan(value):
            color = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label="percent shared")
