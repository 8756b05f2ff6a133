"""Batches hold the samples of a shard, padded on the right, and say which positions count."""

from typing import Any

import pyarrow as pa
import pytest
import torch

from ray_app.capture.modality import Language
from ray_app.capture.shards import PlannedShard, batches_of
from storage import TABLES, FileRecord


def samples(*rows: tuple[int, list[int], list[bool]]) -> pa.Table:
    """Table ``samples`` with (batch, token ids, counted) of samples 10, 11, ..."""
    records: list[dict[str, Any]] = [
        {
            "shard": 0,
            "batch": batch,
            "sample": 10 + index,
            "source": "s",
            "label": None,
            "text": "",
            "token_ids": ids,
            "tokens": [""] * len(ids),
            "is_special": [not c for c in counted],
            "counted": counted,
            "num_tokens": len(ids),
            "num_counted": sum(counted),
        }
        for index, (batch, ids, counted) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, schema=TABLES["samples"].schema)


def test_samples_of_unlike_length_are_padded_on_the_right_and_masked() -> None:
    table = samples((0, [5, 6, 7], [False, True, True]), (0, [8], [True]))
    (batch,) = batches_of(table)
    assert batch.samples.tolist() == [10, 11]
    assert batch.lengths.tolist() == [3, 1]
    assert Language().inputs(batch, is_first=True).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.counted is not None
    assert batch.counted.tolist() == [1, 2, 3]
    assert batch.num_tokens == 4


def test_samples_of_one_length_need_no_mask_and_no_choice_of_positions() -> None:
    (batch,) = batches_of(samples((0, [5, 6], [True, True]), (0, [8, 9], [True, True])))
    assert batch.attention_mask is None
    assert batch.counted is None
    assert Language().inputs(batch, is_first=True).dtype is torch.int64


def test_positions_that_do_not_count_are_left_out_even_without_padding() -> None:
    (batch,) = batches_of(samples((0, [1, 5], [False, True]), (0, [1, 6], [False, True])))
    assert batch.attention_mask is None
    assert batch.counted is not None
    assert batch.counted.tolist() == [1, 3]


def test_a_batch_without_any_counted_position_counts_none() -> None:
    (batch,) = batches_of(samples((0, [1], [False])))
    assert batch.counted is not None
    assert batch.counted.tolist() == []


def test_batches_come_in_order_and_hold_each_sample_once() -> None:
    table = samples(*((batch, [batch], [True]) for batch in (0, 0, 1, 2, 2)))
    assert [batch.samples.tolist() for batch in batches_of(table)] == [[10, 11], [12], [13, 14]]


def test_rows_of_several_chunks_are_read_like_rows_of_one() -> None:
    table = samples((0, [5, 6, 7], [False, True, True]), (0, [8], [True]))
    (whole,) = batches_of(table)
    (parts,) = batches_of(pa.concat_tables([table.slice(0, 1), table.slice(1)]))
    read = Language().inputs
    assert torch.equal(read(parts, is_first=True), read(whole, is_first=True))
    assert whole.counted is not None
    assert parts.counted is not None
    assert torch.equal(parts.counted, whole.counted)


@pytest.mark.parametrize("shard", [0, 7])
def test_a_shard_is_its_own_record(shard: int) -> None:
    file = FileRecord(path="p", table="samples", rows=1, bytes=2, sha256="3")
    planned = PlannedShard(
        task="code", shard=shard, num_samples=1, num_tokens=2, num_counted=1, num_batches=1,
        samples=file,
    )  # fmt: skip
    assert PlannedShard.from_dict(planned.to_dict()) == planned
    assert planned.key == ("code", shard)
    assert planned.counts == {
        "num_samples": 1, "num_tokens": 2, "num_counted": 1, "num_quarantined": 0,
    }  # fmt: skip
