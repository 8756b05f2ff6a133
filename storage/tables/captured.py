"""Tables of a run: what a capture writes, shard by shard."""

import pyarrow as pa

from storage.tables.table import (
    BLOCK,
    HEAD,
    LABEL,
    LABEL_ID,
    NEURON,
    NEURON_OF_SHARD,
    SAMPLE,
    SHARD,
    Table,
    column,
)

__all__ = ["RUN_TABLES"]

RUN_TABLES = (
    Table(
        name="samples",
        owner="run",
        purpose="The chosen inputs, written before anything is computed; a resume reads these.",
        grain="one row per (run, task, sample), in the order in which the shard computes them",
        schema=pa.schema(
            [
                SHARD,
                column("batch", pa.int32(), "index of the batch inside the shard"),
                SAMPLE,
                column("source", pa.string(), "file or dataset row that the sample comes from"),
                LABEL,
                LABEL_ID,
                column(
                    "text",
                    pa.string(),
                    "text of the sample, decoded from its tokens; null for images",
                    nullable=True,
                ),
                column(
                    "image",
                    pa.binary(),
                    "the image as the dataset encodes it (PNG, JPEG, ...); null for texts",
                    nullable=True,
                ),
                column(
                    "token_ids",
                    pa.list_(pa.int32()),
                    "token ids that the model reads; null for images",
                    nullable=True,
                ),
                column("tokens", pa.list_(pa.string()), "text of each token (see table tokens)"),
                column("is_special", pa.list_(pa.bool_()), "whether each token is special"),
                column("counted", pa.list_(pa.bool_()), "whether each token counts in statistics"),
                column("num_tokens", pa.int32(), "number of tokens"),
                column("num_counted", pa.int32(), "number of tokens that count in statistics"),
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
                SHARD,
                SAMPLE,
                column("position", pa.int32(), "index of the token inside the sample, from 0"),
                column("token_id", pa.int32(), "id of the token; null for images", nullable=True),
                column(
                    "token",
                    pa.string(),
                    "text of the token; of an image '[PATCH row,column]', or '[CLS]', '[DIST]' or "
                    "'[REG]' for tokens that the model adds",
                ),
                column(
                    "is_special",
                    pa.bool_(),
                    "whether the tokenizer calls the token special; of an image, whether the "
                    "model adds it",
                ),
                column("counted", pa.bool_(), "whether the position counts in statistics"),
                column(
                    "loss",
                    pa.float32(),
                    "-ln P(token | tokens before it), in nats; null at position 0 and for images",
                    nullable=True,
                ),
                column(
                    "top1",
                    pa.bool_(),
                    "whether the token was the most probable one; null where loss is",
                    nullable=True,
                ),
                column(
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
                SHARD,
                SAMPLE,
                LABEL,
                LABEL_ID,
                column(
                    "predicted",
                    pa.string(),
                    "name of the most probable class; null if the model has no names",
                    nullable=True,
                ),
                column("predicted_id", pa.int32(), "index of the most probable class"),
                column(
                    "loss",
                    pa.float32(),
                    "-ln P(label), in nats; null without a label",
                    nullable=True,
                ),
                column(
                    "top1",
                    pa.bool_(),
                    "whether the label was the most probable class; null without a label",
                    nullable=True,
                ),
                column(
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
                *NEURON_OF_SHARD,
                column("n", pa.int64(), "number of counted positions"),
                column("mean", pa.float64(), "mean of the activation z"),
                column("m2", pa.float64(), "sum of (z - mean)^2"),
                column("abs_sum", pa.float64(), "sum of |z|"),
                column("sqrt_sum", pa.float64(), "sum of sqrt|z|"),
                column("pos_sum", pa.float64(), "sum of max(z, 0)"),
                column("neg_sum", pa.float64(), "sum of min(z, 0)"),
                column("pos_count", pa.int64(), "number of positions with z > 0"),
                column("nonzero_count", pa.int64(), "number of positions with z != 0"),
                column("min", pa.float32(), "smallest z"),
                column("max", pa.float32(), "largest z"),
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
                *NEURON_OF_SHARD,
                column(
                    "sample",
                    pa.list_(pa.int32()),
                    "indices of the samples inside the task; the same list for all neurons of a "
                    "shard",
                ),
                column(
                    "max",
                    pa.list_(pa.float32()),
                    "largest z over the counted positions of each sample; null if not kept",
                    nullable=True,
                ),
                column(
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
                *NEURON_OF_SHARD,
                column(
                    "k",
                    pa.int32(),
                    "activations kept of each kind; lists are shorter where fewer positions count",
                ),
                column(
                    "highest",
                    pa.list_(pa.float32()),
                    "the highest z, descending; ties by sample, then position",
                ),
                column("highest_sample", pa.list_(pa.int32()), "their samples inside the task"),
                column("highest_position", pa.list_(pa.int32()), "their positions in the samples"),
                column(
                    "lowest",
                    pa.list_(pa.float32()),
                    "the lowest z, ascending; ties by sample, then position",
                ),
                column("lowest_sample", pa.list_(pa.int32()), "their samples inside the task"),
                column("lowest_position", pa.list_(pa.int32()), "their positions in the samples"),
            ]
        ),
        row_group_rows=1 << 10,
    ),
    Table(
        name="values",
        owner="run",
        sorted_by=("neuron", "block"),
        purpose="Raw activations, neuron by neuron: kept where the study asks for them. View "
        "activations has them decoded.",
        grain="one row per (run, task, site, layer, neuron, sample, position) that was kept",
        schema=pa.schema(
            [
                BLOCK,
                NEURON,
                HEAD,
                SAMPLE,
                column("position", pa.int32(), "index of the position inside its sample"),
                column(
                    "value",
                    pa.float32(),
                    "the activation z; float16 in the files if so encoded, null if encoded as int8",
                    nullable=True,
                ),
                column(
                    "code",
                    pa.int8(),
                    "of int8: the activation in units of scale, from -127 to 127",
                    nullable=True,
                ),
                column(
                    "scale",
                    pa.float32(),
                    "of int8: z is about scale * code; one for each neuron and block",
                    nullable=True,
                ),
                column(
                    "error_bound", pa.float32(), "most that a value differs from its activation"
                ),
            ]
        ),
        inner_partitions=("site", "layer"),
        unnested_bounds=("block", "neuron"),
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
                *NEURON_OF_SHARD,
                column("n", pa.int64(), "number of counted positions"),
                column(
                    "together",
                    pa.list_(pa.int32()),
                    "for each neuron of the layer: positions at which it and this one are > 0",
                ),
                column(
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
                SHARD,
                SAMPLE,
                column("source", pa.string(), "file or dataset row that the sample comes from"),
                column("error", pa.string(), "why: what was not finite, or what the model raised"),
            ]
        ),
    ),
)
