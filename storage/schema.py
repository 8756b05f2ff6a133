"""Every table of a store: columns, types, meaning and grain. This module is the public contract.

Tables of a run live under ``runs/run=<run>/<table>/task=<task>/...``; tables of an analysis under
``analyses/analysis=<analysis>/``. The partition keys (run, task, analysis) are in the path, not in
the files; every Hive-aware reader adds them as columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa

__all__ = ["SCHEMA_VERSION", "TABLES", "Table"]

SCHEMA_VERSION = 3
"""Raised whenever a name, a type or a meaning below changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One Parquet table of the store."""

    name: str
    """Name of the table, of its folder and of its view."""
    owner: Literal["run", "analysis"]
    """Whether files belong to a run (one per task and shard) or to an analysis (one in all)."""
    purpose: str
    """What the table holds, in one sentence."""
    grain: str
    """What one row stands for."""
    schema: pa.Schema
    """Columns inside the files; the metadata key ``doc`` of each field explains it."""
    sorted_by: tuple[str, ...] = ()
    """Columns that tell rows of a task apart, in the order in which compaction sorts them; none if
    files of the table stay as they are written."""
    row_group_rows: int = 1 << 17
    """Most rows of a row group: large enough to compress well, small enough that a filter on layer
    and neuron skips most of a big file."""

    inner_partitions: tuple[str, ...] = ()
    """Further columns that come from the path, inside those of run and task."""
    writing: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options of pyarrow's Parquet writer in which the table differs from others."""

    @property
    def partitions(self) -> tuple[str, ...]:
        """Columns that come from the path."""
        return (
            *(("run", "task") if self.owner == "run" else ("analysis",)),
            *self.inner_partitions,
        )

    def column_docs(self) -> dict[str, str]:
        """Explanation of every column, partition keys first."""
        docs = {key: _PARTITION_DOCS[key] for key in self.partitions}
        return docs | {field.name: field.metadata[b"doc"].decode() for field in self.schema}


_PARTITION_DOCS = {
    "run": "id of the run (from the path)",
    "task": "name of the task (from the path)",
    "analysis": "id of the analysis (from the path)",
    "site": "'attn' or 'mlp' (from the path)",
    "layer": "index of the layer, from 0 (from the path)",
}


def _column(name: str, dtype: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, dtype, nullable=nullable, metadata={"doc": doc})


_SHARD = _column("shard", pa.int32(), "index of the shard inside the task")
_BLOCK = _column("block", pa.int32(), "index of the shard whose positions these are")
_SAMPLE = _column("sample", pa.int32(), "index of the sample inside the task")
_LABEL = _column("label", pa.string(), "label of the sample, if it has one", nullable=True)
_LABEL_ID = _column(
    "label_id",
    pa.int32(),
    "of a labelled image: index of its class in the model's output",
    nullable=True,
)
_SITE = _column("site", pa.string(), "'attn' or 'mlp'; any text for scores of your own")
_LAYER = _column("layer", pa.int16(), "index of the layer, from 0")
_NEURON = _column("neuron", pa.int32(), "index of the neuron inside its site and layer, from 0")
_HEAD = _column(
    "head", pa.int16(), "attention head (neuron // head_dim); null at 'mlp'", nullable=True
)
_RUN = _column("run", pa.string(), "id of the run; null for scores of your own", nullable=True)
_TASK = _column("task", pa.string(), "name of the task")
_METRIC = _column(
    "metric", pa.string(), "abs, rms, std, sqrt, freq, mean or rand; 'given' for your own scores"
)
_WITHIN = _column(
    "within", pa.string(), "'model': the top fraction over all layers; 'layer': of each layer"
)
_FRACTION = _column("fraction", pa.float64(), "share of the neurons that is selected, in (0, 1]")

