"""The highest and lowest activations of every neuron, and where they were.

They are kept by a streaming merge. Each counted position of a shard has a place, its index among
all positions of the shard in the order of (sample, position), and of equal activations the one of
the smaller place is better: so no two are equal, and what is kept depends on nothing but the
activations. -0 is kept as 0.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_app.capture.moments import Reduction
from ray_app.capture.recorders import Part, SiteKey, neuron_columns
from ray_app.capture.shards import Batch, PlannedShard
from ray_app.models.sites import SiteLocation
from ray_app.native import load_library

__all__ = [
    "BLOCK_ROWS",
    "NativeTopAccumulator",
    "TopAccumulator",
    "TopRecorder",
    "make_top_accumulator",
]

_FIRST_ROWS = 16
"""Rows of the first block. Blocks grow as rows are seen, so that few of each column are better than
what is kept before it."""

BLOCK_ROWS = 256
"""Rows of the largest block, and those of another dtype that are held in float32 at once."""

_SOURCE = Path(__file__).with_name("top.c")

_LARGEST = torch.iinfo(torch.int32).max


class TopAccumulator:
    """The k highest and k lowest activations of the neurons of one site and layer.

    Value and place make one integer, its key, which is larger if they are better and which no
    other equals.
    """

    def __init__(self, width: int, k: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.k = k
        self._count = 0
        # Where fewer than k were seen, the last are worse than any.
        worst = torch.tensor([-torch.inf]), torch.tensor([_LARGEST], dtype=torch.int32)
        # Keys, best first, of the highest and then of the lowest, whose signs are turned.
        self._kept = _keys(*worst).to(device).repeat(2 * width, k)

    def add(self, z: Tensor, places: Tensor, counted: Tensor | None = None) -> None:
        """Add activations.

        Args:
            z: shape (positions, width), any floating dtype; not changed.
            places: (C,) int32 on the CPU, those of the positions that count.
            counted: (C,) int64 on the CPU, the positions that count; all if not given.
        """
        if counted is not None:
            z = z.index_select(0, counted.to(z.device))
        where, start = places.to(z.device), 0
        while start < len(z):
            stop = start + min(max(self._count, _FIRST_ROWS), BLOCK_ROWS)
            values = z[start:stop].float()
            self._merge(torch.cat([values, -values], dim=1), where[start:stop])
            self._count += len(values)
            start = stop

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The highest activations and then the lowest, best first, and their places.

        Returns:
            (2, width, min(k, positions)) float32 and int32.
        """
        kept = self._kept.view(2, self.width, self.k)[..., : min(self.k, self._count)]
        values, places = _of_keys(kept.cpu())
        return _with_signs(values.numpy()), places.numpy()

    def _merge(self, values: Tensor, places: Tensor) -> None:
        """Add (rows, 2 * width) values at (rows,) places."""
        worst, worst_place = _of_keys(self._kept[:, -1])
        # After some blocks there are few columns in which any is better, and few of each.
        touched = (values.amax(0) >= worst).nonzero().flatten()
        values, worst, before = values[:, touched], worst[touched], self._kept[touched]
        ties = (values == worst) & (places[:, None] < worst_place[touched])
        is_better = ((values > worst) | ties).T
        counts = is_better.sum(1)
        columns, rows = is_better.nonzero(as_tuple=True)
        # They are packed to the left, behind what is kept.
        slots = torch.arange(len(columns), device=values.device)
        slots = slots - (counts.cumsum(0) - counts)[columns] + self.k
        most = int(counts.max()) if len(columns) else 0
        both = torch.cat([before, before[:, -1:].expand(-1, most)], dim=1)
        both[columns, slots] = _keys(values[rows, columns], places[rows])
        self._kept[touched] = both.topk(self.k, dim=1).values


class NativeTopAccumulator(TopAccumulator):
    """The same by top.c, which reads each activation once; on the CPU."""

    def __init__(self, width: int, k: int) -> None:
        self.width = width
        self.k = k
        self._count = 0
        self._values = torch.full((2, width, k), -torch.inf, dtype=torch.float32)
        self._places = torch.full((2, width, k), _LARGEST, dtype=torch.int32)

    def add(self, z: Tensor, places: Tensor, counted: Tensor | None = None) -> None:
        """Add activations; as `TopAccumulator.add`.

        Raises:
            ValueError: if z has not one column for each neuron.
        """
        if z.dim() != 2 or z.shape[1] != self.width:
            raise ValueError(f"z must be (positions, {self.width}), found {tuple(z.shape)}")
        if z.dtype == torch.float32:
            self._add_float(z, places, counted)
            return
        chosen = z if counted is None else z.index_select(0, counted)
        for rows, of_rows in zip(chosen.split(BLOCK_ROWS), places.split(BLOCK_ROWS), strict=True):
            self._add_float(rows.float(), of_rows, None)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """See `TopAccumulator.best`."""
        kept = min(self.k, self._count)
        return _with_signs(self._values[..., :kept].numpy()), self._places[..., :kept].numpy()

    def _add_float(self, z: Tensor, places: Tensor, counted: Tensor | None) -> None:
        if len(places) == 0 or self.width == 0:
            return
        values = z if z.stride(1) == 1 else z.contiguous()
        chosen = None if counted is None else counted.contiguous()
        of_rows = places.contiguous()
        _add_top()(
            values.data_ptr(),
            values.stride(0),
            None if chosen is None else chosen.data_ptr(),
            of_rows.data_ptr(),
            len(of_rows),
            self.width,
            self.k,
            self._values.data_ptr(),
            self._places.data_ptr(),
            torch.get_num_threads(),
        )
        self._count += len(of_rows)


