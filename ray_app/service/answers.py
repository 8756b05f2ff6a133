"""Rows as the bytes of an answer: JSON, CSV or an Arrow stream, cut at most rows and most bytes."""

import base64
import csv
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any, Literal

import pyarrow as pa

from storage import QueryError, QueryMemoryError
from storage.catalog import RowStream

__all__ = ["Answer", "Format", "json_ready", "render_rows"]

Format = Literal["json", "csv", "arrow"]
Truncated = Literal["no", "rows", "bytes"]

_LARGEST_EXACT = 2**53
"""Integers beyond this are not exact in JavaScript, so they are sent as text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A body, and what its headers say."""

    media_type: str
    """Value of Content-Type."""
    body: bytes
    """The bytes."""
    num_rows: int = 0
    """Rows of a query that are in it."""
    truncated: Truncated = "no"
    """Whether there were more: it was cut at the most rows, or at the most bytes."""
    elapsed_ms: float = 0.0
    """Milliseconds that making it took."""


def json_ready(value: Any) -> Any:
    """A value of a table as JSON has it.

    Integers beyond 2^53 and decimals become text, as do NaN and the infinities; times are ISO 8601;
    bytes are base64; lists and structs are kept.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _LARGEST_EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else _not_finite(value)
    if isinstance(value, datetime | date | time_of_day):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, pa.MonthDayNano):
        return f"{value.months} months {value.days} days {value.nanoseconds / 1e9:g} seconds"
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, Decimal | timedelta):
        return str(value)
    return str(value)


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def render_rows(
    rows: RowStream,
    form: Format,
    *,
    max_rows: int,
    max_bytes: int,
    since: float,
) -> Answer:
    """The answer of a query.

    Args:
        rows: its rows, of which no more are read than fit.
        form: how to write them.
        max_rows: most rows.
        max_bytes: most bytes of names, types and rows; of Arrow, in memory.
        since: when the query began, by `time.perf_counter`.

    Raises:
        QueryError: if a value cannot be written in this form.
        QueryMemoryError: if the names and types of the columns alone take more than `max_bytes`.
    """
    if form == "arrow":
        return _arrow(rows, max_rows, max_bytes, since)
    if form == "csv":
        start = _csv_line([name for name, _ in rows.columns])
    else:
        columns = [{"name": name, "type": dtype} for name, dtype in rows.columns]
        start = json.dumps(columns).encode()
    room = _room_for_rows(max_bytes, len(start))
    lines, truncated = _capped(_lines(rows.batches, form), max_rows, room)
    elapsed = 1000 * (time.perf_counter() - since)
    if form == "csv":
        return Answer("text/csv; charset=utf-8", b"".join([start, *lines]), len(lines), truncated,
                      elapsed)  # fmt: skip
    end = {"num_rows": len(lines), "truncated": truncated, "elapsed_ms": round(elapsed, 3)}
    body = b"".join(
        [
            b'{"columns": ', start, b', "rows": [', b",\n".join(lines), b"], ",
            json.dumps(end)[1:].encode(),
        ]
    )  # fmt: skip
    return Answer("application/json", body, len(lines), truncated, elapsed)


def _room_for_rows(max_bytes: int, head_bytes: int) -> int:
    if head_bytes > max_bytes:
        raise QueryMemoryError(
            f"names and types of the columns must take at most {max_bytes} bytes, found "
            f"{head_bytes}: ask for fewer columns, or for shorter names."
        )
    return max_bytes - head_bytes


def _lines(batches: Iterator[pa.RecordBatch], form: Format) -> Iterator[bytes]:
    """Each row as a line of bytes."""
    write = _csv_line if form == "csv" else _json_line
    for batch in batches:
        try:
            columns = [map(json_ready, column.to_pylist()) for column in batch.columns]
            yield from map(write, zip(*columns, strict=True))
        except (ValueError, OverflowError) as error:
            raise QueryError(
                f"a value cannot be written as {form} ({error}): cast its column to varchar."
            ) from error


def _json_line(row: Sequence[Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _csv_line(row: Sequence[Any]) -> bytes:
    text = io.StringIO()
    nested = [
        json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell
        for cell in row
    ]
    csv.writer(text, lineterminator="\n").writerow(nested)
    return text.getvalue().encode("utf-8", "replace")


def _capped(lines: Iterator[bytes], max_rows: int, max_bytes: int) -> tuple[list[bytes], Truncated]:
    kept: list[bytes] = []
    size = 0
    for line in lines:
        if len(kept) == max_rows:
            return kept, "rows"
        size += len(line)
        if size > max_bytes:
            return kept, "bytes"
        kept.append(line)
    return kept, "no"


def _arrow(rows: RowStream, max_rows: int, max_bytes: int, since: float) -> Answer:
    # Fields of structs are counted too: the serialised schema is what the stream begins with.
    room = _room_for_rows(max_bytes, rows.schema.serialize().size)
    sink = pa.BufferOutputStream()
    count, size = 0, 0
    truncated: Truncated = "no"
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        for batch in rows.batches:
            kept = batch.slice(0, max_rows - count)
            if kept.num_rows < batch.num_rows:
                truncated = "rows"
            fitting = _fitting(kept, room - size)
            if fitting < kept.num_rows:
                truncated, kept = "bytes", kept.slice(0, fitting)
            writer.write_batch(kept)
            count, size = count + kept.num_rows, size + kept.nbytes
            if truncated != "no":
                break
    elapsed = 1000 * (time.perf_counter() - since)
    media_type = "application/vnd.apache.arrow.stream"
    return Answer(media_type, sink.getvalue().to_pybytes(), count, truncated, elapsed)


def _fitting(batch: pa.RecordBatch, max_bytes: int) -> int:
    """How many of the first rows of a batch take no more than so many bytes."""
    if batch.nbytes <= max_bytes:
        return int(batch.num_rows)
    few, many = 0, int(batch.num_rows)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if batch.slice(0, middle).nbytes <= max_bytes else (few, middle)
    return few