_RUN_TABLES = (
    Table(
        name="samples",
        owner="run",
        purpose="The chosen inputs, written before anything is computed; a resume reads these.",
        grain="one row per (run, task, sample), in the order in which the shard computes them",
        schema=pa.schema(
            [
                _SHARD,
                _column("batch", pa.int32(), "index of the batch inside the shard"),
                _SAMPLE,
                _column("source", pa.string(), "file or dataset row that the sample comes from"),
                _LABEL,
                _LABEL_ID,
                _column(
                    "text",
                    pa.string(),
                    "text of the sample, decoded from its tokens; null for images",
                    nullable=True,
                ),
                _column(
                    "image",
                    pa.binary(),
                    "the image as the dataset encodes it (PNG, JPEG, ...); null for texts",
                    nullable=True,
                ),
                _column(
                    "token_ids",
                    pa.list_(pa.int32()),
                    "token ids that the model reads; null for images",
                    nullable=True,
                ),
                _column("tokens", pa.list_(pa.string()), "text of each token (see table tokens)"),
                _column("is_special", pa.list_(pa.bool_()), "whether each token is special"),
                _column("counted", pa.list_(pa.bool_()), "whether each token counts in statistics"),
                _column("num_tokens", pa.int32(), "number of tokens"),
                _column("num_counted", pa.int32(), "number of tokens that count in statistics"),
            ]
        ),
    ),
    Table(
        name="tokens",
        owner="run",
        sorted_by=("sample", "position"),
        purpose="Every position: tokens, with how well the model predicted them from those before; "
        "of images, patches and the model's own tokens before them.",
        grain="one row per (run, task, sample, position)",
        schema=pa.schema(
            [
                _SHARD,
                _SAMPLE,
                _column("position", pa.int32(), "index of the token inside the sample, from 0"),
                _column("token_id", pa.int32(), "id of the token; null for images", nullable=True),
                _column(
                    "token",
                    pa.string(),
                    "text of the token; of an image '[PATCH row,column]', or '[CLS]', '[DIST]' or "
                    "'[REG]' for tokens that the model adds",
                ),
                _column(
                    "is_special",
                    pa.bool_(),
                    "whether the tokenizer calls the token special; of an image, whether the "
                    "model adds it",
                ),
                _column("counted", pa.bool_(), "whether the position counts in statistics"),
                _column(
                    "loss",
                    pa.float32(),
                    "-ln P(token | tokens before it), in nats; null at position 0 and for images",
                    nullable=True,
                ),
                _column(
                    "top1",
                    pa.bool_(),
                    "whether the token was the most probable one; null where loss is",
                    nullable=True,
                ),
                _column(
                    "top10",
                    pa.bool_(),
                    "whether it was among the ten most probable; null where loss is",
                    nullable=True,
                ),
            ]
        ),
    ),
    Table(
        name="predictions",
        owner="run",
        sorted_by=("sample",),
        purpose="Every image and how well the model predicted its class; models without a "
        "classification head leave none.",
        grain="one row per (run, task, sample)",
        schema=pa.schema(
            [
                _SHARD,
                _SAMPLE,
                _LABEL,
                _LABEL_ID,
                _column(
                    "predicted",
                    pa.string(),
                    "name of the most probable class; null if the model has no names",
                    nullable=True,
                ),
                _column("predicted_id", pa.int32(), "index of the most probable class"),
                _column(
                    "loss",
                    pa.float32(),
                    "-ln P(label), in nats; null without a label",
                    nullable=True,
                ),
                _column(
                    "top1",
                    pa.bool_(),
                    "whether the label was the most probable class; null without a label",
                    nullable=True,
                ),
                _column(
                    "top10",
                    pa.bool_(),
                    "whether it was among the ten most probable; null without a label",
                    nullable=True,
                ),
            ]
        ),
    ),
    Table(
        name="stats",
        owner="run",
        sorted_by=("site", "layer", "neuron", "shard"),
        purpose="Sufficient statistics of every neuron over the counted positions of one shard.",
        grain="one row per (run, task, shard, site, layer, neuron)",
        schema=pa.schema(
            [
                _SHARD,
                _SITE,
                _LAYER,
                _NEURON,
                _HEAD,
                _column("n", pa.int64(), "number of counted positions"),
                _column("mean", pa.float64(), "mean of the activation z"),
                _column("m2", pa.float64(), "sum of (z - mean)^2"),
                _column("abs_sum", pa.float64(), "sum of |z|"),
                _column("sqrt_sum", pa.float64(), "sum of sqrt|z|"),
                _column("pos_sum", pa.float64(), "sum of max(z, 0)"),
                _column("neg_sum", pa.float64(), "sum of min(z, 0)"),
                _column("pos_count", pa.int64(), "number of positions with z > 0"),
                _column("nonzero_count", pa.int64(), "number of positions with z != 0"),
                _column("min", pa.float32(), "smallest z"),
                _column("max", pa.float32(), "largest z"),
            ]
        ),
    ),
    Table(
        name="pooled",
        owner="run",
        sorted_by=("site", "layer", "neuron", "shard"),
        purpose="One value per sample and neuron, pooled over the counted positions of the sample: "
        "kept where the study asks for it. View pooled_activations has a row for each.",
        grain="one row per (run, task, shard, site, layer, neuron)",
        schema=pa.schema(
            [
                _SHARD,
                _SITE,
                _LAYER,
                _NEURON,
                _HEAD,
                _column(
                    "sample",
                    pa.list_(pa.int32()),
                    "indices of the samples inside the task; the same list for all neurons of a "
                    "shard",
                ),
                _column(
                    "max",
                    pa.list_(pa.float32()),
                    "largest z over the counted positions of each sample; null if not kept",
                    nullable=True,
                ),
                _column(
                    "mean",
                    pa.list_(pa.float32()),
                    "mean of z over the same positions; null if not kept",
                    nullable=True,
                ),
            ]
        ),
        row_group_rows=1 << 10,
    ),
    Table(
        name="top",
        owner="run",
        sorted_by=("site", "layer", "neuron", "shard"),
        purpose="The k highest and k lowest activations of every neuron over the counted positions "
        "of one shard. View top_activations merges them and has a row for each.",
        grain="one row per (run, task, shard, site, layer, neuron)",
        schema=pa.schema(
            [
                _SHARD,
                _SITE,
                _LAYER,
                _NEURON,
                _HEAD,
                _column(
                    "k",
                    pa.int32(),
                    "activations kept of each kind; lists are shorter where fewer positions count",
                ),
                _column(
                    "highest",
                    pa.list_(pa.float32()),
                    "the highest z, descending; ties by sample, then position",
                ),
                _column("highest_sample", pa.list_(pa.int32()), "their samples inside the task"),
                _column("highest_position", pa.list_(pa.int32()), "their positions in the samples"),
                _column(
                    "lowest",
                    pa.list_(pa.float32()),
                    "the lowest z, ascending; ties by sample, then position",
                ),
                _column("lowest_sample", pa.list_(pa.int32()), "their samples inside the task"),
                _column("lowest_position", pa.list_(pa.int32()), "their positions in the samples"),
            ]
        ),
        row_group_rows=1 << 10,
    ),
    Table(
        name="values",
        owner="run",
        sorted_by=("neuron", "block"),
        purpose="Raw activations, neuron by neuron: kept where the study asks for them. View "
        "activations has a row for each, decoded.",
        grain="one row per (run, task, site, layer, neuron, block)",
        schema=pa.schema(
            [
                _BLOCK,
                _NEURON,
                _HEAD,
                _column("n", pa.int64(), "number of activations"),
                _column(
                    "value",
                    pa.list_(pa.float32()),
                    "the activations z, in the order of the block's value_positions; rounded to "
                    "half precision if encoded as float16, null if as int8",
                    nullable=True,
                ),
                _column(
                    "code",
                    pa.list_(pa.int8()),
                    "of int8: the activations in units of scale, from -127 to 127",
                    nullable=True,
                ),
                _column("scale", pa.float32(), "of int8: z is about scale * code", nullable=True),
                _column(
                    "error_bound", pa.float32(), "most that a value differs from its activation"
                ),
            ]
        ),
        inner_partitions=("site", "layer"),
        # Measured on SmolLM2 (benchmarks/value_layouts.py). DuckDB, which reads no float16 in split
        # streams, reads float32 so, and the empty half of rounded values takes no space. Codes lie
        # close together: most take fewer than 8 bits, which a dictionary and zstd find. Higher
        # levels of zstd save nothing. Bounds of values in footers would only make them longer.
        writing=MappingProxyType(
            {
                "compression_level": 1,
                "use_dictionary": ["head", "code.list.element"],
                "column_encoding": {"value.list.element": "BYTE_STREAM_SPLIT"},
                "write_statistics": ["block", "neuron"],
                "write_page_checksum": True,
                "write_page_index": False,
                "write_batch_size": 1 << 16,
            }
        ),
    ),
    Table(
        name="value_positions",
        owner="run",
        sorted_by=("block",),
        purpose="Of which positions the lists of table values are, block by block.",
        grain="one row per (run, task, block)",
        schema=pa.schema(
            [
                _BLOCK,
                _column("n", pa.int64(), "number of positions"),
                _column(
                    "sample",
                    pa.list_(pa.int32()),
                    "index of the sample inside the task, for each position in the order of "
                    "computation",
                ),
                _column(
                    "position", pa.list_(pa.int32()), "index of the position inside its sample"
                ),
            ]
        ),
    ),
    Table(
        name="coactivation",
        owner="run",
        sorted_by=("site", "layer", "neuron", "shard"),
        purpose="Pairs of neurons of one site and layer over the counted positions of one shard: "
        "kept where the study asks for it. View neuron_pairs has a row for each pair.",
        grain="one row per (run, task, shard, site, layer, neuron)",
        schema=pa.schema(
            [
                _SHARD,
                _SITE,
                _LAYER,
                _NEURON,
                _HEAD,
                _column("n", pa.int64(), "number of counted positions"),
                _column(
                    "together",
                    pa.list_(pa.int32()),
                    "for each neuron of the layer: positions at which it and this one are > 0",
                ),
                _column(
                    "product",
                    pa.list_(pa.float64()),
                    "for each neuron of the layer: sum of its z times this one's",
                ),
            ]
        ),
        row_group_rows=1 << 6,
    ),
    Table(
        name="quarantine",
        owner="run",
        purpose="Samples that always fail and were set aside: of all tables of a run, only samples "
        "and this one hold them.",
        grain="one row per (run, task, sample) that was set aside",
        schema=pa.schema(
            [
                _SHARD,
                _SAMPLE,
                _column("source", pa.string(), "file or dataset row that the sample comes from"),
                _column("error", pa.string(), "why: what was not finite, or what the model raised"),
            ]
        ),
    ),
)

