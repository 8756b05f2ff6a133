"""Parquet files of long lists, written page by page: what raw values are kept in.

A general writer looks at every value of a list several times, to find where lists begin and which
values are null. Here whole rows are known to be there, so that levels are a few bytes for each row
and values go into the file as they lie in memory: a tenth of the time. Files are plain Parquet,
that any reader reads. Only what table ``values`` needs is here. The format is that of
https://parquet.apache.org/docs/file-format/ and of parquet.thrift, which names the numbers below.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["ListFileWriter"]

_MAGIC = b"PAR1"
_CREATED_BY = b"actlake (long lists)"

# Enumerations of parquet.thrift.
_INT32, _INT64, _FLOAT, _FIXED = 1, 2, 4, 7
_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2
_PLAIN, _RLE, _RLE_DICTIONARY, _BYTE_STREAM_SPLIT = 0, 3, 8, 9
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_UNCOMPRESSED, _ZSTD = 0, 6
_CONVERTED_LIST = 3
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
_ENCODINGS = {pa.int8(): _RLE_DICTIONARY, pa.float32(): _BYTE_STREAM_SPLIT}
"""Encodings of lists that are not plain."""

# Types of Thrift's compact protocol.
_T_TRUE, _T_BYTE, _T_I32, _T_I64, _T_BINARY, _T_LIST, _T_STRUCT = 1, 3, 5, 6, 8, 9, 12

_Field = tuple[int, Any]
"""A type of the compact protocol, and a value of it; that of a struct is encoded already."""
_Bytes = bytes | memoryview

_LEVELS: _Field = _T_I32, _RLE

_CODES = np.arange(-128, 128, dtype=np.int32)
"""The dictionary of every column of int8: codes stand in it in the order of their bytes."""


class ListFileWriter:
    """Writes record batches as row groups of one Parquet file; a context manager.

    Columns may be integers and floats, and lists of int8, float16 or float32 without nulls inside.
    Lists of float16 are stored as they are, because compressing them saves a tenth and takes longer
    than all else; all other columns are compressed. Every page has its checksum.
    """

    def __init__(self, file: BinaryIO, schema: pa.Schema, *, bounds: Sequence[str] = ()) -> None:
        """Begin the file.

        Args:
            file: where to; its position is 0.
            schema: names, types and nullability of the columns. The precision of lists of floats
                may differ from it: it is that of the first batch.
            bounds: integer columns whose least and greatest values stand in the footer.
        """
        self._file = file
        self._schema = schema
        self._bounds = frozenset(bounds)
        self._offset = 0
        self._types: list[pa.DataType] | None = None
        self._groups: list[_Field] = []
        self._num_rows = 0
        self._write(_MAGIC)

    def __enter__(self) -> "ListFileWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._end()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Append rows as one row group.

        Raises:
            ValueError: if a list has a null inside, or a column that may not be null is null.
        """
        types = [_stored_type(batch[known.name], known) for known in self._schema]
        if self._types is None:
            self._types = types
        elif types != self._types:
            raise ValueError(f"all batches of a file must have one type, found {types}")
        start, size, chunks = self._offset, 0, []
        for known, dtype in zip(self._schema, types, strict=True):
            column = _take_apart(batch[known.name], known, dtype)
            metadata, raw = self._chunk(known.name, column)
            chunks.append((_T_STRUCT, _struct({2: (_T_I64, 0), 3: (_T_STRUCT, metadata)})))
            size += raw
        group = {
            1: (_T_LIST, chunks),
            2: (_T_I64, size),
            3: (_T_I64, batch.num_rows),
            5: (_T_I64, start),
            6: (_T_I64, self._offset - start),
        }
        self._groups.append((_T_STRUCT, _struct(group)))
        self._num_rows += batch.num_rows

    def _chunk(self, name: str, column: "_Column") -> tuple[bytes, int]:
        """Write the pages of a column; gives its entry in the footer, and its raw size."""
        start, raw = self._offset, 0
        encoding, codec = column.encoding, column.codec
        dictionary: dict[int, _Field] = {}
        if encoding == _RLE_DICTIONARY:
            values = _struct({1: (_T_I32, len(_CODES)), 2: (_T_I32, _PLAIN)})
            raw += self._page(_DICTIONARY_PAGE, 7, values, [_CODES.tobytes()], codec)
            dictionary = {11: (_T_I64, start)}
        pages = self._offset
        header = _struct(
            {1: (_T_I32, column.num_levels), 2: (_T_I32, encoding), 3: _LEVELS, 4: _LEVELS}
        )
        raw += self._page(_DATA_PAGE, 5, header, [column.levels, *column.values], codec)
        fields: dict[int, _Field] = {
            1: (_T_I32, _PHYSICAL[column.dtype]),
            2: (_T_LIST, [(_T_I32, code) for code in sorted({_PLAIN, _RLE, encoding})]),
            3: (_T_LIST, [(_T_BINARY, part) for part in column.path]),
            4: (_T_I32, codec),
            5: (_T_I64, column.num_levels),
            6: (_T_I64, raw),
            7: (_T_I64, self._offset - start),
            9: (_T_I64, pages),
            **dictionary,
        }
        if name in self._bounds and column.bounds is not None:
            least, greatest = column.bounds
            fields[12] = _T_STRUCT, _struct({5: (_T_BINARY, greatest), 6: (_T_BINARY, least)})
        return _struct(fields), raw

    def _page(
        self, kind: int, header_id: int, header: bytes, parts: Sequence[_Bytes], codec: int
    ) -> int:
        """Write one page; gives its size as it is before compression, with its header."""
        raw = sum(len(part) for part in parts)
        if codec == _ZSTD:
            # A codec may not be shared by threads. Higher levels save nothing.
            zstd = pa.Codec("zstd", compression_level=1)
            parts = [zstd.compress(b"".join(parts), asbytes=True)]
        size, checksum = 0, 0
        for part in parts:
            size += len(part)
            checksum = zlib.crc32(part, checksum)
        signed = checksum - (1 << 32) if checksum >> 31 else checksum
        fields = {1: (_T_I32, kind), 2: (_T_I32, raw), 3: (_T_I32, size), 4: (_T_I32, signed)}
        head = _struct({**fields, header_id: (_T_STRUCT, header)})
        self._write(head)
        for part in parts:
            self._write(part)
        return len(head) + raw

    def _end(self) -> None:
        types = self._types or [_flat_type(known.type) for known in self._schema]
        root = _struct({4: (_T_BINARY, b"schema"), 5: (_T_I32, len(self._schema))})
        elements = [root]
        for known, dtype in zip(self._schema, types, strict=True):
            elements += _elements(known, dtype)
        # Least and greatest values are in the order of the type.
        order = _struct({1: (_T_STRUCT, _struct({}))})
        footer = _struct(
            {
                1: (_T_I32, 2),
                2: (_T_LIST, [(_T_STRUCT, element) for element in elements]),
                3: (_T_I64, self._num_rows),
                4: (_T_LIST, self._groups),
                6: (_T_BINARY, _CREATED_BY),
                7: (_T_LIST, [(_T_STRUCT, order)] * len(self._schema)),
            }
        )
        self._write(footer)
        self._write(len(footer).to_bytes(4, "little") + _MAGIC)

    def _write(self, data: _Bytes) -> None:
        self._file.write(data)
        self._offset += len(data)


