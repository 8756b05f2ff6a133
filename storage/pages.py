"""Parquet files of raw values, written page by page.

What arrives are lists: the values of one neuron in one block, with their samples and positions.
What is written are flat rows, one for each value: DuckDB takes a third less time for them than for
lists. A general writer would look at every value of every column. Here a column that is the same
for a whole list is a run of a few bytes, samples and positions are encoded once for all neurons
that share them, and values go into the file as they lie in memory. Only what table ``values`` needs
is here. The format is that of https://parquet.apache.org/docs/file-format/ and of parquet.thrift,
which names the numbers below.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from isal import isal_zlib

__all__ = ["EncodedColumns", "UnnestingWriter"]

_MAGIC = b"PAR1"
_CREATED_BY = b"actlake (raw values)"

# Enumerations of parquet.thrift.
_INT32, _INT64, _FLOAT, _FIXED = 1, 2, 4, 7
_REQUIRED, _OPTIONAL = 0, 1
_PLAIN, _RLE, _RLE_DICTIONARY, _BYTE_STREAM_SPLIT = 0, 3, 8, 9
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_UNCOMPRESSED, _ZSTD = 0, 6
_CONVERTED_INT = {pa.int8(): 15, pa.int16(): 16, pa.int32(): 17, pa.int64(): 18}
_PHYSICAL = {
    pa.int8(): _INT32,
    pa.int16(): _INT32,
    pa.int32(): _INT32,
    pa.int64(): _INT64,
    pa.float16(): _FIXED,
    pa.float32(): _FLOAT,
}
_STORED = {pa.int8(): np.int32, pa.int16(): np.int32}
"""NumPy types of columns that are stored wider than they are."""
_BYTES = {_INT32: 4, _INT64: 8, _FLOAT: 4, _FIXED: 2}

# Types of Thrift's compact protocol.
_T_TRUE, _T_BYTE, _T_I32, _T_I64, _T_BINARY, _T_LIST, _T_STRUCT = 1, 3, 5, 6, 8, 9, 12

_Field = tuple[int, Any]
"""A type of the compact protocol, and a value of it; that of a struct is encoded already."""
_Bytes = bytes | memoryview
_Key = tuple[str, bytes, tuple[Any, ...]]
"""Name of a column, lengths of the lists, and what tells its array from others."""

_LEVELS: _Field = _T_I32, _RLE

_SMALL = 1 << 16
"""Bytes below which it is dearer to write apart than to copy."""

_FEW = 1 << 10
"""Bytes of a column that are not worth compressing."""

_MOST_ROWS = 2**28
"""Of a row group: the size of a page has 31 bits, and no column takes 8 bytes a row."""

_CODES = np.arange(-128, 128, dtype=np.int32).tobytes()
"""The dictionary of every list of int8."""


class UnnestingWriter:
    """Writes record batches with lists as flat rows of one Parquet file; a context manager.

    Each batch is a row group. A row of it becomes as many rows as its lists are long: columns of
    lists are unnested side by side, all others are repeated. Lists may be of int8, int32, float16
    or float32. Those of float16 are stored as they are, because compressing them saves a tenth and
    takes longer than all else, as are columns of a few bytes; others are compressed. Every page has
    its checksum.
    """

    def __init__(
        self,
        file: BinaryIO,
        schema: pa.Schema,
        *,
        bounds: Sequence[str] = (),
        encoded: "EncodedColumns | None" = None,
    ) -> None:
        """Begin the file.

        Args:
            file: where to; its position is 0.
            schema: names, types and nullability of the rows that are written. The precision of
                floats in lists may differ from it: it is that of the first batch.
            bounds: integer columns whose least and greatest values stand in the footer.
            encoded: what writers of other files encoded last, which may be at work in other
                threads; they must have the same schema and bounds.
        """
        self.num_rows = 0
        """Rows that were written so far."""
        self._file = file
        self._schema = schema
        self._bounds = frozenset(bounds)
        self._offset = 0
        self._waiting = bytearray()
        self._types: list[pa.DataType] | None = None
        self._groups: list[_Field] = []
        self._encoded = EncodedColumns() if encoded is None else encoded
        self._write(_MAGIC)

    def __enter__(self) -> "UnnestingWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._end()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Append rows as one row group; nothing if all lists are empty.

        Raises:
            ValueError: if lists of a row differ in length, a list has a null inside, a column that
                may not be null is null, a column is of another type than the schema or the first
                batch has, or there are too many rows for one page.
        """
        lengths = _lengths(batch)
        num_rows = int(lengths.sum())
        if num_rows == 0:
            return
        if num_rows > _MOST_ROWS:
            raise ValueError(f"a row group can have {_MOST_ROWS:,} rows, found {num_rows:,}")
        types = [_stored_type(batch[known.name], known) for known in self._schema]
        if self._types is None:
            self._types = types
        elif types != self._types:
            raise ValueError(f"all batches of a file must have one type, found {types}")
        start, size, chunks = self._offset, 0, []
        lengths_key = lengths.tobytes()
        for known, dtype in zip(self._schema, types, strict=True):
            rows = batch[known.name]
            if rows.null_count and not known.nullable:
                raise ValueError(f"column {known.name!r} may not be null, found {rows.null_count}")
            key = known.name, lengths_key, _identity(rows)
            # Most columns are those of another row group: of the one before, or of another file.
            column = self._encoded.get(key) or self._encode(key, rows, known, dtype, lengths)
            chunks.append((_T_STRUCT, self._chunk(column)))
            size += column.raw_size
        group = {
            1: (_T_LIST, chunks),
            2: (_T_I64, size),
            3: (_T_I64, num_rows),
            5: (_T_I64, start),
            6: (_T_I64, self._offset - start),
        }
        self._groups.append((_T_STRUCT, _struct(group)))
        self.num_rows += num_rows

    def _encode(
        self, key: "_Key", rows: pa.Array, known: pa.Field, dtype: pa.DataType, lengths: np.ndarray
    ) -> "_Column":
        make = _unnested if pa.types.is_list(rows.type) else _repeated
        column = make(rows, known, dtype, lengths)
        column.finish(known.name, with_bounds=known.name in self._bounds)
        self._encoded.keep(key, rows, column)
        return column

    def _chunk(self, column: "_Column") -> bytes:
        """Write the pages of a column; gives its entry in the footer."""
        start = self._offset
        for part in column.parts:
            self._write(part)
        # What comes before and after the places of the pages is the same wherever they are.
        before, after = column.entry
        places = _offset(start + column.data_page)
        if column.data_page:
            places += _offset(start)
        return before + places + after

    def _end(self) -> None:
        types = self._types or [known.type for known in self._schema]
        elements = [_struct({4: (_T_BINARY, b"schema"), 5: (_T_I32, len(self._schema))})]
        elements += map(_element, self._schema, types)
        # Least and greatest values are in the order of the type.
        order = _struct({1: (_T_STRUCT, _struct({}))})
        footer = _struct(
            {
                1: (_T_I32, 2),
                2: (_T_LIST, [(_T_STRUCT, element) for element in elements]),
                3: (_T_I64, self.num_rows),
                4: (_T_LIST, self._groups),
                6: (_T_BINARY, _CREATED_BY),
                7: (_T_LIST, [(_T_STRUCT, order)] * len(self._schema)),
            }
        )
        self._write(footer)
        self._write(len(footer).to_bytes(4, "little") + _MAGIC)
        self._file.write(self._waiting)

    def _write(self, data: _Bytes) -> None:
        """Write, small parts together: a page of values comes with a dozen of them."""
        if len(data) < _SMALL:
            self._waiting += data
        else:
            if self._waiting:
                self._file.write(self._waiting)
                self._waiting = bytearray()
            self._file.write(data)
        self._offset += len(data)


