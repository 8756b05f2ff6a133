"""Raw activations, turned from positions by neurons to neurons by positions as batches arrive."""

import contextlib
import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_app.capture.errors import CaptureError
from ray_app.capture.moments import Reduction
from ray_app.capture.recorders import Part, SiteKey, neuron_columns
from ray_app.capture.shards import Batch, PlannedShard
from ray_app.models.sites import SiteLocation
from ray_app.native import load_library
from storage.pages import EncodedColumns
from storage.values import Encoding, HalfOverflowError, encode_rows, neurons_in_group, place_lists

__all__ = ["ChosenPositions", "ValuesMemory", "ValuesRecorder", "draw_positions"]

_SOURCE = Path(__file__).with_name("values.c")


def draw_positions(
    samples: np.ndarray, positions: np.ndarray, *, seed: int, task: str, share: float
) -> np.ndarray:
    """Which positions are kept: each is drawn by a hash of its own name, whatever else there is.

    Args:
        samples: (C,) indices of samples inside the task.
        positions: (C,) indices of positions inside them.
        seed: seed of the study.
        task: name of the task.
        share: probability of each.

    Returns:
        (C,) bool.
    """
    if share == 1:
        return np.ones(len(samples), dtype=bool)
    digest = blake2b(f"{seed}/{task}".encode(), digest_size=8).digest()
    key = np.uint64(int.from_bytes(digest, "little"))
    drawn = _mix(_mix(samples.astype(np.uint64) ^ key) ^ positions.astype(np.uint64))
    # 53 bits are a float64 in [0, 1) without rounding.
    return (drawn >> np.uint64(11)) * 2.0**-53 < share