@dataclass(frozen=True, slots=True)
class _Column:
    """The rows of one column chunk, as a page holds them."""

    path: list[bytes]
    """Its path in Parquet's schema."""
    dtype: pa.DataType
    """Type of its values."""
    encoding: int
    """How values are encoded."""
    num_levels: int
    """Values, and rows that have none."""
    levels: bytes
    """Repetition and definition levels."""
    values: Sequence[_Bytes]
    """All that are there, one after the other."""
    bounds: tuple[bytes, bytes] | None = None
    """Least and greatest value of a column that is no list."""

    @property
    def codec(self) -> int:
        """How pages are compressed."""
        return _UNCOMPRESSED if self.dtype == pa.float16() else _ZSTD


def _take_apart(rows: pa.Array, known: pa.Field, dtype: pa.DataType) -> _Column:
    """Take an array apart.

    Raises:
        ValueError: as `ListFileWriter.write_batch`.
    """
    if rows.null_count and not known.nullable:
        raise ValueError(f"column {known.name!r} may not be null, found {rows.null_count}")
    path = [known.name.encode()]
    if not pa.types.is_list(known.type):
        values = (
            rows.drop_null()
            .to_numpy()
            .astype(_STORED.get(dtype, dtype.to_pandas_dtype()), copy=False)
        )
        bounds = (values.min().tobytes(), values.max().tobytes()) if len(values) else None
        levels = _section(_runs(rows.is_valid())) if known.nullable else b""
        return _Column(path, dtype, _PLAIN, len(rows), levels, [_bytes(values)], bounds)
    path += [b"list", b"element"]
    if rows.null_count == len(rows):
        levels = _section(_run(0, len(rows))) * 2
        return _Column(path, dtype, _PLAIN, len(rows), levels, [])
    flat = rows.flatten()
    if flat.null_count:
        raise ValueError(f"lists of {known.name!r} must have no nulls, found some")
    places, levels = _list_levels(rows, nullable=known.nullable)
    encoding = _ENCODINGS.get(dtype, _PLAIN)
    return _Column(path, dtype, encoding, places, levels, _encoded(flat.to_numpy(), dtype))


