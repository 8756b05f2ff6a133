"""Shards and batches: the fixed units of work that a plan lays down."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from storage import FileRecord

__all__ = ["Batch", "PlannedShard", "batches_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """A fixed list of samples of one task: the unit of work, retry and commit."""

    task: str
    """Name of the task."""
    shard: int
    """Index inside the task."""
    num_samples: int
    """Number of samples."""
    num_tokens: int
    """Number of tokens."""
    num_counted: int
    """Number of tokens that count in statistics."""
    num_batches: int
    """Number of batches."""
    samples: FileRecord
    """The file that holds the samples, in the order of computation."""

    @property
    def key(self) -> tuple[str, int]:
        """(task, shard)."""
        return self.task, self.shard

    @property
    def counts(self) -> dict[str, int]:
        """The counts that its commit record carries."""
        return {
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "num_counted": self.num_counted,
        }

    def to_dict(self) -> dict[str, Any]:
        """The shard as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "PlannedShard":
        """The inverse of `to_dict`."""
        return cls(**(record | {"samples": FileRecord(**record["samples"])}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples that go through the model together, padded on the right.

    Shapes: B samples, P positions of the longest one.
    """

    samples: np.ndarray
    """(B,) int32: indices of the samples inside the task."""
    lengths: Tensor
    """(B,) int64: number of tokens of each sample."""
    token_ids: Tensor
    """(B, P) int64; padding is 0, which no result depends on."""
    attention_mask: Tensor | None
    """(B, P) int64: 1 for tokens, 0 for padding; None if there is no padding."""
    counted: Tensor | None
    """(C,) int64: rows of the flattened (B * P) positions that count; None if all do."""

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())


def batches_of(samples: pa.Table) -> Iterator[Batch]:
    """The batches of one shard, in order.

    Args:
        samples: the shard's file of table ``samples``.
    """
    for index in range(int(pc.max(samples["batch"]).as_py()) + 1):
        yield _batch(samples.filter(pc.equal(samples["batch"], index)))


def _batch(rows: pa.Table) -> Batch:
    lengths = torch.from_numpy(rows["num_tokens"].to_numpy().astype(np.int64))
    shape = len(lengths), int(lengths.max())
    valid = torch.arange(shape[1]) < lengths[:, None]
    token_ids = torch.zeros(shape, dtype=torch.int64)
    token_ids[valid] = torch.from_numpy(
        pc.list_flatten(rows["token_ids"]).to_numpy().astype(np.int64)
    )
    counted = torch.zeros(shape, dtype=torch.bool)
    counted[valid] = torch.from_numpy(pc.list_flatten(rows["counted"]).to_numpy())
    return Batch(
        samples=rows["sample"].to_numpy(),
        lengths=lengths,
        token_ids=token_ids,
        attention_mask=None if valid.all() else valid.long(),
        counted=None if counted.all() else counted.flatten().nonzero().flatten(),
    )
