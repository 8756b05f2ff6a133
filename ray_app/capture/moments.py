"""Streaming sufficient statistics of neurons, exact over any number of batches.

A batch is reduced in blocks of rows small enough to stay in cache, in float32, and blocks are added
up in float64; what was added before is merged by the parallel-variance formula of Chan, Golub and
LeVeque (1979), so neither the number of positions nor a mean far from zero costs accuracy.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_app.native import can_build, load_library

__all__ = [
    "CompiledMomentAccumulator",
    "MomentAccumulator",
    "NativeMomentAccumulator",
    "Reduction",
    "can_compile",
    "make_accumulator",
]

_BLOCK_ROWS = 128
"""128 rows x 1536 neurons of float32 fill 0.8 MB; larger blocks fall out of a core's cache."""


_SOURCE = Path(__file__).with_name("moments.c")

_CAST_ROWS = 8 * _BLOCK_ROWS
"""Rows of another dtype that are held in float32 at once."""

Reduction = Literal["eager", "compiled"]
"""How a block is reduced: by torch's operators one after the other, or by one compiled kernel. Both
are as exact, and differ in the last bits."""


class MomentAccumulator:
    """Statistics of the neurons of one site and layer.

    Counts and extrema are exact. Means are accumulated in float64, other sums to about 1e-6
    relative. Squares are taken in float32: deviations from the mean below 1e-19 count as none, and
    `first_non_finite` names a neuron that deviates so far that its squares or sums are infinite.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self._count = 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._m2 = torch.zeros(width, dtype=torch.float64, device=device)
        # Rows: sqrt|z|, max(z, 0), min(z, 0), sign(z), |sign(z)|.
        self._sums = torch.zeros(5, width, dtype=torch.float64, device=device)
        self._min = torch.full((width,), torch.inf, dtype=torch.float32, device=device)
        self._max = torch.full((width,), -torch.inf, dtype=torch.float32, device=device)
        self._scratch = torch.empty(_BLOCK_ROWS, width, dtype=torch.float32, device=device)
        self._block_sums = torch.empty(5, width, dtype=torch.float32, device=device)

    def add(self, z: Tensor, counted: Tensor | None = None) -> None:
        """Add activations.

        Args:
            z: shape (positions, width), any floating dtype; not changed.
            counted: (C,) int64 on the CPU, the positions that count; all if not given.
        """
        if counted is not None:
            z = z.index_select(0, counted.to(z.device))
        if len(z) == 0:
            return
        for block in z.split(_BLOCK_ROWS):
            self._add_block(block.float())

    def _add_block(self, z: Tensor) -> None:
        rows = z.shape[0]
        mean, m2, sums = self._reduce(z)
        total = self._count + rows
        delta = mean - self._mean
        self._mean += delta * (rows / total)
        self._m2 += m2.addcmul_(delta, delta, value=self._count * rows / total)
        self._sums += sums
        torch.minimum(self._min, z.amin(0), out=self._min)
        torch.maximum(self._max, z.amax(0), out=self._max)
        self._count = total

    def _reduce(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, sum of squares about it, sums) of one block."""
        rows = z.shape[0]
        scratch, sums = self._scratch[:rows], self._block_sums
        mean = z.sum(0, dtype=torch.float64) / rows
        torch.sub(z, mean.float(), out=scratch)
        m2 = scratch.square_().sum(0).double()
        torch.sum(torch.abs(z, out=scratch).sqrt_(), 0, out=sums[0])
        torch.sum(torch.clamp(z, min=0, out=scratch), 0, out=sums[1])
        torch.sum(torch.clamp(z, max=0, out=scratch), 0, out=sums[2])
        torch.sum(torch.sign(z, out=scratch), 0, out=sums[3])
        torch.sum(scratch.abs_(), 0, out=sums[4])
        return mean, m2, sums

    def first_non_finite(self) -> int | None:
        """Index of the first neuron with a NaN, an infinity or an infinite sum, if there is one."""
        # A NaN or an infinity among the activations makes the squared deviations not finite.
        bad = ~(torch.isfinite(self._m2) & torch.isfinite(self._sums).all(0))
        return int(bad.nonzero()[0]) if bad.any() else None

    def columns(self) -> dict[str, pa.Array]:
        """The columns of table ``stats`` from ``n`` to ``max``, one row per neuron."""
        sqrt, pos, neg, sign, nonzero = self._sums.cpu().numpy()
        return {
            "n": pa.array(np.full(self.width, self._count)),
            "mean": pa.array(self._mean.cpu().numpy()),
            "m2": pa.array(self._m2.cpu().numpy()),
            "abs_sum": pa.array(pos - neg),
            "sqrt_sum": pa.array(sqrt),
            "pos_sum": pa.array(pos),
            "neg_sum": pa.array(neg),
            "pos_count": pa.array(((nonzero + sign) / 2).astype(np.int64)),
            "nonzero_count": pa.array(nonzero.astype(np.int64)),
            "min": pa.array(self._min.cpu().numpy()),
            "max": pa.array(self._max.cpu().numpy()),
        }


