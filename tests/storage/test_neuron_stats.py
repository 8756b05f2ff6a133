"""neuron_stats merges any split into shards to the statistics of one float64 two-pass reference."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import Store

WIDTH = 4

# Neurons with |mean| / std from 0 to 100, and one that is mostly zero, as after a ReLU.
LOCATIONS = st.sampled_from([0.0, 0.5, -3.0, 30.0, -100.0, 100.0])
SCALES = st.sampled_from([1.0, 1e-3, 1e4])


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Activations (positions, WIDTH) float32, and the lengths of the shards they are split into."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = random.normal(size=(sum(lengths), WIDTH))
    columns = [(z[:, neuron] + draw(LOCATIONS)) * draw(SCALES) for neuron in range(WIDTH - 1)]
    columns.append(np.maximum(z[:, -1] - 1, 0))
    return np.stack(columns, axis=1).astype(np.float32), lengths


def reference(z: np.ndarray) -> dict[str, np.ndarray]:
    x = z.astype(np.float64)
    return {
        "mean": x.mean(0),
        "std": np.sqrt(((x - x.mean(0)) ** 2).mean(0)),
        "rms": np.sqrt((x**2).mean(0)),
        "abs": np.abs(x).mean(0),
        "sqrt": np.sqrt(np.abs(x)).mean(0),
        "pos": x.clip(min=0).mean(0),
        "neg": x.clip(max=0).mean(0),
    }


@settings(max_examples=25, deadline=None)
@given(split=splits())
def test_any_split_into_shards_merges_to_the_two_pass_reference(
    new_builder: Callable[[Path], Any], split: tuple[np.ndarray, list[int]]
) -> None:
    z, lengths = split
    with tempfile.TemporaryDirectory() as folder:
        builder = new_builder(Path(folder))
        for shard, part in enumerate(np.split(z, np.cumsum(lengths)[:-1])):
            builder.add_shard("task", shard, {("mlp", 3): part})
        found = builder.finish().sql("select * from neuron_stats order by neuron").fetchnumpy()
    assert found["neuron"].tolist() == list(range(WIDTH))
    assert found["n"].tolist() == [len(z)] * WIDTH
    assert found["min"].tolist() == z.min(0).tolist()
    assert found["max"].tolist() == z.max(0).tolist()
    assert found["freq"].tolist() == ((z > 0).sum(0) / len(z)).tolist()
    assert found["nonzero"].tolist() == ((z != 0).sum(0) / len(z)).tolist()
    expected = reference(z)
    np.testing.assert_allclose(found["std"] ** 2, expected["std"] ** 2, rtol=1e-4, atol=1e-12)
    for name in ("mean", "rms", "abs", "sqrt", "pos", "neg"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_mean_a_hundred_times_the_deviation_keeps_the_variance(builder: Any) -> None:
    random = np.random.default_rng(0)
    z = (100 + random.normal(size=(20_000, 8))).astype(np.float32)
    for shard, part in enumerate(np.split(z, 10)):
        builder.add_shard("task", shard, {("mlp", 0): part})
    found = builder.finish().sql("select std from neuron_stats order by neuron").fetchnumpy()
    np.testing.assert_allclose(found["std"] ** 2, z.astype(np.float64).var(0), rtol=1e-9)


def test_the_same_question_gets_the_same_last_digit_every_time(builder: Any) -> None:
    random = np.random.default_rng(0)
    for shard in range(12):
        z = random.lognormal(size=(50, 3000)).astype(np.float32)
        builder.add_shard("task", shard, {("mlp", 0): z, ("mlp", 1): z[:, :2000]})
    store = builder.finish()
    query = "select * from neuron_stats order by site, layer, neuron"
    first = store.sql(query).to_arrow_table()
    for threads in (1, 2, 4, 2, 4):
        again = store.connect(threads=threads).sql(query).to_arrow_table()
        assert again.equals(first)


def test_tasks_sites_and_layers_are_kept_apart(store: Store) -> None:
    rows = store.sql(
        "select task, site, layer, count(*), any_value(n) from neuron_stats group by all"
    )
    assert sorted(rows.fetchall()) == [
        (task, site, layer, width, n)
        for task, n in (("code", 60), ("mixed", 30))
        for site, width in (("attn", 4), ("mlp", 6))
        for layer in (0, 1)
    ]
    heads = store.sql("select distinct site, neuron, head from neuron_stats order by all")
    assert heads.fetchall() == [
        *(("attn", neuron, neuron // 2) for neuron in range(4)),
        *(("mlp", neuron, None) for neuron in range(6)),
    ]


# Importance by the formulas that analysis uses, each from the sufficient statistics alone.
FORMULAS = {
    "abs": lambda s: s["abs_sum"] / s["n"],
    "sqrt": lambda s: s["sqrt_sum"] / s["n"],
    "freq": lambda s: s["pos_count"] / s["n"],
    "mean": lambda s: s["sum"] / s["n"],
    "rms": lambda s: np.sqrt(s["square_sum"] / s["n"]),
    "std": lambda s: np.sqrt(s["square_sum"] / s["n"] - (s["sum"] / s["n"]) ** 2),
}
KEYS = ["task", "site", "layer", "neuron"]
SUMS = ["n", "abs_sum", "sqrt_sum", "pos_count", "sum", "square_sum"]


def merged_by_polars(store: Store) -> pd.DataFrame:
    files = f"{store.files.root}/runs/*/stats/*/*/*.parquet"
    mean, n = pl.col("mean"), pl.col("n")
    frame = pl.scan_parquet(files, hive_partitioning=True).with_columns(
        sum=n * mean, square_sum=pl.col("m2") + n * mean**2
    )
    return frame.group_by(KEYS).agg(pl.col(SUMS).sum()).sort(KEYS).collect().to_pandas()


def merged_by_pandas(store: Store) -> pd.DataFrame:
    frame = pd.read_parquet(f"{store.files.root}/runs/run=run-1/stats")
    frame["task"] = frame["task"].astype(str)
    frame["sum"] = frame["n"] * frame["mean"]
    frame["square_sum"] = frame["m2"] + frame["n"] * frame["mean"] ** 2
    return frame.groupby(KEYS, as_index=False)[SUMS].sum().sort_values(KEYS)


@pytest.mark.parametrize("merge", [merged_by_pandas, merged_by_polars])
def test_importance_is_the_same_from_sql_and_from_the_files_alone(
    store: Store, merge: Callable[[Store], Any]
) -> None:
    sql = store.sql(f"select * from neuron_stats order by {', '.join(KEYS)}").df()
    merged = merge(store)
    assert len(merged) == 40
    assert merged[KEYS].to_numpy().tolist() == sql[KEYS].to_numpy().tolist()
    for metric, formula in FORMULAS.items():
        np.testing.assert_allclose(formula(merged), sql[metric], rtol=1e-10, err_msg=metric)
