"""Reading and writing the bytes of a store: whole files, atomically, with checksums.

`StoreFiles` is the one place that knows folders of this machine from object stores.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import DamagedFileError, StoreError
from storage.local import LocalFolder
from storage.objects import ObjectStore
from storage.pages import EncodedColumns, UnnestingWriter
from storage.schema import TABLES, Table

__all__ = ["FileRecord", "StoreFiles", "canonical_json"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_PARTITION = re.compile(r"/(run|task|analysis)=")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a commit record says of one file."""

    path: str
    """Path relative to the store's root."""
    table: str
    """Name of the table the file belongs to."""
    rows: int
    """Number of rows."""
    bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the content, in hexadecimal."""

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return asdict(self)


def canonical_json(value: Any) -> bytes:
    """JSON that is the same bytes for the same value: sorted keys, two-space indent, UTF-8."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


class StoreFiles:
    """The files below a store's root: a folder, or a URL such as ``s3://bucket/prefix``.

    Every file appears whole: a reader sees the old content, the new content or nothing, whatever
    is killed and when. Paths inside the store use forward slashes.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Nothing is read or made yet.

        Raises:
            StoreError: if the path or URL cannot be one of a store, or its driver is missing.
        """
        text = os.fspath(root)
        if any(character in text for character in "*?[\\"):
            raise StoreError(
                "store path must not contain '*', '?', '[' or a backslash because SQL engines read "
                f"them as patterns, found {text!r}: rename the folder."
            )
        text = text.removeprefix("file://")
        self._backend = ObjectStore(text) if "://" in text else LocalFolder(text)
        if _PARTITION.search(self.root):
            raise StoreError(
                "store path must not lie below a folder named run=..., task=... or analysis=... "
                f"because readers take it for a partition, found {self.root!r}: choose "
                "another folder."
            )

    @property
    def root(self) -> str:
        """Absolute path of the folder, or the URL; what workers are given to open the store."""
        return self._backend.root

    @property
    def is_remote(self) -> bool:
        """Whether the store is in an object store."""
        return isinstance(self._backend, ObjectStore)

    def reader(self) -> Any | None:
        """A new fsspec filesystem through which an SQL engine reads an object store.

        It may take listings that are ten seconds old. None for a folder.
        """
        return self._backend.reader()

    def local(self, path: str) -> Path:
        """Absolute path of a file given by its path inside the store.

        Raises:
            StoreError: if the store is not a folder.
        """
        return self._backend.local(path)

    def prepare(self) -> None:
        """Make the folder, or check that the bucket can be reached.

        Raises:
            StoreError: if the store cannot be written to.
        """
        self._backend.prepare()

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None if the store has no bound."""
        return self._backend.free_bytes()

    def exists(self, path: str) -> bool:
        """Whether there is such a file, or a folder with something in it."""
        return self._backend.exists(path)

    def size(self, path: str) -> int:
        """Size of a file in bytes; FileNotFoundError if it is missing."""
        return self._backend.size(path)

    def everything(self, folder: str) -> Iterator[str]:
        """Paths of all files below a folder, hidden ones too, in any order, as they are found."""
        return self._backend.everything(folder)

    def modified(self, path: str) -> float:
        """When a file last changed, in Unix time; FileNotFoundError if it is missing."""
        return self._backend.modified(path)

    def remove(self, path: str) -> None:
        """Remove a file if it is there, and the folders that it leaves empty.

        Raises:
            StoreError: if it cannot be removed.
        """
        self._backend.remove(path)

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Write a whole file so that it appears at once.

        Raises:
            StoreError: if it cannot be written (no space, no permission, connection lost, ...).
        """
        self._backend.put(path, data)

    @contextmanager
    def staging(self) -> Iterator["StoreFiles"]:
        """A temporary place for files that `publish` gives their names, once those are known."""
        with self._backend.staging_folder() as folder:
            yield StoreFiles(folder)

    def publish(self, staged: "StoreFiles", target: str, *, last: str) -> None:
        """Give all files of a staging place their names below the folder `target`.

        Whoever sees the file `last` sees all others too. If it is there already, nothing is done.

        Raises:
            StoreError: if they cannot be written.
        """
        self._backend.publish(staged.root, target, last)

    def writing(self, path: str) -> AbstractContextManager[Path]:
        """A path of this machine to write a file to, which appears whole when the block ends well.

        Raises:
            StoreError: as `put`.
        """
        return self._backend.writing(path)

    def put_json(self, path: str, value: Any) -> None:
        """Write a JSON file (canonical form)."""
        self.put(path, canonical_json(value))

    def put_table(
        self,
        path: str,
        name: str,
        table: pa.Table,
        *,
        computing: AbstractContextManager[object] | None = None,
    ) -> FileRecord:
        """Write one Parquet file of the table called `name` and describe it.

        The bytes depend on the rows alone, so writing the same rows again gives the same file.

        Args:
            path: path inside the store.
            name: name of the table.
            table: its rows, in the order in which they are to be stored.
            computing: entered while rows are encoded, and left before they are synced to a disk or
                sent over a network.

        Raises:
            StoreError: as `put`.
        """
        with computing or nullcontext():
            checked = table.cast(TABLES[name].schema)
            buffer = pa.BufferOutputStream()
            with _parquet_writer(buffer, TABLES[name]) as writer:
                writer.write_table(checked, row_group_size=TABLES[name].row_group_rows)
            data = memoryview(buffer.getvalue())
            digest = hashlib.sha256(data).hexdigest()
        self.put(path, data)
        return FileRecord(
            path=path, table=name, rows=checked.num_rows, bytes=data.nbytes, sha256=digest
        )

    def put_batches(
        self,
        path: str,
        name: str,
        batches: Iterable[pa.RecordBatch],
        *,
        encoded: EncodedColumns | None = None,
        computing: AbstractContextManager[object] | None = None,
    ) -> FileRecord:
        """Write a Parquet file of the table called `name` that may not fit into memory.

        Args:
            path: path inside the store.
            name: name of the table; each batch must have its columns. Those of a table with
                `Table.unnested_bounds` have lists, which become rows.
            batches: the rows, in the order in which they are to be stored.
            encoded: given to several files of a table with lists, what they have in common is
                encoded once.
            computing: as of `put_table`.

        Raises:
            StoreError: as `put`.
        """
        with self._backend.writing(path) as temporary:
            with computing or nullcontext(), temporary.open("wb") as file:
                hashing = _HashingFile(file)
                rows = _write_batches(hashing, TABLES[name], batches, encoded)
            size = temporary.stat().st_size
        digest = hashing.sha256.hexdigest()
        return FileRecord(path=path, table=name, rows=rows, bytes=size, sha256=digest)

    def get_json(self, path: str) -> Any:
        """Read a JSON file.

        Raises:
            DamagedFileError: if the file is missing or is not JSON.
        """
        try:
            return json.loads(self._backend.read(path))
        except (OSError, ValueError) as error:
            raise self._unreadable(path, error) from error

    def get_table(self, path: str) -> pa.Table:
        """Read one Parquet file, without its partition columns.

        Raises:
            DamagedFileError: if the file is missing or is not Parquet.
        """
        try:
            return pq.ParquetFile(pa.BufferReader(self._backend.read(path))).read()
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(path, error) from error

    def get_recorded_table(self, record: FileRecord) -> pa.Table:
        """Read one Parquet file if its content is what its record says.

        Raises:
            DamagedFileError: if the file is missing or its content was altered.
        """
        try:
            data = self._backend.read(record.path)
        except OSError as error:
            raise self._unreadable(record.path, error) from error
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise DamagedFileError(
                f"{self.root}/{record.path} was altered since it was written (its SHA-256 differs "
                "from the recorded one): restore it from a copy."
            )
        return pq.ParquetFile(pa.BufferReader(data)).read()

    def _unreadable(self, path: str, error: Exception) -> DamagedFileError:
        return DamagedFileError(f"cannot read {self.root}/{path}: {str(error).rstrip('.')}.")

    def num_rows(self, path: str) -> int:
        """Number of rows of a Parquet file, from its footer.

        Raises:
            DamagedFileError: if the file is missing or is not Parquet.
        """
        return self.parquet(path, lambda file: int(file.metadata.num_rows))

    def parquet(self, path: str, use: Callable[[pq.ParquetFile], Result]) -> Result:
        """What `use` makes of a Parquet file, of which it may read parts.

        Raises:
            DamagedFileError: if the file is missing or is not Parquet, or a page that is read does
                not have its checksum.
        """

        def opened(file: BinaryIO) -> Result:
            return use(pq.ParquetFile(file, page_checksum_verification=True))

        try:
            return self._backend.using(path, opened)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(path, error) from error

    def sha256(self, path: str) -> str:
        """SHA-256 of a file's content, in hexadecimal."""
        return self._backend.sha256(path)

    def glob(self, pattern: str) -> Iterator[str]:
        """Paths inside the store that match a glob pattern, in any order, as they are found."""
        return self._backend.glob(pattern)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What `function` makes of each item, in order; several at a time if that is faster.

        Args:
            function: reads or writes files of this store; runs in threads on an object store.
            items: taken as results are asked for, so there may be any number of them.
        """
        return self._backend.map(function, items)

    def list(self, pattern: str) -> list[str]:
        """Paths inside the store that match a glob pattern, sorted."""
        return sorted(self._backend.glob(pattern))


class _HashingFile(io.BufferedIOBase):
    """Passes on what is written, and knows its SHA-256: large files are not read again for it."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def _write_batches(
    file: Any, table: Table, batches: Iterable[pa.RecordBatch], encoded: EncodedColumns | None
) -> int:
    """Write a Parquet file, and give its number of rows."""
    if table.unnested_bounds is not None:
        with UnnestingWriter(
            file, table.schema, bounds=table.unnested_bounds, encoded=encoded
        ) as unnesting:
            for batch in batches:
                unnesting.write_batch(batch)
        return unnesting.num_rows
    rows = 0
    with _parquet_writer(file, table) as writer:
        for batch in batches:
            checked = pa.Table.from_batches([batch]).select(table.schema.names).cast(table.schema)
            writer.write_table(checked, row_group_size=table.row_group_rows)
            rows += batch.num_rows
    return rows


def _parquet_writer(sink: Any, table: Table) -> pq.ParquetWriter:
    options: dict[str, Any] = {
        "compression": "zstd",
        # Floats are nearly all different: a dictionary of them only adds indices.
        "use_dictionary": [_leaf(f) for f in table.schema if not _holds_floats(f.type)],
        "write_page_index": True,
    }
    return pq.ParquetWriter(
        sink, table.schema, store_schema=False, use_compliant_nested_type=True, **options
    )


def _leaf(field: pa.Field) -> str:
    """Name that Parquet has for the values of a column."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def _holds_floats(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_floating(dtype.value_type if pa.types.is_list(dtype) else dtype))