class EncodedColumns:
    """Columns that were encoded, to be found again.

    Columns of lists are known by where they lie in memory; their arrays are kept, so that it stays
    theirs, and nobody may change them meanwhile. Only the last one of each name is: values come
    once, and places are the same again and again. Columns of integers and of nulls are known by
    what they hold; together they are as long as the neurons of a file. Threads may share it.
    """

    def __init__(self) -> None:
        """Nothing is encoded yet."""
        self._lists: dict[str, tuple[_Key, pa.Array, _Column]] = {}
        self._integers: dict[_Key, _Column] = {}

    def get(self, key: _Key) -> "_Column | None":
        """The column of this key, if it is known."""
        last = self._lists.get(key[0])
        return last[2] if last is not None and last[0] == key else self._integers.get(key)

    def keep(self, key: _Key, rows: pa.Array, column: "_Column") -> None:
        """Remember what an array became."""
        if pa.types.is_list(rows.type):
            self._lists[key[0]] = key, rows, column
        elif pa.types.is_integer(rows.type) or rows.null_count == len(rows):
            self._integers[key] = column


class _Column:
    """One column chunk: its pages, ready to be written, and what the footer says of it."""

    def __init__(
        self,
        dtype: pa.DataType,
        encoding: int,
        num_rows: int,
        parts: Sequence[_Bytes],
        *,
        dictionary: bytes | None = None,
        bounds: tuple[bytes, bytes] | None = None,
    ) -> None:
        """Make the pages.

        Args:
            dtype: type of the values.
            encoding: how they are encoded.
            num_rows: how many there are, with nulls.
            parts: levels that say which are null, if any may be, and the values that are not.
            dictionary: what values are indices of.
            bounds: least and greatest value.
        """
        self.dtype = dtype
        self.encoding = encoding
        self.num_rows = num_rows
        self.bounds = bounds
        size = sum(len(part) for part in parts) + len(dictionary or b"")
        # Compressing half precision saves a tenth and takes longer than all else; of a few runs it
        # saves nothing.
        self.codec = _UNCOMPRESSED if dtype == pa.float16() or size < _FEW else _ZSTD
        self.parts: list[_Bytes] = []
        self.raw_size = 0
        """Bytes before compression, with headers."""
        self.data_page = 0
        """Where the data page begins, after the page of the dictionary."""
        self.entry = b"", b""
        """Its entry in the footer, before and after the places of its pages."""
        if dictionary is not None:
            distinct = len(dictionary) // _BYTES[_PHYSICAL[dtype]]
            values = _struct({1: (_T_I32, distinct), 2: (_T_I32, _PLAIN)})
            self._add_page(_DICTIONARY_PAGE, 7, values, [dictionary])
            self.data_page = sum(len(part) for part in self.parts)
        header = _struct({1: (_T_I32, num_rows), 2: (_T_I32, encoding), 3: _LEVELS, 4: _LEVELS})
        self._add_page(_DATA_PAGE, 5, header, parts)

    def finish(self, name: str, *, with_bounds: bool) -> None:
        """Make `entry`, once all pages are there."""
        size = sum(len(part) for part in self.parts)
        if size < _SMALL:
            self.parts = [b"".join(self.parts)]
        of_pages = self.encoding, self.codec, self.num_rows, self.raw_size, size
        before = _entry(name, _PHYSICAL[self.dtype], *of_pages)
        after = b"\0\0"
        if with_bounds and self.bounds is not None:
            least, greatest = self.bounds
            statistics = _struct({5: (_T_BINARY, greatest), 6: (_T_BINARY, least)})
            last = 11 if self.data_page else 9
            after = _fields({12: (_T_STRUCT, statistics)}, after=last) + after
        self.entry = before, after

    def _add_page(self, kind: int, header_id: int, header: bytes, parts: Sequence[_Bytes]) -> None:
        raw = sum(len(part) for part in parts)
        if self.codec == _ZSTD:
            # A codec may not be shared by threads. Higher levels save nothing.
            zstd = pa.Codec("zstd", compression_level=1)
            parts = [zstd.compress(b"".join(parts), asbytes=True)]
        size, checksum = 0, 0
        for part in parts:
            size += len(part)
            checksum = isal_zlib.crc32(part, checksum)
        signed = checksum - (1 << 32) if checksum >> 31 else checksum
        fields = {1: (_T_I32, kind), 2: (_T_I32, raw), 3: (_T_I32, size), 4: (_T_I32, signed)}
        head = _struct({**fields, header_id: (_T_STRUCT, header)})
        self.parts += [head, *parts]
        self.raw_size += len(head) + raw


