"""Every table of a store: columns, types, meaning and grain. They are the public contract.

Tables of a run live under ``runs/run=<run>/<table>/task=<task>/...``; tables of an analysis under
``analyses/analysis=<analysis>/``. The partition keys (run, task, analysis) are in the path, not in
the files; every Hive-aware reader adds them as columns. The tables stand in storage/tables/, by
what makes them.
"""

from collections.abc import Mapping
from types import MappingProxyType

from storage.tables.ablation import ABLATION_TABLES
from storage.tables.captured import RUN_TABLES
from storage.tables.experts import EXPERT_TABLES, ROUTING_TABLES
from storage.tables.overlap import OVERLAP_TABLES
from storage.tables.table import Table

__all__ = ["SCHEMA_VERSION", "TABLES", "Table"]

SCHEMA_VERSION = 4
"""Raised whenever a name, a type or a meaning in storage/tables/ changes."""

TABLES: Mapping[str, Table] = MappingProxyType(
    {
        table.name: table
        for table in (
            *RUN_TABLES,
            *OVERLAP_TABLES,
            *ABLATION_TABLES,
            *EXPERT_TABLES,
            *ROUTING_TABLES,
        )
    }
)
"""Every table by name."""
