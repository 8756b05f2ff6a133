"""Tables of models with neurons removed."""

import pyarrow as pa

from storage.tables.captured import RUN_TABLES
from storage.tables.table import FRACTION, LABEL, LABEL_ID, METRIC, RUN, TASK, WITHIN, Table, column

__all__ = ["ABLATION_TABLES", "MEASURED"]

_PRUNED_TASK = column(
    "task",
    pa.string(),
    "the task whose neurons are removed; null for the unpruned model",
    nullable=True,
)
_KIND = column(
    "kind",
    pa.string(),
    "what takes the place of a removed activation: zero, mean, peak or resample; null for the "
    "unpruned model",
    nullable=True,
)
_CONTROL = column("seed", pa.int32(), "which of the random choices; null for others", nullable=True)
_SITES = column("sites", pa.string(), "sites that neurons are removed at, joined by '+'")
_EVALUATED = column("evaluated", pa.string(), "the task that is evaluated")
_MEASURE = column(
    "measure", pa.string(), "loss, top1, top10, top1_uncommon or top10_uncommon, as in evaluations"
)


def _estimate(name: str, doc: str) -> tuple[pa.Field, pa.Field, pa.Field]:
    """Columns of an estimate and its interval."""
    return (
        column(name, pa.float64(), doc, nullable=True),
        column(
            f"{name}_lower",
            pa.float64(),
            "lower end of its 95 % interval over samples; null if there is one sample",
            nullable=True,
        ),
        column(f"{name}_upper", pa.float64(), "upper end of the same", nullable=True),
    )


MEASURED = (
    column("n", pa.int64(), "predictions: counted tokens with context, or images"),
    column("mean_loss", pa.float64(), "mean -ln P(what is right), in nats"),
    column("perplexity", pa.float64(), "exp(mean_loss)"),
    column("top1_share", pa.float64(), "share that was the most probable one"),
    column("top10_share", pa.float64(), "share that was among the ten most probable"),
    column(
        "n_uncommon",
        pa.int64(),
        "predictions of tokens that are not among the 50 which the capture of the "
        "reference had most often as tokens to predict; 0 for images",
    ),
    column(
        "top1_uncommon",
        pa.float64(),
        "top1_share over those; null if none",
        nullable=True,
    ),
    column(
        "top10_uncommon",
        pa.float64(),
        "top10_share over those; null if none",
        nullable=True,
    ),
    *_estimate("loss_change", "mean_loss - that of the unpruned model, same samples"),
    *_estimate("top1_change", "top1_share - that of the unpruned model, same samples"),
)
"""Columns that say how well something was predicted, with intervals."""