@lru_cache(1 << 8)
def _entry(
    name: str, physical: int, encoding: int, codec: int, num_rows: int, raw_size: int, size: int
) -> bytes:
    """What the footer says of a column before the places of its pages."""
    encodings = sorted({_PLAIN, _RLE, encoding})
    fields: dict[int, _Field] = {
        1: (_T_I32, physical),
        2: (_T_LIST, [(_T_I32, number) for number in encodings]),
        3: (_T_LIST, [(_T_BINARY, name.encode())]),
        4: (_T_I32, codec),
        5: (_T_I64, num_rows),
        6: (_T_I64, raw_size),
        7: (_T_I64, size),
    }
    # It is a field of the chunk, behind one that is no longer used; both structs end.
    return _fields({2: (_T_I64, 0), 3: (_T_STRUCT, _fields(fields))})


def _lengths(batch: pa.RecordBatch) -> np.ndarray:
    """(rows,) int64: how long the lists of each row are.

    Raises:
        ValueError: if those of a row differ, or there are none.
    """
    found: np.ndarray | None = None
    place: tuple[int, int] | None = None
    for name, rows in zip(batch.schema.names, batch.columns, strict=True):
        if not pa.types.is_list(rows.type) or rows.null_count == len(rows):
            continue
        if rows.null_count:
            raise ValueError(f"lists of {name!r} must be all null or none, found some")
        # Those of one array of offsets are as long.
        before, place = place, (rows.buffers()[1].address, rows.offset)
        if place == before:
            continue
        lengths = np.diff(rows.offsets.to_numpy()).astype(np.int64)
        if found is not None and not np.array_equal(found, lengths):
            raise ValueError(f"lists of a row must be of one length, found others in {name!r}")
        found = lengths
    if found is None and batch.num_rows:
        raise ValueError("a row must have a list, found none")
    return np.empty(0, dtype=np.int64) if found is None else found


