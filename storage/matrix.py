"""Raw values as matrices of positions by neurons: what probes, autoencoders and clustering take."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage import layout
from storage.errors import DamagedFileError, StoreError
from storage.sqlfiles import load_query

if TYPE_CHECKING:
    from storage.store import Store

__all__ = [
    "MatrixBlock",
    "ValuesSelection",
    "export_matrix",
    "read_blocks",
    "read_matrix",
    "select_values",
]

Result = TypeVar("Result")

_SLICE_BYTES = 64 << 20
"""Of what is decoded beside a whole matrix."""
_PLACE = re.compile(r"/task=([^/]+)/site=([^/]+)/layer=(\d+)/")
_FIRST_BLOCK = re.compile(r"/shards?-(\d+)[^/]*$")
_COLUMNS = ["block", "neuron", "value", "code", "scale"]
_PLACES = ["block", "neuron", "sample", "position"]
_TILE = 64
"""Positions that are turned at once: what is read along neurons stays in cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixBlock:
    """Some positions of a matrix."""

    sample: np.ndarray
    """(positions,) int32: index of each position's sample inside the task."""
    position: np.ndarray
    """(positions,) int32: index of the position inside its sample."""
    values: np.ndarray
    """(positions, neurons): activations, as decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValuesSelection:
    """Raw values that a run has."""

    run: str
    """Id of the run."""
    task: str
    """Name of the task."""
    files: tuple[str, ...]
    """Paths inside the store, in the order of their blocks."""
    neurons: np.ndarray
    """(neurons,) int64: those that are asked for, in the order in which they are."""


def select_values(
    store: "Store",
    site: str,
    layer: int,
    task: str,
    *,
    run: str | None,
    neurons: Sequence[int] | np.ndarray | None,
) -> ValuesSelection:
    """Find the committed values of one site and layer over one task; arguments as `Store.matrix`.

    Raises:
        StoreError: if the run has no such neurons or task, or kept no values of them.
    """
    run = store.resolve_run(run)
    record = store.run_record(run)
    place = f"site {site!r}, layer {layer}, of run {run}"
    widths = {(found["site"], found["layer"]): found["width"] for found in record["sites"]}
    if (site, layer) not in widths:
        raise StoreError(f"there is no {place}: it captured {_sites(list(widths))}.")
    tasks = [found["task"] for found in record["tasks"]]
    if task not in tasks:
        raise StoreError(f"run {run} has no task {task!r}: its tasks are {', '.join(tasks)}.")
    width = widths[site, layer]
    chosen = np.arange(width) if neurons is None else np.asarray(neurons)
    if chosen.size and chosen.dtype.kind not in "iu":
        raise StoreError(
            f"neurons must be given by their indices, found values of type {chosen.dtype}: of a "
            "mask, give numpy.flatnonzero(mask)."
        )
    chosen = chosen.astype(np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= width)]
    if len(wrong):
        raise StoreError(f"neurons of {place}, lie in 0..{width - 1}, found {wrong[0]}.")
    kept = _kept_files(store, run)
    files = kept.get((task, site, layer))
    if files is None:
        raise StoreError(
            f"no values of {place}, over task {task!r} were kept: {_kept(list(kept))}. Capture "
            f"them with capture.values: {{sites: [{site}], layers: [{layer}], tasks: [{task}]}} "
            "and --new-run."
        )
    return ValuesSelection(run=run, task=task, files=tuple(files), neurons=chosen)


def _kept_files(store: "Store", run: str) -> dict[tuple[str, str, int], list[str]]:
    """Paths of all committed files of values by task, site and layer."""
    folder = f"{store.files.root}/{layout.run_folder(run)}/"
    query = load_query("storage", "value_files").text
    found: dict[tuple[str, str, int], list[str]] = {}
    for filename in store.table(query, {"folder": folder})["filename"].to_pylist():
        path = filename.removeprefix(f"{store.files.root}/")
        if match := _PLACE.search(path):
            found.setdefault((match[1], match[2], int(match[3])), []).append(path)
    for paths in found.values():
        paths.sort(key=_first_block)
    return found


def _first_block(path: str) -> int:
    """The block that a file begins with; compacted ones hold neighbours."""
    match = _FIRST_BLOCK.search(path)
    if match is None:
        raise DamagedFileError(f"{path} has no name that table values gives its files.")
    return int(match[1])


def _sites(keys: list[tuple[str, int]]) -> str:
    """Sites with their layers, for people."""
    return "; ".join(
        f"{site} in layers {_ranges(sorted(layer for other, layer in keys if other == site))}"
        for site in sorted({site for site, _ in keys})
    )


def _ranges(numbers: list[int]) -> str:
    """Numbers in order, runs of them as first-last: 0-2, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    )


def _kept(keys: list[tuple[str, str, int]]) -> str:
    if not keys:
        return "the run kept none so far"
    sites = _sites(sorted({(site, layer) for _, site, layer in keys}))
    return f"it kept {sites}, of tasks {', '.join(sorted({task for task, _, _ in keys}))}"


