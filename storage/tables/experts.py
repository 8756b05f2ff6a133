"""Tables of experts: groups of neurons, whether tasks select them, and routing by them."""

import pyarrow as pa

from storage.tables.ablation import MEASURED
from storage.tables.table import FRACTION, LAYER, METRIC, NEURON, RUN, SITE, TASK, Table, column

__all__ = ["EXPERT_TABLES", "ROUTING_TABLES"]

_METHOD = column(
    "method",
    pa.string(),
    "kmeans: balanced k-means on unit rows of the input projection; coactivation: a graph of "
    "neurons that fire together, cut; random: dealt out at random",
)
_EXPERT = column("expert", pa.int32(), "index of the expert inside its layer, from 0")

_COMPARED_EXPERTS = (
    column("experts", pa.string(), "id of the analysis that made the experts"),
    column("experts_run", pa.string(), "id of the run whose weights they were made of"),
    _METHOD,
    column("run", pa.string(), "id of the run whose scores select"),
    TASK,
    METRIC,
    SITE,
    FRACTION,
    LAYER,
)

EXPERT_TABLES = (
    Table(
        name="clusters",
        owner="analysis",
        purpose="The experts that the neurons of each layer were grouped into.",
        grain="one row per (analysis, site, layer, neuron)",
        schema=pa.schema([RUN, SITE, _METHOD, LAYER, NEURON, _EXPERT]),
    ),
    Table(
        name="cluster_layers",
        owner="analysis",
        purpose="How the neurons of each layer were grouped, and how alike those of an expert are.",
        grain="one row per (analysis, site, layer)",
        schema=pa.schema(
            [
                RUN,
                SITE,
                _METHOD,
                LAYER,
                column("num_neurons", pa.int32(), "number of neurons"),
                column("num_experts", pa.int32(), "number of experts"),
                column("smallest", pa.int32(), "neurons of the smallest expert"),
                column("largest", pa.int32(), "neurons of the largest expert"),
                column(
                    "inertia",
                    pa.float64(),
                    "sum of squared distances of unit rows to the mean of their expert; null if "
                    "rows were not read, as the next two columns",
                    nullable=True,
                ),
                column(
                    "total_inertia", pa.float64(), "the same if all were one expert", nullable=True
                ),
                column("num_iterations", pa.int32(), "iterations of k-means", nullable=True),
                column(
                    "inside",
                    pa.float64(),
                    "share of the weight of co-activation that lies inside experts; null if no "
                    "graph was cut",
                    nullable=True,
                ),
            ]
        ),
    ),
    Table(
        name="cluster_alignment",
        owner="analysis",
        purpose="Whether the neurons that a task selects in a layer lie together in experts.",
        grain="one row per (analysis, experts, run, task, metric, site, fraction, layer)",
        schema=pa.schema(
            [
                *_COMPARED_EXPERTS,
                column("num_neurons", pa.int32(), "number of neurons, d"),
                column("num_experts", pa.int32(), "number of experts, C"),
                column("num_selected", pa.int32(), "number of selected neurons, s"),
                column(
                    "curve",
                    pa.list_(pa.int32()),
                    "y_i: selected neurons in the i experts that hold most, i from 0 to min(s, C)",
                ),
                column("auc", pa.float64(), "(y_0 + ... + y_(x-1)) / (x * y_x), x = min(s, C)"),
                column("auc_best", pa.float64(), "largest auc that experts of these sizes allow"),
                column("auc_random", pa.float64(), "mean auc of s neurons drawn at random"),
                column("auc_random_std", pa.float64(), "standard deviation of the same"),
                column(
                    "p_value",
                    pa.float64(),
                    "(1 + random selections of at least this auc) / (1 + random selections)",
                ),
                column(
                    "ami",
                    pa.float64(),
                    "adjusted mutual information of experts and selection: 1 if every expert is "
                    "selected wholly or not at all, 0 on average by chance; null if C = 1 or s = d",
                    nullable=True,
                ),
            ]
        ),
    ),
    Table(
        name="cluster_enrichment",
        owner="analysis",
        purpose="Whether an expert holds more neurons of a task's selection than chance gives it.",
        grain="one row per (analysis, experts, run, task, metric, site, fraction, layer, expert)",
        schema=pa.schema(
            [
                *_COMPARED_EXPERTS,
                _EXPERT,
                column("size", pa.int32(), "neurons of the expert"),
                column("held", pa.int32(), "how many of them the task selects"),
                column("expected", pa.float64(), "the same by chance: selected * size / neurons"),
                column("lift", pa.float64(), "held / expected"),
                column(
                    "p_value", pa.float64(), "hypergeometric P(at least this many held by chance)"
                ),
            ]
        ),
    ),
)

_ROUTED = (
    RUN,
    column("experts", pa.string(), "id of the analysis that made the experts"),
    _METHOD,
    column("task", pa.string(), "the task that is evaluated"),
)
_SHARE = column("share", pa.float64(), "share of the experts of each layer that is kept")
_NUM_KEPT = column("num_kept", pa.int32(), "experts of each layer that are kept for a token")
_CHOSEN = (
    "truth: the experts with the largest sum of |activation|; centroid: those whose mean unit row "
    "is nearest to the unit input of the MLP; learned: by a network that reads that input; random"
)

ROUTING_TABLES = (
    Table(
        name="routing_layers",
        owner="analysis",
        purpose="How much of a token's activation lies in the few experts that a router chooses, "
        "in the unpruned model.",
        grain="one row per (analysis, experts, task, router, share, layer)",
        schema=pa.schema(
            [
                *_ROUTED,
                column("router", pa.string(), _CHOSEN),
                _SHARE,
                LAYER,
                column("num_experts", pa.int32(), "number of experts"),
                _NUM_KEPT,
                column("n", pa.int64(), "counted positions"),
                column(
                    "mass_kept",
                    pa.float64(),
                    "mean over positions of the share of the sum of |activation| that lies in the "
                    "chosen experts",
                ),
                column("mass_best", pa.float64(), "the same of the experts with the largest sums"),
                column(
                    "mass_ratio",
                    pa.float64(),
                    "mean over positions of what is kept, relative to what is kept at best",
                ),
            ]
        ),
    ),
    Table(
        name="routing",
        owner="analysis",
        purpose="How well tasks are predicted if each token keeps only the experts that a router "
        "chooses for it, in all layers that have experts.",
        grain="one row per (analysis, experts, task, router, share)",
        schema=pa.schema(
            [
                *_ROUTED,
                column("router", pa.string(), f"all: every expert, share 1; {_CHOSEN}"),
                _SHARE,
                column("num_layers", pa.int32(), "layers that have experts"),
                _NUM_KEPT,
                *MEASURED,
            ]
        ),
    ),
)
