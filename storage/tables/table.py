"""What a table is, and columns that several tables have."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

__all__ = [
    "BLOCK",
    "FRACTION",
    "HEAD",
    "LABEL",
    "LABEL_ID",
    "LAYER",
    "METRIC",
    "NEURON",
    "NEURON_OF_SHARD",
    "RUN",
    "SAMPLE",
    "SHARD",
    "SITE",
    "TASK",
    "WITHIN",
    "Table",
    "column",
]


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
    unnested_bounds: tuple[str, ...] | None = None
    """Of a table that `storage.pages` writes from lists: integer columns whose least and greatest
    values stand in the footer, for readers to skip row groups. None if pyarrow writes it."""

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


def column(name: str, dtype: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    """A column that explains itself."""
    return pa.field(name, dtype, nullable=nullable, metadata={"doc": doc})


SHARD = column("shard", pa.int32(), "index of the shard inside the task")
BLOCK = column("block", pa.int32(), "index of the shard whose positions these are")
SAMPLE = column("sample", pa.int32(), "index of the sample inside the task")
LABEL = column("label", pa.string(), "label of the sample, if it has one", nullable=True)
LABEL_ID = column(
    "label_id",
    pa.int32(),
    "of a labelled image: index of its class in the model's output",
    nullable=True,
)
SITE = column("site", pa.string(), "'attn' or 'mlp'; any text for scores of your own")
LAYER = column("layer", pa.int16(), "index of the layer, from 0")
NEURON = column("neuron", pa.int32(), "index of the neuron inside its site and layer, from 0")
HEAD = column(
    "head", pa.int16(), "attention head (neuron // head_dim); null at 'mlp'", nullable=True
)
RUN = column("run", pa.string(), "id of the run; null for scores of your own", nullable=True)
TASK = column("task", pa.string(), "name of the task")
METRIC = column(
    "metric", pa.string(), "abs, rms, std, sqrt, freq, mean or rand; 'given' for your own scores"
)
WITHIN = column(
    "within", pa.string(), "'model': the top fraction over all layers; 'layer': of each layer"
)
FRACTION = column("fraction", pa.float64(), "share of the neurons that is selected, in (0, 1]")

NEURON_OF_SHARD = (SHARD, SITE, LAYER, NEURON, HEAD)
"""Which neuron a row of one shard is of."""
