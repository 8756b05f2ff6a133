"""Shards and batches: the fixed units of work that a plan lays down."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from storage import FileRecord

__all__ = ["Batch", "CheckedShard", "PlannedShard", "SetAside", "batches_of"]


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
            "num_quarantined": 0,
        }

    def to_dict(self) -> dict[str, Any]:
        """The shard as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "PlannedShard":
        """The inverse of `to_dict`."""
        return cls(**(record | {"samples": FileRecord(**record["samples"])}))


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """A sample that always fails."""

    sample: int
    """Index inside the task."""
    source: str
    """File or dataset row that it comes from."""
    num_tokens: int
    """Number of tokens."""
    num_counted: int
    """Number of tokens that would count in statistics."""
    error: str
    """What was not finite, or what the model raised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedShard(PlannedShard):
    """A shard that is computed again because samples of it fail.

    Its batches are those of the plan without the samples that are known to fail, and each of the
    others is checked on its way through the model.
    """

    set_aside: tuple[SetAside, ...] = ()
    """The samples that are left out, in the order of their indices."""

    @classmethod
    def of(cls, shard: PlannedShard, found: tuple[SetAside, ...]) -> "CheckedShard":
        """A shard without the samples that were found to fail, nor those found before."""
        before = shard.set_aside if isinstance(shard, CheckedShard) else ()
        planned = {field.name: getattr(shard, field.name) for field in fields(PlannedShard)}
        ordered = sorted({*before, *found}, key=lambda aside: aside.sample)
        return cls(**planned, set_aside=tuple(ordered))

    @property
    def counts(self) -> dict[str, int]:
        """The counts of what is left, and of the samples that are not."""
        return {
            "num_samples": self.num_samples - len(self.set_aside),
            "num_tokens": self.num_tokens - sum(aside.num_tokens for aside in self.set_aside),
            "num_counted": self.num_counted - sum(aside.num_counted for aside in self.set_aside),
            "num_quarantined": len(self.set_aside),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples that go through the model together, padded on the right.

    Shapes: B samples, P positions of the longest one.
    """

    rows: pa.Table
    """The samples' rows of table ``samples``."""

    index: int
    """Index of the batch inside the shard."""
    samples: np.ndarray
    """(B,) int32: indices of the samples inside the task."""
    lengths: Tensor
    """(B,) int64: number of tokens of each sample."""
    attention_mask: Tensor | None
    """(B, P) int64: 1 for tokens, 0 for padding; None if there is no padding."""
    counted: Tensor | None
    """(C,) int64: rows of the flattened (B * P) positions that count; None if all do."""

    @property
    def shape(self) -> tuple[int, int]:
        """(B, P)."""
        return len(self.lengths), int(self.lengths.max())

    @property
    def valid(self) -> Tensor:
        """(B, P) bool: whether there is a token, and no padding."""
        return torch.arange(self.shape[1]) < self.lengths[:, None]

    @property
    def counted_places(self) -> tuple[np.ndarray, np.ndarray]:
        """(C,) int32 indices of the samples inside the task, and (C,) int32 positions inside them,
        of the rows that count, in order.
        """
        num_rows, longest = self.shape
        counted = torch.arange(num_rows * longest) if self.counted is None else self.counted
        rows = counted.numpy()
        return self.samples[rows // longest], (rows % longest).astype(np.int32)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())


def batches_of(samples: pa.Table) -> Iterator[Batch]:
    """The batches of one shard, in order; none for an index that has no samples.

    Args:
        samples: the shard's file of table ``samples``, or some of its rows.
    """
    for index in sorted(pc.unique(samples["batch"]).to_pylist()):
        yield _batch(index, samples.filter(pc.equal(samples["batch"], index)))


def _batch(index: int, rows: pa.Table) -> Batch:
    lengths = torch.from_numpy(rows["num_tokens"].to_numpy().astype(np.int64))
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    counted = torch.zeros(valid.shape, dtype=torch.bool)
    counted[valid] = torch.from_numpy(pc.list_flatten(rows["counted"]).to_numpy())
    return Batch(
        rows=rows,
        index=index,
        samples=rows["sample"].to_numpy(),
        lengths=lengths,
        attention_mask=None if valid.all() else valid.long(),
        counted=None if counted.all() else counted.flatten().nonzero().flatten(),
    )