def _identity(rows: pa.Array) -> tuple[Any, ...]:
    """What is the same for arrays that hold the same; of lists, for those that are the same."""
    if rows.null_count == len(rows):
        return rows.type, len(rows)
    if pa.types.is_list(rows.type):
        buffers = [None if buffer is None else buffer.address for buffer in rows.buffers()]
        return rows.type, len(rows), rows.offset, rows.values.offset, *buffers
    if not rows.null_count:
        return rows.type, rows.to_numpy().tobytes()
    present = rows.is_valid().to_numpy(zero_copy_only=False).tobytes()
    return rows.type, present, rows.drop_null().to_numpy().tobytes()


def _repeated(rows: pa.Array, known: pa.Field, dtype: pa.DataType, lengths: np.ndarray) -> _Column:
    """A column whose values stand for as many rows each as lists are long."""
    total = int(lengths.sum())
    valid = np.ones(len(rows), dtype=bool)
    if rows.null_count:
        valid = rows.is_valid().to_numpy(zero_copy_only=False)
    levels = _runs(valid, lengths, 1) if rows.null_count else _run(1, total, 1)
    parts = [_section(levels)] if known.nullable else []
    there = valid & (lengths > 0)
    if not there.any():
        return _Column(dtype, _PLAIN, total, parts)
    stored = _STORED.get(dtype, dtype.to_pandas_dtype())
    kept = rows if there.all() else rows.filter(pa.array(there))
    values = kept.to_numpy().astype(stored, copy=False)
    # By their bits, which tell -0 from 0. Bounds are of integers alone.
    bits = values.view(np.int32) if dtype == pa.float32() else values
    if dtype == pa.float32() and (bits != bits[0]).any():
        # One for each list, equal or not: all row groups with such lists have the same runs.
        distinct, runs = bits, _runs_of_all(lengths[there].tobytes())
    else:
        distinct, indices = np.unique(bits, return_inverse=True)
        runs = _runs_of_indices(indices, lengths[there])
    bounds = distinct[0].tobytes(), distinct[-1].tobytes()
    parts.append(runs)
    dictionary = distinct.tobytes()
    return _Column(dtype, _RLE_DICTIONARY, total, parts, dictionary=dictionary, bounds=bounds)


def _unnested(rows: pa.Array, known: pa.Field, dtype: pa.DataType, lengths: np.ndarray) -> _Column:
    """A column of lists, one value for each row.

    Raises:
        ValueError: if a list has a null inside.
    """
    total, present = int(lengths.sum()), rows.null_count < len(rows)
    parts: list[_Bytes] = [_section(_run(int(present), total, 1))] if known.nullable else []
    if not present:
        return _Column(dtype, _PLAIN, total, parts)
    flat = rows.flatten()
    if flat.null_count:
        raise ValueError(f"lists of {known.name!r} must have no nulls, found some")
    values = flat.to_numpy()
    if dtype == pa.float16():
        return _Column(dtype, _PLAIN, total, [*parts, _bytes(values)])
    if dtype == pa.int8():
        # Indices of 8 bits in groups of eight, into all numbers that there are.
        groups = -(-total // 8)
        parts += [bytes((8,)) + _varint(groups << 1 | 1)]
        parts += [_bytes(values.view(np.uint8) ^ np.uint8(0x80)), bytes(8 * groups - total)]
        return _Column(dtype, _RLE_DICTIONARY, total, parts, dictionary=_CODES)
    streams = np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4).T)
    return _Column(dtype, _BYTE_STREAM_SPLIT, total, [*parts, _bytes(streams.reshape(-1))])


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).view(np.uint8).data