_ANALYSIS_TABLES = (
    Table(
        name="importance",
        owner="analysis",
        purpose="How strongly each neuron takes part in a task, by each metric asked for.",
        grain="one row per (analysis, task, metric, site, layer, neuron)",
        schema=pa.schema(
            [
                _RUN,
                _TASK,
                _METRIC,
                _SITE,
                _LAYER,
                _NEURON,
                _HEAD,
                _column("importance", pa.float64(), "importance of the neuron in the task"),
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
                _RUN,
                _TASK,
                _column("reference", pa.string(), "name of the reference task", nullable=True),
                _METRIC,
                _SITE,
                _LAYER,
                _NEURON,
                _HEAD,
                _column(
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
                _RUN,
                _TASK,
                _METRIC,
                _SITE,
                _WITHIN,
                _FRACTION,
                _LAYER,
                _NEURON,
                _column("score", pa.float64(), "the score that the neuron was selected by"),
                _column("rank", pa.int32(), "rank by score, from 1; ties by layer, then neuron"),
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
                _RUN,
                _METRIC,
                _SITE,
                _WITHIN,
                _FRACTION,
                _column("layer", pa.int16(), "layer; null = the whole model", nullable=True),
                _column("task_a", pa.string(), "first task, A"),
                _column("task_b", pa.string(), "second task, B"),
                _column("population", pa.int64(), "number of neurons N that could be selected"),
                _column("size_a", pa.int64(), "number of neurons selected for A"),
                _column("size_b", pa.int64(), "number of neurons selected for B"),
                _column("shared", pa.int64(), "number of neurons selected for both"),
                _column(
                    "share_of_a", pa.float64(), "shared / size_a; null if A is empty", nullable=True
                ),
                _column(
                    "jaccard", pa.float64(), "shared / union; null if both are empty", nullable=True
                ),
                _column("expected", pa.float64(), "shared neurons by chance: size_a * size_b / N"),
                _column(
                    "lift",
                    pa.float64(),
                    "shared / expected; null if nothing expected",
                    nullable=True,
                ),
                _column(
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
            _column("run_a", pa.string(), "id of the first run, A"),
            _column("run_b", pa.string(), "id of the second run, B"),
            _TASK,
            _METRIC,
            _SITE,
            _WITHIN,
            _FRACTION,
            _column("layer", pa.int16(), "layer; null = the whole model", nullable=True),
            _column("population", pa.int64(), "number of neurons N that are compared"),
            _column(
                "correlation",
                pa.float64(),
                "Spearman's rank correlation of importance in A and B, ties at their mean rank; "
                "null if all neurons of one run are tied",
                nullable=True,
            ),
            _column(
                "error_median",
                pa.float64(),
                "median over neurons of |a - b| / max(|a|, |b|), of the importances a in A and b "
                "in B; 0 where a = b",
            ),
            _column("error_p90", pa.float64(), "90th percentile of the same"),
            _column(
                "size_a",
                pa.int64(),
                "number of neurons selected in A; null for the reference, as the next six columns",
                nullable=True,
            ),
            _column("size_b", pa.int64(), "number of neurons selected in B", nullable=True),
            _column("shared", pa.int64(), "number of neurons selected in both", nullable=True),
            _column(
                "share_of_a", pa.float64(), "shared / size_a; null if A has none", nullable=True
            ),
            _column(
                "jaccard", pa.float64(), "shared / union; null if both have none", nullable=True
            ),
            _column(
                "expected",
                pa.float64(),
                "shared neurons by chance: size_a * size_b / N",
                nullable=True,
            ),
            _column(
                "lift", pa.float64(), "shared / expected; null if nothing expected", nullable=True
            ),
            _column(
                "p_value",
                pa.float64(),
                "hypergeometric P(at least this many shared by chance); null for the reference",
                nullable=True,
            ),
            _column("same_inputs", pa.bool_(), "whether both runs read the same tokens"),
            _column(
                "loss_a",
                pa.float64(),
                "mean loss of the task in A over counted, predicted tokens, in nats; null if none",
                nullable=True,
            ),
            _column("loss_b", pa.float64(), "the same in B", nullable=True),
            _column("loss_difference", pa.float64(), "loss_b - loss_a", nullable=True),
            _column(
                "top1_a",
                pa.float64(),
                "share of the same tokens of the task that A finds most probable; null if none",
                nullable=True,
            ),
            _column("top1_b", pa.float64(), "the same in B", nullable=True),
            _column("top1_difference", pa.float64(), "top1_b - top1_a", nullable=True),
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
            _column("run_a", pa.string(), "id of the first run, A"),
            _column("run_b", pa.string(), "id of the second run, B"),
            _METRIC,
            _SITE,
            _WITHIN,
            _FRACTION,
            _column("layer", pa.int16(), "layer; null = the whole model", nullable=True),
            _column("num_tasks", pa.int64(), "number of tasks that are compared"),
            _column(
                "correlation",
                pa.float64(),
                "Pearson's correlation, over pairs of tasks, of the share of neurons that they "
                "have in common in A and in B; null for fewer than three tasks, or if all pairs "
                "are alike in one run",
                nullable=True,
            ),
            _column(
                "p_value",
                pa.float64(),
                "share of orders of B's tasks that correlate as much or more (Mantel's test)",
                nullable=True,
            ),
            _column("num_permutations", pa.int64(), "orders tried: all, or 5,040", nullable=True),
            _column(
                "same_neurons",
                pa.float64(),
                "share of the tasks' selections in A that B selects for the same task",
                nullable=True,
            ),
            _column(
                "same_neurons_spread",
                pa.float64(),
                "standard deviation of that share over tasks",
                nullable=True,
            ),
            _column("same_by_chance", pa.float64(), "the share by chance", nullable=True),
            _column("lift", pa.float64(), "same_neurons / same_by_chance", nullable=True),
            _column(
                "selected_a",
                pa.float64(),
                "share of all selected neurons of A that lie in the layer",
                nullable=True,
            ),
            _column("selected_b", pa.float64(), "the same of B", nullable=True),
        ]
    ),
)

_PRUNED_TASK = _column(
    "task",
    pa.string(),
    "the task whose neurons are removed; null for the unpruned model",
    nullable=True,
)
_KIND = _column(
    "kind",
    pa.string(),
    "what takes the place of a removed activation: zero, mean, peak or resample; null for the "
    "unpruned model",
    nullable=True,
)
_CONTROL = _column(
    "seed", pa.int32(), "which of the random choices; null for others", nullable=True
)
_SITES = _column("sites", pa.string(), "sites that neurons are removed at, joined by '+'")
_EVALUATED = _column("evaluated", pa.string(), "the task that is evaluated")
_MEASURE = _column(
    "measure", pa.string(), "loss, top1, top10, top1_uncommon or top10_uncommon, as in evaluations"
)


def _estimate(name: str, doc: str) -> tuple[pa.Field, pa.Field, pa.Field]:
    """Columns of an estimate and its interval."""
    return (
        _column(name, pa.float64(), doc, nullable=True),
        _column(
            f"{name}_lower",
            pa.float64(),
            "lower end of its 95 % interval over samples; null if there is one sample",
            nullable=True,
        ),
        _column(f"{name}_upper", pa.float64(), "upper end of the same", nullable=True),
    )


_MEASURED = (
    _column("n", pa.int64(), "predictions: counted tokens with context, or images"),
    _column("mean_loss", pa.float64(), "mean -ln P(what is right), in nats"),
    _column("perplexity", pa.float64(), "exp(mean_loss)"),
    _column("top1_share", pa.float64(), "share that was the most probable one"),
    _column("top10_share", pa.float64(), "share that was among the ten most probable"),
    _column(
        "n_uncommon",
        pa.int64(),
        "predictions of tokens that are not among the 50 which the capture of the "
        "reference had most often as tokens to predict; 0 for images",
    ),
    _column(
        "top1_uncommon",
        pa.float64(),
        "top1_share over those; null if none",
        nullable=True,
    ),
    _column(
        "top10_uncommon",
        pa.float64(),
        "top10_share over those; null if none",
        nullable=True,
    ),
    *_estimate("loss_change", "mean_loss - that of the unpruned model, same samples"),
    *_estimate("top1_change", "top1_share - that of the unpruned model, same samples"),
)

_ABLATION_TABLES = (
    Table(
        name="evaluation_samples",
        owner="analysis",
        purpose="The inputs that ablated models are evaluated on: documents that the capture did "
        "not use, or those of another split.",
        grain="one row per (analysis, task, sample), in the order in which shards compute them",
        schema=pa.schema([_RUN, _TASK, *_RUN_TABLES[0].schema]),
    ),
    Table(
        name="evaluations",
        owner="analysis",
        purpose="How well tasks are predicted without some neurons, and by the unpruned model.",
        grain="one row per (analysis, task, kind, chosen_by, fraction, seed, evaluated, label); "
        "label null = all samples of the task",
        schema=pa.schema(
            [
                _RUN,
                _PRUNED_TASK,
                _KIND,
                _column(
                    "chosen_by",
                    pa.string(),
                    "'score': the top fraction; 'random': as many neurons of each site and layer; "
                    "'none': the unpruned model",
                ),
                _METRIC,
                _SITES,
                _WITHIN,
                _column(
                    "iterative",
                    pa.bool_(),
                    "whether neurons are scored again on the ablated model before each fraction",
                ),
                _column("fraction", pa.float64(), "share of the neurons that is removed"),
                _CONTROL,
                _column("num_removed", pa.int64(), "number of removed neurons"),
                _EVALUATED,
                _LABEL,
                _LABEL_ID,
                *_MEASURED,
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
                _RUN,
                _TASK,
                _column("kind", pa.string(), "what takes the place of a removed activation"),
                _FRACTION,
                _EVALUATED,
                _MEASURE,
                _column("unpruned", pa.float64(), "the measure of the unpruned model"),
                _column("selected_change", pa.float64(), "its change without the top fraction"),
                _column("num_random", pa.int32(), "number of random controls"),
                _column("random_change", pa.float64(), "mean change without random neurons"),
                _column(
                    "random_std",
                    pa.float64(),
                    "standard deviation over controls; null if there is one",
                    nullable=True,
                ),
                _column(
                    "excess",
                    pa.float64(),
                    "selected_change - random_change: of loss, above 0 if the selection hurts more",
                ),
                _column(
                    "excess_lower",
                    pa.float64(),
                    "lower end of its 95 % interval over samples and controls; null if there is "
                    "one of either",
                    nullable=True,
                ),
                _column("excess_upper", pa.float64(), "upper end of the same", nullable=True),
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
                _RUN,
                _column("task", pa.string(), "the task whose neurons are removed: forget"),
                _column("kind", pa.string(), "what takes the place of a removed activation"),
                _column("chosen_by", pa.string(), "'score' or 'random'"),
                _CONTROL,
                _column("retained", pa.string(), "the task that it is compared with: retain"),
                _MEASURE,
                _column(
                    "max_difference",
                    pa.float64(),
                    "largest drop_forget - drop_retain of the curve, drops in percent of the "
                    "unpruned value",
                    nullable=True,
                ),
                _column(
                    "area",
                    pa.float64(),
                    "2 / 100^2 * area of (drop_forget - drop_retain) over drop_retain, from no "
                    "drop to the largest fraction: 0 unselective, 1 perfect at 100 %",
                    nullable=True,
                ),
                _column(
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
                _RUN,
                _TASK,
                _column("kind", pa.string(), "what takes the place of a removed activation"),
                _METRIC,
                _SITES,
                _WITHIN,
                _column("target", pa.float64(), "share of its top-1 that the task was to fall to"),
                _column(
                    "reached",
                    pa.bool_(),
                    "whether it did; if not, all neurons are removed, and no fraction that was "
                    "tried did it either",
                ),
                _column("fraction", pa.float64(), "share of the neurons that this took"),
                _column("num_removed", pa.int64(), "number of removed neurons"),
                _EVALUATED,
                _column("n", pa.int64(), "predictions: counted tokens with context, or images"),
                _column(
                    "top1_unpruned",
                    pa.float64(),
                    "share of right predictions of the unpruned model",
                ),
                _column("top1_pruned", pa.float64(), "top1_share of the pruned model"),
                *_estimate("ratio", "top1_pruned / top1_unpruned; null if that is 0"),
                _column("loss_unpruned", pa.float64(), "mean loss of the unpruned model, in nats"),
                _column("loss_pruned", pa.float64(), "mean loss of the pruned model, in nats"),
            ]
        ),
    ),
)

_METHOD = _column(
    "method",
    pa.string(),
    "kmeans: balanced k-means on unit rows of the input projection; coactivation: a graph of "
    "neurons that fire together, cut; random: dealt out at random",
)
_EXPERT = _column("expert", pa.int32(), "index of the expert inside its layer, from 0")

_COMPARED_EXPERTS = (
    _column("experts", pa.string(), "id of the analysis that made the experts"),
    _column("experts_run", pa.string(), "id of the run whose weights they were made of"),
    _METHOD,
    _column("run", pa.string(), "id of the run whose scores select"),
    _TASK,
    _METRIC,
    _SITE,
    _FRACTION,
    _LAYER,
)

_EXPERT_TABLES = (
    Table(
        name="clusters",
        owner="analysis",
        purpose="The experts that the neurons of each layer were grouped into.",
        grain="one row per (analysis, site, layer, neuron)",
        schema=pa.schema([_RUN, _SITE, _METHOD, _LAYER, _NEURON, _EXPERT]),
    ),
    Table(
        name="cluster_layers",
        owner="analysis",
        purpose="How the neurons of each layer were grouped, and how alike those of an expert are.",
        grain="one row per (analysis, site, layer)",
        schema=pa.schema(
            [
                _RUN,
                _SITE,
                _METHOD,
                _LAYER,
                _column("num_neurons", pa.int32(), "number of neurons"),
                _column("num_experts", pa.int32(), "number of experts"),
                _column("smallest", pa.int32(), "neurons of the smallest expert"),
                _column("largest", pa.int32(), "neurons of the largest expert"),
                _column(
                    "inertia",
                    pa.float64(),
                    "sum of squared distances of unit rows to the mean of their expert; null if "
                    "rows were not read, as the next two columns",
                    nullable=True,
                ),
                _column(
                    "total_inertia", pa.float64(), "the same if all were one expert", nullable=True
                ),
                _column("num_iterations", pa.int32(), "iterations of k-means", nullable=True),
                _column(
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
                _column("num_neurons", pa.int32(), "number of neurons, d"),
                _column("num_experts", pa.int32(), "number of experts, C"),
                _column("num_selected", pa.int32(), "number of selected neurons, s"),
                _column(
                    "curve",
                    pa.list_(pa.int32()),
                    "y_i: selected neurons in the i experts that hold most, i from 0 to min(s, C)",
                ),
                _column("auc", pa.float64(), "(y_0 + ... + y_(x-1)) / (x * y_x), x = min(s, C)"),
                _column("auc_best", pa.float64(), "largest auc that experts of these sizes allow"),
                _column("auc_random", pa.float64(), "mean auc of s neurons drawn at random"),
                _column("auc_random_std", pa.float64(), "standard deviation of the same"),
                _column(
                    "p_value",
                    pa.float64(),
                    "(1 + random selections of at least this auc) / (1 + random selections)",
                ),
                _column(
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
                _column("size", pa.int32(), "neurons of the expert"),
                _column("held", pa.int32(), "how many of them the task selects"),
                _column("expected", pa.float64(), "the same by chance: selected * size / neurons"),
                _column("lift", pa.float64(), "held / expected"),
                _column(
                    "p_value", pa.float64(), "hypergeometric P(at least this many held by chance)"
                ),
            ]
        ),
    ),
)

_ROUTED = (
    _RUN,
    _column("experts", pa.string(), "id of the analysis that made the experts"),
    _METHOD,
    _column("task", pa.string(), "the task that is evaluated"),
)
_SHARE = _column("share", pa.float64(), "share of the experts of each layer that is kept")
_NUM_KEPT = _column("num_kept", pa.int32(), "experts of each layer that are kept for a token")
_CHOSEN = (
    "truth: the experts with the largest sum of |activation|; centroid: those whose mean unit row "
    "is nearest to the unit input of the MLP; learned: by a network that reads that input; random"
)

_ROUTING_TABLES = (
    Table(
        name="routing_layers",
        owner="analysis",
        purpose="How much of a token's activation lies in the few experts that a router chooses, "
        "in the unpruned model.",
        grain="one row per (analysis, experts, task, router, share, layer)",
        schema=pa.schema(
            [
                *_ROUTED,
                _column("router", pa.string(), _CHOSEN),
                _SHARE,
                _LAYER,
                _column("num_experts", pa.int32(), "number of experts"),
                _NUM_KEPT,
                _column("n", pa.int64(), "counted positions"),
                _column(
                    "mass_kept",
                    pa.float64(),
                    "mean over positions of the share of the sum of |activation| that lies in the "
                    "chosen experts",
                ),
                _column("mass_best", pa.float64(), "the same of the experts with the largest sums"),
                _column(
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
                _column("router", pa.string(), f"all: every expert, share 1; {_CHOSEN}"),
                _SHARE,
                _column("num_layers", pa.int32(), "layers that have experts"),
                _NUM_KEPT,
                *_MEASURED,
            ]
        ),
    ),
)

TABLES: Mapping[str, Table] = MappingProxyType(
    {
        table.name: table
        for table in (
            *_RUN_TABLES,
            *_ANALYSIS_TABLES,
            _DRIFT,
            _PERSISTENCE,
            *_ABLATION_TABLES,
            *_EXPERT_TABLES,
            *_ROUTING_TABLES,
        )
    }
)
"""Every table by name."""