def _list_levels(rows: pa.Array, *, nullable: bool) -> tuple[int, bytes]:
    """How many places lists have, and the levels that tell lists apart.

    A place is a value, or a list that has none. Repetition is 0 where a list begins and 1 where it
    goes on. Definition is 0 for a list that is null, if it may be; the next number is for one that
    is empty, and the one after it for a value.
    """
    lengths = rows.value_lengths().fill_null(-1).to_numpy()
    empty = int(nullable)
    first = int(lengths[0])
    if first > 0 and (lengths == first).all():
        begins = _list_begins(first) * len(rows)
        places, defined = first * len(rows), _run(empty + 1, first * len(rows))
    else:
        begins = b"".join(map(_list_begins, lengths.tolist()))
        places = int(np.maximum(lengths, 1).sum())
        runs = ((empty + (n > 0) - (n < 0), max(n, 1)) for n in lengths.tolist())
        defined = b"".join(
            _run(level, sum(count for _, count in same))
            for level, same in groupby(runs, itemgetter(0))
        )
    return places, _section(begins) + _section(defined)


def _list_begins(length: int) -> bytes:
    """Repetition levels of one list."""
    return _run(0, 1) + (_run(1, length - 1) if length > 1 else b"")


def _encoded(values: np.ndarray, dtype: pa.DataType) -> list[_Bytes]:
    """Values of lists as a page holds them."""
    if dtype == pa.int8():
        # Indices of 8 bits in groups of eight, into `_CODES`.
        groups = -(-len(values) // 8)
        indices = values.astype(np.int8, copy=False).view(np.uint8) ^ np.uint8(0x80)
        return [
            b"\x08" + _varint(groups << 1 | 1),
            _bytes(indices),
            bytes(8 * groups - len(values)),
        ]
    if dtype == pa.float32():
        streams = values.astype(np.float32, copy=False).view(np.uint8).reshape(-1, 4).T
        return [_bytes(np.ascontiguousarray(streams).reshape(-1))]
    return [_bytes(values)]


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).view(np.uint8).data


def _flat_type(dtype: pa.DataType) -> pa.DataType:
    return dtype.value_type if pa.types.is_list(dtype) else dtype


def _stored_type(rows: pa.Array, known: pa.Field) -> pa.DataType:
    """Type of the values of a column; that of the schema for one that is null."""
    return _flat_type(rows.type if rows.null_count < len(rows) else known.type)


def _elements(known: pa.Field, dtype: pa.DataType) -> list[bytes]:
    """A column in Parquet's schema: itself, or the three levels of a list."""
    repetition = _OPTIONAL if known.nullable else _REQUIRED
    if not pa.types.is_list(known.type):
        return [_leaf(known.name.encode(), dtype, repetition)]
    outer: dict[int, _Field] = {
        3: (_T_I32, repetition),
        4: (_T_BINARY, known.name.encode()),
        5: (_T_I32, 1),
        6: (_T_I32, _CONVERTED_LIST),
        10: (_T_STRUCT, _struct({3: (_T_STRUCT, _struct({}))})),
    }
    inner: dict[int, _Field] = {3: (_T_I32, _REPEATED), 4: (_T_BINARY, b"list"), 5: (_T_I32, 1)}
    return [_struct(outer), _struct(inner), _leaf(b"element", dtype, _REQUIRED)]


def _leaf(name: bytes, dtype: pa.DataType, repetition: int) -> bytes:
    fields: dict[int, _Field] = {1: (_T_I32, _PHYSICAL[dtype])}
    if dtype == pa.float16():
        fields[2] = _T_I32, 2  # Bytes.
    fields |= {3: (_T_I32, repetition), 4: (_T_BINARY, name)}
    if dtype in _CONVERTED_INT:
        fields[6] = _T_I32, _CONVERTED_INT[dtype]
        integer = _struct({1: (_T_BYTE, dtype.bit_width), 2: (_T_TRUE, None)})
        fields[10] = _T_STRUCT, _struct({10: (_T_STRUCT, integer)})
    elif dtype == pa.float16():
        fields[10] = _T_STRUCT, _struct({15: (_T_STRUCT, _struct({}))})
    return _struct(fields)


def _section(levels: bytes) -> bytes:
    return len(levels).to_bytes(4, "little") + levels


def _runs(levels: pa.Array) -> bytes:
    """Booleans as levels, in runs."""
    runs = pc.run_end_encode(levels)
    counts = np.diff(runs.run_ends.to_numpy(), prepend=0).tolist()
    return b"".join(map(_run, map(int, runs.values.to_pylist()), counts))


def _run(level: int, count: int) -> bytes:
    """A run of Parquet's RLE encoding, of levels of at most 8 bits."""
    return _varint(count << 1) + bytes((level,))


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _struct(fields: dict[int, _Field]) -> bytes:
    """A struct of Thrift's compact protocol; its fields are in the order of their ids."""
    out = bytearray()
    last = 0
    for number, (kind, value) in fields.items():
        out.append((number - last) << 4 | kind)  # No two of our ids are 16 or more apart.
        out += _value(kind, value)
        last = number
    out.append(0)
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