def _stored_type(rows: pa.Array, known: pa.Field) -> pa.DataType:
    """Type of a column's values; that of the schema but for lists of half precision.

    Raises:
        ValueError: if the column has another.
    """
    is_list = pa.types.is_list(rows.type)
    found = rows.type.value_type if is_list else rows.type
    half = is_list and known.type == pa.float32() and found == pa.float16()
    if found != known.type and not half:
        raise ValueError(f"column {known.name!r} must be of {known.type}, found {rows.type}")
    return known.type if rows.null_count == len(rows) else found


def _element(known: pa.Field, dtype: pa.DataType) -> bytes:
    """A column in Parquet's schema."""
    repetition = _OPTIONAL if known.nullable else _REQUIRED
    fields: dict[int, _Field] = {1: (_T_I32, _PHYSICAL[dtype])}
    if dtype == pa.float16():
        fields[2] = _T_I32, 2  # Bytes.
    fields |= {3: (_T_I32, repetition), 4: (_T_BINARY, known.name.encode())}
    if dtype in _CONVERTED_INT:
        fields[6] = _T_I32, _CONVERTED_INT[dtype]
        integer = _struct({1: (_T_BYTE, dtype.bit_width), 2: (_T_TRUE, None)})
        fields[10] = _T_STRUCT, _struct({10: (_T_STRUCT, integer)})
    elif dtype == pa.float16():
        fields[10] = _T_STRUCT, _struct({15: (_T_STRUCT, _struct({}))})
    return _struct(fields)


def _section(levels: bytes) -> bytes:
    return len(levels).to_bytes(4, "little") + levels


def _runs(numbers: np.ndarray, counts: np.ndarray, num_bytes: int) -> bytes:
    """Numbers, each so many times, as few runs."""
    numbers, counts = numbers[counts > 0], counts[counts > 0]
    if not len(numbers):
        return b""
    starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    runs = zip(numbers[starts].tolist(), np.add.reduceat(counts, starts).tolist(), strict=True)
    return b"".join(_run(number, count, num_bytes) for number, count in runs)


def _runs_of_indices(indices: np.ndarray, counts: np.ndarray) -> bytes:
    """Runs of indices into a dictionary, after the number of their bits."""
    width = max(1, int(indices.max()).bit_length())
    return bytes((width,)) + _runs(indices, counts, (width + 7) // 8)


@lru_cache(16)
def _runs_of_all(counts: bytes) -> bytes:
    """Runs of all indices in order.

    Args:
        counts: int64, how often each comes.
    """
    numbers = np.frombuffer(counts, dtype=np.int64)
    return _runs_of_indices(np.arange(len(numbers)), numbers)


def _run(number: int, count: int, num_bytes: int) -> bytes:
    """A run of Parquet's RLE encoding."""
    return _varint(count << 1) + int(number).to_bytes(num_bytes, "little")


def _offset(place: int) -> bytes:
    """A place in the file, as field 9 or 11 of a column's metadata: two after the one before it."""
    return bytes((2 << 4 | _T_I64,)) + _varint(place << 1)


@lru_cache(1 << 12)
def _varint(number: int) -> bytes:
    """A number of any length; most are the same in all row groups."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _struct(fields: dict[int, _Field]) -> bytes:
    """A struct of Thrift's compact protocol; its fields are in the order of their ids."""
    return _fields(fields) + b"\0"


def _fields(fields: dict[int, _Field], *, after: int = 0) -> bytes:
    """Some fields of a struct, those that come after the one of id `after`."""
    out = bytearray()
    last = after
    for number, (kind, value) in fields.items():
        out.append((number - last) << 4 | kind)  # No two of our ids are 16 or more apart.
        out += _value(kind, value)
        last = number
    return bytes(out)


def _value(kind: int, value: Any) -> bytes:
    if kind in (_T_I32, _T_I64):
        return _varint((value << 1) ^ (value >> 63))  # Zigzag.
    if kind == _T_STRUCT:
        encoded: bytes = value
        return encoded
    if kind == _T_BINARY:
        text: bytes = value
        return _varint(len(text)) + text
    if kind == _T_BYTE:
        return bytes((value,))
    if kind == _T_TRUE:
        return b""  # The type is the value.
    element = value[0][0] if value else _T_STRUCT
    size = len(value)
    head = bytes((size << 4 | element,)) if size < 15 else bytes((0xF0 | element,)) + _varint(size)
    return head + b"".join(_value(*item) for item in value)
