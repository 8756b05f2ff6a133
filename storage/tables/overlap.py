"""Tables that statistics make: importance, selections and their overlap, and two runs compared."""

import pyarrow as pa

from storage.tables.table import (
    FRACTION,
    HEAD,
    LAYER,
    METRIC,
    NEURON,
    RUN,
    SITE,
    TASK,
    WITHIN,
    Table,
    column,
)

__all__ = ["OVERLAP_TABLES"]

_OF_ONE_RUN = (
    Table(
        name="importance",
        owner="analysis",
        purpose="How strongly each neuron takes part in a task, by each metric asked for.",
        grain="one row per (analysis, task, metric, site, layer, neuron)",
        schema=pa.schema(
            [
                RUN,
                TASK,
                METRIC,
                SITE,
                LAYER,
                NEURON,
                HEAD,
                column("importance", pa.float64(), "importance of the neuron in the task"),
            ]
        ),
    ),
    Table(
        name="scores",
        owner="analysis",
        purpose="Importance in a task against importance in the reference task.",
        grain="one row per (analysis, task, metric, site, layer, neuron)",
        schema=pa.schema(
            [
                RUN,
                TASK,
                column("reference", pa.string(), "name of the reference task", nullable=True),
                METRIC,
                SITE,
                LAYER,
                NEURON,
                HEAD,
                column(
                    "score",
                    pa.float64(),
                    "importance / (reference importance + eps); of mean, |importance - reference "
                    "importance|; of rand, the importance itself",
                ),
            ]
        ),
    ),
    Table(
        name="selections",
        owner="analysis",
        purpose="The most task-specific neurons: the top fraction by score.",
        grain="one row per (analysis, task, metric, site, within, fraction, layer, neuron)",
        schema=pa.schema(
            [
                RUN,
                TASK,
                METRIC,
                SITE,
                WITHIN,
                FRACTION,
                LAYER,
                NEURON,
                column("score", pa.float64(), "the score that the neuron was selected by"),
                column("rank", pa.int32(), "rank by score, from 1; ties by layer, then neuron"),
            ]
        ),
    ),
    Table(
        name="overlap",
        owner="analysis",
        purpose="How many neurons the selections of two tasks share, against chance.",
        grain="one row per (analysis, metric, site, within, fraction, layer, task_a, task_b); "
        "layer null = whole model; both orders of a pair, never a task with itself",
        schema=pa.schema(
            [
                RUN,
                METRIC,
                SITE,
                WITHIN,
                FRACTION,
                column("layer", pa.int16(), "layer; null = the whole model", nullable=True),
                column("task_a", pa.string(), "first task, A"),
                column("task_b", pa.string(), "second task, B"),
                column("population", pa.int64(), "number of neurons N that could be selected"),
                column("size_a", pa.int64(), "number of neurons selected for A"),
                column("size_b", pa.int64(), "number of neurons selected for B"),
                column("shared", pa.int64(), "number of neurons selected for both"),
                column(
                    "share_of_a", pa.float64(), "shared / size_a; null if A is empty", nullable=True
                ),
                column(
                    "jaccard", pa.float64(), "shared / union; null if both are empty", nullable=True
                ),
                column("expected", pa.float64(), "shared neurons by chance: size_a * size_b / N"),
                column(
                    "lift",
                    pa.float64(),
                    "shared / expected; null if nothing expected",
                    nullable=True,
                ),
                column(
                    "p_value", pa.float64(), "hypergeometric P(at least this many shared by chance)"
                ),
            ]
        ),
    ),
)

