"""The tables are a public contract: every column is documented and has a type for every reader."""

from pathlib import Path

import pyarrow as pa
import pytest

from storage import TABLES, Table, create_store
from storage.sqlfiles import load_query
from storage.views import VIEWS


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_column_has_a_doc(table: Table) -> None:
    docs = table.column_docs()
    assert list(docs) == [*table.partitions, *table.schema.names]
    undocumented = [name for name, doc in docs.items() if not doc.strip()]
    assert undocumented == []
    assert table.purpose.endswith(".")
    assert table.grain.startswith("one row per ")


def test_a_column_without_a_doc_is_noticed() -> None:
    schema = pa.schema([pa.field("x", pa.int32())])
    table = Table(name="t", owner="run", purpose="A table.", grain="one row per x", schema=schema)
    with pytest.raises(TypeError):
        table.column_docs()


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_partition_keys_are_not_columns_of_the_file_too(table: Table) -> None:
    assert set(table.partitions).isdisjoint(table.schema.names)


def test_a_column_of_numbers_has_the_same_type_in_every_table() -> None:
    types: dict[str, set[str]] = {}
    for table in TABLES.values():
        for field in table.schema:
            if not pa.types.is_list(field.type):  # Table samples holds the columns of tokens.
                types.setdefault(field.name, set()).add(str(field.type))
    assert {name: found for name, found in types.items() if len(found) > 1} == {}


@pytest.mark.parametrize("view", [view for view in VIEWS if view not in TABLES])
def test_every_column_of_every_view_is_explained(tmp_path: Path, view: str) -> None:
    columns = create_store(tmp_path).sql(f"from {view}").columns
    explained = load_query("storage", view).columns
    assert list(explained) == columns
    assert all(explained.values())