class NativeMomentAccumulator(MomentAccumulator):
    """The same statistics by moments.c, which reads each activation once; on the CPU.

    Its bits depend neither on the machine nor on the number of threads.
    """

    def add(self, z: Tensor, counted: Tensor | None = None) -> None:
        """Add activations; as `MomentAccumulator.add`.

        Raises:
            ValueError: if z has not one column for each neuron.
        """
        if z.dim() != 2 or z.shape[1] != self.width:
            raise ValueError(f"z must be (positions, {self.width}), found {tuple(z.shape)}")
        if z.dtype == torch.float32:
            self._add_float(z, counted)
            return
        chosen = z if counted is None else z.index_select(0, counted)
        for rows in chosen.split(_CAST_ROWS):
            self._add_float(rows.float(), None)

    def _add_float(self, z: Tensor, counted: Tensor | None) -> None:
        rows = len(z) if counted is None else len(counted)
        if rows == 0 or self.width == 0:
            return
        values = z if z.stride(1) == 1 else z.contiguous()
        chosen = None if counted is None else counted.contiguous()
        _add_moments()(
            values.data_ptr(),
            values.stride(0),
            None if chosen is None else chosen.data_ptr(),
            rows,
            self.width,
            self._count,
            self._mean.data_ptr(),
            self._m2.data_ptr(),
            self._sums.data_ptr(),
            self._min.data_ptr(),
            self._max.data_ptr(),
            torch.get_num_threads(),
        )
        self._count += rows


class CompiledMomentAccumulator(MomentAccumulator):
    """The same statistics by a kernel of torch.compile, which reads a block twice; on GPUs.

    The kernel is built on first use, which takes some seconds, and kept for later processes.
    """

    def _add_block(self, z: Tensor) -> None:
        rows = z.shape[0]
        state = self._mean, self._m2, self._sums, self._min, self._max
        before = torch.full((), self._count, dtype=torch.float64, device=z.device)
        _compiled_add()(z, before, *state)
        self._count += rows


def can_compile() -> bool:
    """Whether compiled reductions can be built on this machine."""
    return can_build(_SOURCE)


def make_accumulator(
    width: int, device: torch.device | str = "cpu", *, reduction: Reduction = "eager"
) -> MomentAccumulator:
    """Statistics of `width` neurons, reduced as the run began to reduce them.

    Raises:
        NativeError: if reductions are to be compiled and there is no compiler here that works.
    """
    if reduction == "eager":
        return MomentAccumulator(width, device)
    # torch.compile needs a C compiler too, and would say so only at the first batch.
    _add_moments()
    if torch.device(device).type != "cpu":
        return CompiledMomentAccumulator(width, device)
    return NativeMomentAccumulator(width)


@cache
def _add_moments() -> Any:
    function = load_library(_SOURCE).add_moments
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        pointer, number, pointer, number, number, number, *[pointer] * 5, ctypes.c_int
    ]  # fmt: skip
    function.restype = None
    return function


@cache
def _compiled_add() -> Callable[..., None]:
    return torch.compile(_add, dynamic=True)


def _add(
    z: Tensor, before: Tensor, mean: Tensor, m2: Tensor, sums: Tensor, low: Tensor, high: Tensor
) -> None:
    """Merge one block (rows, width) into the statistics of `before` rows, in place."""
    rows = z.shape[0]
    # Sums of 128 float32 are off by some 1e-6 of the mean; what the values about that rough mean
    # sum to is known much better, and corrects it.
    rough = z.sum(0) / rows
    about = z - rough
    rest = about.sum(0).double()
    block_mean = rough.double() + rest / rows
    block_m2 = about.square().sum(0).double() - rest * rest / rows
    size = z.abs()
    block_sums = torch.stack(
        [
            size.sqrt().sum(0),
            z.clamp(min=0).sum(0),
            z.clamp(max=0).sum(0),
            z.sign().sum(0),
            z.sign().abs().sum(0),
        ]
    )
    share = rows / (before + rows)
    delta = block_mean - mean
    mean.add_(delta * share)
    m2.add_(block_m2 + delta * delta * (before * share))
    sums.add_(block_sums)
    low.copy_(torch.minimum(low, z.amin(0)))
    high.copy_(torch.maximum(high, z.amax(0)))
