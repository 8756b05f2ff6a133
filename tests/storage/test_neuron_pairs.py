"""Pairs of neurons merge over shards, and one that never changes correlates with nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.pairs import neuron_pairs
from storage import layout


def test_pairs_merge_and_what_never_changes_correlates_with_nothing(
    builder: Any, activations: Callable[..., Any]
) -> None:
    shards = []
    for shard in range(3):
        z = activations(shard)
        z["mlp", 1][:, 0] = 0  # Dead.
        z["mlp", 1][:, 1] = 0.1  # Always the same, and no power of two.
        files = builder.add_shard("code", shard, z, commit=False)
        x = z["mlp", 1].astype(np.float64)
        shards.append(x)
        rows = pa.table(
            {
                "shard": pa.array([shard] * 6, pa.int32()),
                "site": ["mlp"] * 6,
                "layer": pa.array([1] * 6, pa.int16()),
                "neuron": np.arange(6, dtype=np.int32),
                "head": pa.nulls(6, pa.int16()),
                "n": [len(x)] * 6,
                "together": ((x > 0).T.astype(np.int32) @ (x > 0)).tolist(),
                "product": (x.T @ x).tolist(),
            }
        )
        path = layout.part_path("run-1", "coactivation", "code", shard, 0)
        builder.commit(
            "code", shard, [*files, builder.store.files.put_table(path, "coactivation", rows)]
        )
    store = builder.finish()
    x = np.concatenate(shards)
    found = store.sql("from neuron_pairs order by neuron, other").fetchnumpy()
    together, correlation = (
        np.ma.asarray(found[n]).reshape(6, 6) for n in ("together", "correlation")
    )
    np.testing.assert_allclose(together, (x > 0).T.astype(float) @ (x > 0) / len(x))
    assert correlation.mask[:2].all()
    assert correlation.mask[:, :2].all()
    np.testing.assert_allclose(correlation[2:, 2:], np.corrcoef(x[:, 2:].T), atol=1e-12)
    matrices = neuron_pairs(store, "run-1", "code", "mlp", 1)
    assert np.isnan(matrices.correlation[:2]).all()
    np.testing.assert_allclose(matrices.correlation[2:, 2:], correlation[2:, 2:], atol=1e-12)