def _mix(x: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 (Steele, Lea and Flood, 2014), which makes neighbours unlike."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class ChosenPositions:
    """The positions of a shard whose values are kept, in the order of computation."""

    def __init__(
        self, shard: PlannedShard, batches: Iterable[Batch], *, seed: int, share: float
    ) -> None:
        """Draw them.

        Args:
            shard: the shard.
            batches: its batches, in order.
            seed: seed of the study.
            share: of the counted positions.
        """
        self._shard = shard.shard
        self._places: list[tuple[np.ndarray, np.ndarray]] = []
        self._rows: dict[int, tuple[int, Tensor | None]] = {}
        self.count = 0
        for batch in batches:
            samples, positions = batch.counted_places
            chosen = draw_positions(samples, positions, seed=seed, task=shard.task, share=share)
            rows = batch.counted
            if not chosen.all():
                counted = torch.arange(len(chosen)) if rows is None else rows
                rows = counted[torch.from_numpy(chosen)]
            self._rows[batch.index] = self.count, rows
            self._places.append((samples[chosen], positions[chosen]))
            self.count += int(chosen.sum())

    def of(self, batch: Batch) -> tuple[int, Tensor | None]:
        """How many come before a batch, and its rows of flattened positions; None for all."""
        return self._rows[batch.index]

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(count,) int32 each: their samples inside the task, and positions inside those."""
        none = np.empty(0, dtype=np.int32)
        samples, positions = map(np.concatenate, zip((none, none), *self._places, strict=True))
        return samples, positions


class ValuesRecorder:
    """Table ``values``."""

    def __init__(
        self,
        shard: PlannedShard,
        sites: Sequence[SiteLocation],
        chosen: ChosenPositions,
        encoding: Encoding,
        reduction: Reduction,
        memory: "ValuesMemory",
    ) -> None:
        """Begin a shard.

        Args:
            shard: the shard.
            sites: those of the stage whose values are kept, ordered by site, then layer.
            chosen: the positions whose values are kept.
            encoding: how values are kept.
            reduction: whether they are turned by a compiled kernel; changes no bit.
            memory: that of shards before.
        """
        self._shard = shard
        self._sites = sites
        self._chosen = chosen
        self._encoding = encoding
        self._compiled = reduction == "compiled"
        # A scale of int8 is known only when all values are.
        dtype = torch.float16 if encoding == "float16" else torch.float32
        self._memory = memory
        self._values: dict[SiteKey, Tensor] = {
            (site.site, site.layer): self._memory.take(site.width, chosen.count, dtype)
            for site in sites
        }

    def add(self, batch: Batch, site: SiteLocation, z: Tensor) -> None:
        """See `Recorder.add`."""
        values = self._values.get((site.site, site.layer))
        if values is None:
            return
        start, rows = self._chosen.of(batch)
        if self._compiled and z.device.type == "cpu":
            _transpose(z, rows, values, start)
            return
        kept = z if rows is None else z.index_select(0, rows.to(z.device))
        values[:, start : start + len(kept)] = kept.to(values.dtype).T.contiguous()

    def parts(self) -> Iterator[Part]:
        """One file for each site and layer, ordered by neuron; what is given is forgotten."""
        encoded = EncodedColumns()
        # The same arrays for every file of such neurons: they are encoded once.
        known: dict[tuple[int, int | None], list[dict[str, pa.Array]]] = {}
        for site in self._sites:
            kind = site.width, site.head_dim
            if kind not in known:
                known[kind] = self._places(site)
            key = site.site, site.layer
            rows = self._row_groups(site, self._values.pop(key), known[kind])
            yield Part(table="values", rows=rows, site=key, encoded=encoded)

    def _places(self, site: SiteLocation) -> list[dict[str, pa.Array]]:
        """Columns that say where values are of, for each row group of a site and layer."""
        step = min(neurons_in_group(self._chosen.count), site.width)
        lists = place_lists(*self._chosen.places(), step)
        columns = neuron_columns(self._shard.shard, site)
        neurons = {"block": columns["shard"], "neuron": columns["neuron"], "head": columns["head"]}
        return [
            {name: column.slice(start, step) for name, column in neurons.items()}
            | {name: column.slice(0, site.width - start) for name, column in lists.items()}
            for start in range(0, site.width, step)
        ]

    def _row_groups(
        self, site: SiteLocation, values: Tensor, places: Sequence[dict[str, pa.Array]]
    ) -> Iterator[pa.RecordBatch]:
        start = 0
        for group in places:
            stop = start + len(group["neuron"])
            z = values[start:stop].numpy()
            try:
                encoded = encode_rows(z, self._encoding)
            except HalfOverflowError as error:
                raise CaptureError(
                    f"neuron {start + error.args[0]} of site {site.site!r}, layer {site.layer}, "
                    f"in shard {self._shard.shard} of task {self._shard.task!r} is larger than "
                    "65,504, the largest number of capture.values.encoding: float16; set it to "
                    "float32 or int8, and pass --new-run."
                ) from error
            yield pa.record_batch(group | encoded)
            start = stop
        # Who asks for what follows the last group has written it.
        self._memory.give(values)


class ValuesMemory:
    """Memory of the raw values of one shard, to be used again for those of another.

    Memory that is new is cleared first, which takes as long as filling it with values. Every neuron
    is written piece by piece, far from the others: in pages of the usual size, each piece would be
    a page fault, then a miss in the processor's table of pages. Threads may share it.
    """

    def __init__(self) -> None:
        """Nothing is held yet."""
        self._free: dict[int, list[torch.UntypedStorage]] = {}
        self._lock = threading.Lock()

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(rows, columns) on the CPU, of any values."""
        size = rows * columns * dtype.itemsize
        with self._lock:
            # Apart by rows: sites that are narrow do not take what wider ones will need.
            free = self._free.setdefault(rows, [])
            free.sort(key=len)
            fitting = [index for index, storage in enumerate(free) if len(storage) >= size]
            if fitting:
                storage = free.pop(fitting[0])
            else:
                # The smallest shall not be held beside the larger one that takes its place.
                del free[:1]
                storage = _new_memory(size)
        return torch.empty(0, dtype=dtype).set_(storage, 0, (rows, columns), (columns, 1))

    def give(self, values: Tensor) -> None:
        """Let what was taken be used again; nobody else may read it after that."""
        with self._lock:
            self._free[len(values)].append(values.untyped_storage())


def _new_memory(size: int) -> torch.UntypedStorage:
    # Shards differ a little in length; room that no shard needed so far is not backed by memory.
    size += size >> 3
    if sys.platform != "linux" or size == 0:
        return torch.UntypedStorage(size)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for {size:,} bytes of raw values") from error
    with contextlib.suppress(OSError):  # A kernel may have no huge pages.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _transpose(z: Tensor, rows: Tensor | None, values: Tensor, start: int) -> None:
    """Columns of z, (positions, width), to rows of values from `start` on, in their precision."""
    kernels = _kernels()
    if (z.dtype, values.dtype) not in kernels:
        z = z.to(values.dtype)
    z = z if z.stride(1) == 1 else z.contiguous()
    chosen = None if rows is None else rows.contiguous()
    kernels[z.dtype, values.dtype](
        z.data_ptr(),
        z.stride(0),
        None if chosen is None else chosen.data_ptr(),
        len(z) if chosen is None else len(chosen),
        z.shape[1],
        values.data_ptr() + start * values.element_size(),
        values.stride(0),
        torch.get_num_threads(),
    )


@cache
def _kernels() -> dict[tuple[torch.dtype, torch.dtype], Any]:
    """values.c by the types of what is read and of what is written."""
    library = load_library(_SOURCE)
    half, single = torch.float16, torch.float32
    kernels = {(half, half): library.transpose_2, (single, single): library.transpose_4}
    if hasattr(library, "transpose_4_to_2"):  # Not every processor rounds to half precision.
        kernels[single, half] = library.transpose_4_to_2
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    rows, columns = (pointer, number, pointer, number), (number, pointer, number, ctypes.c_int)
    for function in kernels.values():
        function.argtypes = [*rows, *columns]
        function.restype = None
    return kernels