_DRIFT = Table(
    name="drift",
    owner="analysis",
    purpose="How far two runs over the same tasks differ: importance, selections, predictions.",
    grain="one row per (analysis, task, metric, site, within, fraction, layer); layer null = whole "
    "model; columns that do not depend on layer or fraction repeat",
    schema=pa.schema(
        [
            column("run_a", pa.string(), "id of the first run, A"),
            column("run_b", pa.string(), "id of the second run, B"),
            TASK,
            METRIC,
            SITE,
            WITHIN,
            FRACTION,
            column("layer", pa.int16(), "layer; null = the whole model", nullable=True),
            column("population", pa.int64(), "number of neurons N that are compared"),
            column(
                "correlation",
                pa.float64(),
                "Spearman's rank correlation of importance in A and B, ties at their mean rank; "
                "null if all neurons of one run are tied",
                nullable=True,
            ),
            column(
                "error_median",
                pa.float64(),
                "median over neurons of |a - b| / max(|a|, |b|), of the importances a in A and b "
                "in B; 0 where a = b",
            ),
            column("error_p90", pa.float64(), "90th percentile of the same"),
            column(
                "size_a",
                pa.int64(),
                "number of neurons selected in A; null for the reference, as the next six columns",
                nullable=True,
            ),
            column("size_b", pa.int64(), "number of neurons selected in B", nullable=True),
            column("shared", pa.int64(), "number of neurons selected in both", nullable=True),
            column(
                "share_of_a", pa.float64(), "shared / size_a; null if A has none", nullable=True
            ),
            column(
                "jaccard", pa.float64(), "shared / union; null if both have none", nullable=True
            ),
            column(
                "expected",
                pa.float64(),
                "shared neurons by chance: size_a * size_b / N",
                nullable=True,
            ),
            column(
                "lift", pa.float64(), "shared / expected; null if nothing expected", nullable=True
            ),
            column(
                "p_value",
                pa.float64(),
                "hypergeometric P(at least this many shared by chance); null for the reference",
                nullable=True,
            ),
            column("same_inputs", pa.bool_(), "whether both runs read the same tokens"),
            column(
                "loss_a",
                pa.float64(),
                "mean loss of the task in A over counted, predicted tokens, in nats; null if none",
                nullable=True,
            ),
            column("loss_b", pa.float64(), "the same in B", nullable=True),
            column("loss_difference", pa.float64(), "loss_b - loss_a", nullable=True),
            column(
                "top1_a",
                pa.float64(),
                "share of the same tokens of the task that A finds most probable; null if none",
                nullable=True,
            ),
            column("top1_b", pa.float64(), "the same in B", nullable=True),
            column("top1_difference", pa.float64(), "top1_b - top1_a", nullable=True),
        ]
    ),
)

_PERSISTENCE = Table(
    name="persistence",
    owner="analysis",
    purpose="Whether tasks share neurons in two runs in the same way, and whether they are the "
    "same neurons: of a model and its random twin, what training did not make.",
    grain="one row per (analysis, metric, site, within, fraction, layer); layer null = whole model",
    schema=pa.schema(
        [
            column("run_a", pa.string(), "id of the first run, A"),
            column("run_b", pa.string(), "id of the second run, B"),
            METRIC,
            SITE,
            WITHIN,
            FRACTION,
            column("layer", pa.int16(), "layer; null = the whole model", nullable=True),
            column("num_tasks", pa.int64(), "number of tasks that are compared"),
            column(
                "correlation",
                pa.float64(),
                "Pearson's correlation, over pairs of tasks, of the share of neurons that they "
                "have in common in A and in B; null for fewer than three tasks, or if all pairs "
                "are alike in one run",
                nullable=True,
            ),
            column(
                "p_value",
                pa.float64(),
                "share of orders of B's tasks that correlate as much or more (Mantel's test)",
                nullable=True,
            ),
            column("num_permutations", pa.int64(), "orders tried: all, or 5,040", nullable=True),
            column(
                "same_neurons",
                pa.float64(),
                "share of the tasks' selections in A that B selects for the same task",
                nullable=True,
            ),
            column(
                "same_neurons_spread",
                pa.float64(),
                "standard deviation of that share over tasks",
                nullable=True,
            ),
            column("same_by_chance", pa.float64(), "the share by chance", nullable=True),
            column("lift", pa.float64(), "same_neurons / same_by_chance", nullable=True),
            column(
                "selected_a",
                pa.float64(),
                "share of all selected neurons of A that lie in the layer",
                nullable=True,
            ),
            column("selected_b", pa.float64(), "the same of B", nullable=True),
        ]
    ),
)

OVERLAP_TABLES = (*_OF_ONE_RUN, _DRIFT, _PERSISTENCE)
