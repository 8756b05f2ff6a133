"""Bytes on disk and the SQL over them: schema, paths, files, commits, catalog, verification."""

from storage.compaction import collect_garbage, compact_run
from storage.errors import (
    ActlakeError,
    DamagedFileError,
    QueryError,
    QueryInterruptedError,
    QueryMemoryError,
    QueryReadError,
    StoreError,
)
from storage.files import FileRecord, StoreFiles
from storage.schema import SCHEMA_VERSION, TABLES, Table
from storage.store import Store, create_store, open_store
from storage.verify import VerifyReport, verify_store

__all__ = [
    "SCHEMA_VERSION",
    "TABLES",
    "ActlakeError",
    "DamagedFileError",
    "FileRecord",
    "QueryError",
    "QueryInterruptedError",
    "QueryMemoryError",
    "QueryReadError",
    "Store",
    "StoreError",
    "StoreFiles",
    "Table",
    "VerifyReport",
    "collect_garbage",
    "compact_run",
    "create_store",
    "open_store",
    "verify_store",
]
