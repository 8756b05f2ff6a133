"""Reading and writing the bytes of a store: whole files, atomically, with checksums."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import DamagedFileError, StoreError
from storage.schema import TABLES

__all__ = ["FileRecord", "StoreFiles", "canonical_json"]

_ROW_GROUP_ROWS = 1 << 17
"""Large enough to compress well, small enough that a filter on layer skips most of a big part."""

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
    """The files below a store's root folder.

    Every file is written under a temporary name beside its target, synced, and renamed: a reader
    sees the old content, the new content or nothing, whatever is killed and when.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        text = os.fspath(root)
        if "://" in text:
            raise StoreError(
                f"store must be a local folder or a mounted one, found the URL {text!r}: "
                "mount the bucket, or capture to a folder and copy it."
            )
        if any(character in text for character in "*?[\\"):
            raise StoreError(
                "store path must not contain '*', '?', '[' or a backslash because SQL engines read "
                f"them as patterns, found {text!r}: rename the folder."
            )
        # Resolved, because the names that SQL engines report for files must equal root + path.
        self.root = Path(text).expanduser().resolve()
        if _PARTITION.search(self.root.as_posix()):
            raise StoreError(
                "store path must not lie below a folder named run=..., task=... or analysis=... "
                f"because readers take it for a partition, found {str(self.root)!r}: choose "
                "another folder."
            )

    def local(self, path: str) -> Path:
        """Absolute path of a file given by its path inside the store."""
        return self.root / PurePosixPath(path)

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        return self.local(path).exists()

    def size(self, path: str) -> int:
        """Size of a file in bytes; FileNotFoundError if it is missing."""
        return self.local(path).stat().st_size

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Write a whole file so that it appears at once.

        Raises:
            StoreError: if the operating system refuses (no space, no permission, ...).
        """
        with self._replacing(path) as file:
            file.write(data)

    @contextmanager
    def _replacing(self, path: str) -> Iterator[BinaryIO]:
        """A new file that takes the place of `path` when the block ends well."""
        target = self.local(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
                _sync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot write {target}: {error.strerror or error}. Free or grant the space or "
                "permission, then run the same command again: committed work is kept."
            ) from error

    def rename_folder(self, path: str, target: str) -> None:
        """Give a folder its final name, at once; an existing target is left as it is.

        Raises:
            StoreError: if the operating system refuses.
        """
        if self.exists(target):
            return
        try:
            self.local(target).parent.mkdir(parents=True, exist_ok=True)
            self.local(path).rename(self.local(target))
            _sync_folder(self.local(target).parent)
        except OSError as error:
            raise StoreError(
                f"cannot rename {self.local(path)} to {self.local(target)}: {error.strerror}."
            ) from error

    def put_json(self, path: str, value: Any) -> None:
        """Write a JSON file (canonical form)."""
        self.put(path, canonical_json(value))

    def put_table(self, path: str, name: str, table: pa.Table) -> FileRecord:
        """Write one Parquet file of the table called `name` and describe it.

        The bytes depend on the rows alone, so writing the same rows again gives the same file.
        """
        checked = table.cast(TABLES[name].schema)
        buffer = pa.BufferOutputStream()
        with _parquet_writer(buffer, checked.schema) as writer:
            writer.write_table(checked, row_group_size=_ROW_GROUP_ROWS)
        data = memoryview(buffer.getvalue())
        self.put(path, data)
        return FileRecord(
            path=path,
            table=name,
            rows=checked.num_rows,
            bytes=data.nbytes,
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def put_batches(self, path: str, name: str, batches: Iterable[pa.RecordBatch]) -> FileRecord:
        """Write a Parquet file of the table called `name` that may not fit into memory.

        Args:
            path: path inside the store.
            name: name of the table; each batch must have its columns.
            batches: the rows, in the order in which they are to be stored.

        Raises:
            StoreError: as `put`.
        """
        schema, rows = TABLES[name].schema, 0
        with self._replacing(path) as file, _parquet_writer(file, schema) as writer:
            for batch in batches:
                table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
                writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
                rows += table.num_rows
        size = self.local(path).stat().st_size
        return FileRecord(path=path, table=name, rows=rows, bytes=size, sha256=self.sha256(path))

    def get_json(self, path: str) -> Any:
        """Read a JSON file.

        Raises:
            DamagedFileError: if the file is missing or is not JSON.
        """
        try:
            return json.loads(self.local(path).read_bytes())
        except (OSError, ValueError) as error:
            raise DamagedFileError(f"cannot read {self.local(path)}: {error}.") from error

    def get_table(self, path: str) -> pa.Table:
        """Read one Parquet file, without its partition columns.

        Raises:
            DamagedFileError: if the file is missing or is not Parquet.
        """
        try:
            return pq.ParquetFile(self.local(path)).read()
        except (OSError, pa.ArrowException) as error:
            raise DamagedFileError(f"cannot read {self.local(path)}: {error}.") from error

    def sha256(self, path: str) -> str:
        """SHA-256 of a file's content, in hexadecimal."""
        with self.local(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def list(self, pattern: str) -> list[str]:
        """Paths inside the store that match a glob pattern, sorted."""
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.glob(pattern))


def _parquet_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        write_page_index=True,
        store_schema=False,
        use_compliant_nested_type=True,
    )


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds the name is on disk as well.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