def make_top_accumulator(
    width: int, k: int, device: torch.device | str = "cpu", *, reduction: Reduction = "eager"
) -> TopAccumulator:
    """What keeps the k highest and lowest of `width` neurons; the same whatever the reduction.

    Raises:
        NativeError: if reductions are compiled and there is no compiler here that works.
    """
    if reduction == "eager" or torch.device(device).type != "cpu":
        return TopAccumulator(width, k, device)
    _add_top()
    return NativeTopAccumulator(width, k)


class TopRecorder:
    """Table ``top``."""

    def __init__(
        self,
        shard: PlannedShard,
        sites: Sequence[SiteLocation],
        samples: pa.Table,
        k: int,
        device: torch.device,
        reduction: Reduction,
    ) -> None:
        """Begin a shard.

        Args:
            shard: the shard.
            sites: those of the stage, ordered by site, then layer.
            samples: its rows of table ``samples``.
            k: how many of each kind are kept of a neuron.
            device: where activations lie.
            reduction: how they are reduced.

        Raises:
            NativeError: if reductions are compiled and cannot be built here.
        """
        self._shard = shard.shard
        self._sites = sites
        self._k = k
        self._places = _Places(samples)
        self._of_batch: tuple[Batch, Tensor] | None = None
        self._top: dict[SiteKey, TopAccumulator] = {
            (site.site, site.layer): make_top_accumulator(
                site.width, k, device, reduction=reduction
            )
            for site in sites
        }

    def add(self, batch: Batch, site: SiteLocation, z: Tensor) -> None:
        """See `Recorder.add`."""
        if self._of_batch is None or self._of_batch[0] is not batch:
            self._of_batch = batch, torch.from_numpy(self._places.of(*batch.counted_places))
        self._top[site.site, site.layer].add(z, self._of_batch[1], batch.counted)

    def parts(self) -> Iterator[Part]:
        """One table, ordered by site, layer, neuron."""
        if self._sites:
            rows = pa.concat_tables([self._site_table(site) for site in self._sites])
            yield Part(table="top", rows=rows)

    def _site_table(self, site: SiteLocation) -> pa.Table:
        values, places = self._top[site.site, site.layer].best()
        _, width, kept = values.shape
        offsets = pa.array(np.arange(width + 1, dtype=np.int32) * kept)
        columns = {"k": pa.array(np.full(width, self._k, dtype=np.int32))}
        for kind, name in enumerate(("highest", "lowest")):
            samples, positions = self._places.back(places[kind].reshape(-1))
            lists = {"": values[kind].reshape(-1), "_sample": samples, "_position": positions}
            for suffix, flat in lists.items():
                columns[name + suffix] = pa.ListArray.from_arrays(offsets, pa.array(flat))
        return pa.table(neuron_columns(self._shard, site) | columns)


class _Places:
    """Numbers the positions of a shard in the order of (sample, position)."""

    def __init__(self, samples: pa.Table) -> None:
        indices = samples["sample"].to_numpy()
        order = np.argsort(indices)
        lengths = samples["num_tokens"].to_numpy()[order]
        self._samples = indices[order]
        self._starts = (np.cumsum(lengths) - lengths).astype(np.int32)

    def of(self, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(C,) int32 places of (C,) samples and positions."""
        found: np.ndarray = self._starts[np.searchsorted(self._samples, samples)] + positions
        return found

    def back(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C,) int32 samples and positions of (C,) places."""
        index = np.searchsorted(self._starts, places, side="right") - 1
        return self._samples[index], places - self._starts[index]


def _keys(values: Tensor, places: Tensor) -> Tensor:
    """Integers in the order of float32 values, then of places from the last to the first."""
    bits = (values + 0.0).view(torch.int32)
    return (_turned(bits).long() << 32) + (_LARGEST - places).long()


def _of_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Values and places of keys."""
    values = _turned((keys >> 32).int()).view(torch.float32)
    return values, _LARGEST - (keys & _LARGEST).int()


def _turned(bits: Tensor) -> Tensor:
    """The bits of floats as integers of the same order, and such integers as bits."""
    return torch.where(bits < 0, bits ^ _LARGEST, bits)


def _with_signs(values: np.ndarray) -> np.ndarray:
    """What is kept in the order of being best, the lowest with their signs turned, as it was."""
    highest, lowest = values
    return np.stack([highest, -lowest]) + np.float32(0)


@cache
def _add_top() -> Any:
    function = load_library(_SOURCE).add_top
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        pointer, number, pointer, pointer, number, number, number, pointer, pointer, ctypes.c_int
    ]  # fmt: skip
    function.restype = None
    return function