def read_blocks(
    store: "Store", selection: ValuesSelection, *, dtype: Any, max_bytes: int
) -> Iterator[MatrixBlock]:
    """The matrix of a selection in blocks of at most `max_bytes`; see `Store.matrix_blocks`.

    Raises:
        DamagedFileError: if a file cannot be read.
    """
    neurons, columns = np.unique(selection.neurons, return_inverse=True)
    in_order = np.array_equal(neurons, selection.neurons)
    step = max(1, max_bytes // max(1, len(selection.neurons) * np.dtype(dtype).itemsize))
    for path in selection.files:
        places = _read(store, path, _places_of)
        sample, position = places["sample"].to_numpy(), places["position"].to_numpy()
        with _room((len(neurons), len(sample)), max_bytes) as by_neuron:
            starts = _starts(places["block"].to_numpy())
            _read(store, path, lambda file: _decode(file, neurons, starts, by_neuron))  # noqa: B023
            for start in range(0, len(sample), step):
                values = _turned(by_neuron[:, start : start + step], dtype)
                yield MatrixBlock(
                    sample=sample[start : start + step],
                    position=position[start : start + step],
                    values=values if in_order else values[:, columns],
                )


def read_matrix(store: "Store", selection: ValuesSelection, *, dtype: Any) -> np.ndarray:
    """The whole matrix of a selection; see `Store.matrix`.

    Raises:
        DamagedFileError: if a file cannot be read.
    """
    rows = sum(_read(store, path, _places_of).num_rows for path in selection.files)
    matrix = np.empty((rows, len(selection.neurons)), dtype)
    start = 0
    for block in read_blocks(store, selection, dtype=dtype, max_bytes=_SLICE_BYTES):
        matrix[start : start + len(block.values)] = block.values
        start += len(block.values)
    return matrix


def export_matrix(store: "Store", selection: ValuesSelection, path: Path) -> int:
    """Write the matrix of a selection as one Parquet file, a row for each position.

    Its columns are sample, position and activations, a list of fixed size: what datasets and Arrow
    take for a vector.

    Returns:
        The number of rows.

    Raises:
        DamagedFileError: if a file cannot be read.
        StoreError: if the file cannot be written.
    """
    schema = pa.schema(
        {
            "sample": pa.int32(),
            "position": pa.int32(),
            "activations": pa.list_(pa.float32(), len(selection.neurons)),
        }
    )
    # The temporary name keeps a failure from leaving half a file behind.
    temporary = path.with_name(f".{path.name}.tmp")
    rows = 0
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for block in read_blocks(store, selection, dtype=np.float32, max_bytes=_SLICE_BYTES):
                flat = pa.array(block.values.reshape(-1))
                vectors = pa.FixedSizeListArray.from_arrays(flat, type=schema.types[2])
                columns = [pa.array(block.sample), pa.array(block.position), vectors]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                rows += len(block.values)
        temporary.replace(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise StoreError(
            f"cannot write {path}: {reason}. Give the name of a file in a folder that is "
            "there and can be written."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def _read(store: "Store", path: str, use: Callable[[pq.ParquetFile], Result]) -> Result:
    try:
        return store.files.parquet(path, use)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error} `actlake verify` names all that is damaged.") from error


def _places_of(file: pq.ParquetFile) -> pa.Table:
    """block, sample and position of all values of each neuron: those of the first."""
    found: list[pa.Table] = []
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=_PLACES)
        first = (found[0] if found else rows)["neuron"][0]
        found.append(rows.filter(pc.equal(rows["neuron"], first)))
        if found[-1].num_rows < rows.num_rows:
            break
    return pa.concat_tables(found or [file.schema_arrow.empty_table().select(_PLACES)])


def _starts(blocks: np.ndarray) -> dict[int, int]:
    """Where each block begins among values that lie together by block."""
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    return dict(zip(blocks[starts].tolist(), starts.tolist(), strict=True))


@contextmanager
def _room(shape: tuple[int, int], max_bytes: int) -> Iterator[np.ndarray]:
    """An array of float32, in a temporary file if it is too large for memory."""
    if 4 * shape[0] * shape[1] <= max_bytes:
        yield np.empty(shape, np.float32)
        return
    with tempfile.TemporaryFile() as file:
        yield np.memmap(file, np.float32, shape=shape)


def _decode(
    file: pq.ParquetFile, neurons: np.ndarray, starts: Mapping[int, int], out: np.ndarray
) -> None:
    """Read neurons into the rows of `out`, (neurons, positions), block after block.

    Args:
        file: a file of table ``values``.
        neurons: sorted.
        starts: where the positions of each block begin.
        out: where to.
    """
    column = file.schema_arrow.get_field_index("neuron")
    for group in range(file.num_row_groups):
        bounds = file.metadata.row_group(group).column(column).statistics
        low, high = np.searchsorted(neurons, (bounds.min, bounds.max + 1))
        if low == high:
            continue
        rows = file.read_row_group(group, columns=_COLUMNS)
        neuron, block = rows["neuron"].to_numpy(), rows["block"].to_numpy()
        values = _values(rows)
        changed = (np.diff(neuron, prepend=-1) != 0) | (np.diff(block, prepend=-1) != 0)
        edges = np.append(np.flatnonzero(changed), len(neuron))
        for first, stop in pairwise(edges.tolist()):
            place = np.searchsorted(neurons, neuron[first])
            if place < len(neurons) and neurons[place] == neuron[first]:
                start = starts[int(block[first])]
                out[place, start : start + stop - first] = values[first:stop]


def _values(rows: pa.Table) -> np.ndarray:
    """The activations of rows, decoded."""
    if rows["value"].null_count == 0:
        values: np.ndarray = rows["value"].to_numpy()
        return values
    decoded: np.ndarray = rows["code"].to_numpy() * rows["scale"].to_numpy()
    return decoded


def _turned(by_neuron: np.ndarray, dtype: Any) -> np.ndarray:
    """(neurons, positions) to (positions, neurons)."""
    turned = np.empty(by_neuron.shape[::-1], dtype)
    for start in range(0, len(turned), _TILE):
        turned[start : start + _TILE] = by_neuron[:, start : start + _TILE].T
    return turned