ABLATION_TABLES = (
    Table(
        name="evaluation_samples",
        owner="analysis",
        purpose="The inputs that ablated models are evaluated on: documents that the capture did "
        "not use, or those of another split.",
        grain="one row per (analysis, task, sample), in the order in which shards compute them",
        schema=pa.schema([RUN, TASK, *RUN_TABLES[0].schema]),
    ),
    Table(
        name="evaluations",
        owner="analysis",
        purpose="How well tasks are predicted without some neurons, and by the unpruned model.",
        grain="one row per (analysis, task, kind, chosen_by, fraction, seed, evaluated, label); "
        "label null = all samples of the task",
        schema=pa.schema(
            [
                RUN,
                _PRUNED_TASK,
                _KIND,
                column(
                    "chosen_by",
                    pa.string(),
                    "'score': the top fraction; 'random': as many neurons of each site and layer; "
                    "'none': the unpruned model",
                ),
                METRIC,
                _SITES,
                WITHIN,
                column(
                    "iterative",
                    pa.bool_(),
                    "whether neurons are scored again on the ablated model before each fraction",
                ),
                column("fraction", pa.float64(), "share of the neurons that is removed"),
                _CONTROL,
                column("num_removed", pa.int64(), "number of removed neurons"),
                _EVALUATED,
                LABEL,
                LABEL_ID,
                *MEASURED,
            ]
        ),
    ),
    Table(
        name="ablation_effects",
        owner="analysis",
        purpose="How much more the removal of a task's own neurons changes a task than that of as "
        "many random ones.",
        grain="one row per (analysis, task, kind, fraction, evaluated, measure)",
        schema=pa.schema(
            [
                RUN,
                TASK,
                column("kind", pa.string(), "what takes the place of a removed activation"),
                FRACTION,
                _EVALUATED,
                _MEASURE,
                column("unpruned", pa.float64(), "the measure of the unpruned model"),
                column("selected_change", pa.float64(), "its change without the top fraction"),
                column("num_random", pa.int32(), "number of random controls"),
                column("random_change", pa.float64(), "mean change without random neurons"),
                column(
                    "random_std",
                    pa.float64(),
                    "standard deviation over controls; null if there is one",
                    nullable=True,
                ),
                column(
                    "excess",
                    pa.float64(),
                    "selected_change - random_change: of loss, above 0 if the selection hurts more",
                ),
                column(
                    "excess_lower",
                    pa.float64(),
                    "lower end of its 95 % interval over samples and controls; null if there is "
                    "one of either",
                    nullable=True,
                ),
                column("excess_upper", pa.float64(), "upper end of the same", nullable=True),
            ]
        ),
    ),
    Table(
        name="selectivity",
        owner="analysis",
        purpose="Whether pruning hurts the pruned task more than another, over a whole curve.",
        grain="one row per (analysis, task, kind, chosen_by, seed, retained, measure)",
        schema=pa.schema(
            [
                RUN,
                column("task", pa.string(), "the task whose neurons are removed: forget"),
                column("kind", pa.string(), "what takes the place of a removed activation"),
                column("chosen_by", pa.string(), "'score' or 'random'"),
                _CONTROL,
                column("retained", pa.string(), "the task that it is compared with: retain"),
                _MEASURE,
                column(
                    "max_difference",
                    pa.float64(),
                    "largest drop_forget - drop_retain of the curve, drops in percent of the "
                    "unpruned value",
                    nullable=True,
                ),
                column(
                    "area",
                    pa.float64(),
                    "2 / 100^2 * area of (drop_forget - drop_retain) over drop_retain, from no "
                    "drop to the largest fraction: 0 unselective, 1 perfect at 100 %",
                    nullable=True,
                ),
                column(
                    "area_ratio",
                    pa.float64(),
                    "area under retain over forget, from the origin through the curve to the "
                    "unpruned model, over half the unpruned rectangle: 1 unselective, 2 perfect",
                    nullable=True,
                ),
            ]
        ),
    ),
    Table(
        name="cross_evaluations",
        owner="analysis",
        purpose="What pruning for one task, until its top-1 falls to a target, does to every task.",
        grain="one row per (analysis, task, evaluated)",
        schema=pa.schema(
            [
                RUN,
                TASK,
                column("kind", pa.string(), "what takes the place of a removed activation"),
                METRIC,
                _SITES,
                WITHIN,
                column("target", pa.float64(), "share of its top-1 that the task was to fall to"),
                column(
                    "reached",
                    pa.bool_(),
                    "whether it did; if not, all neurons are removed, and no fraction that was "
                    "tried did it either",
                ),
                column("fraction", pa.float64(), "share of the neurons that this took"),
                column("num_removed", pa.int64(), "number of removed neurons"),
                _EVALUATED,
                column("n", pa.int64(), "predictions: counted tokens with context, or images"),
                column(
                    "top1_unpruned",
                    pa.float64(),
                    "share of right predictions of the unpruned model",
                ),
                column("top1_pruned", pa.float64(), "top1_share of the pruned model"),
                *_estimate("ratio", "top1_pruned / top1_unpruned; null if that is 0"),
                column("loss_unpruned", pa.float64(), "mean loss of the unpruned model, in nats"),
                column("loss_pruned", pa.float64(), "mean loss of the pruned model, in nats"),
            ]
        ),
    ),
)
