"""A captured run says of every neuron and token what the original model does with the samples."""

import shutil
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.errors import AnalysisError
from analysis.pairs import neuron_pairs
from ray_app.capture.errors import CaptureError
from ray_app.capture.stage import build_stage
from ray_app.run import Run
from ray_app.study import StudyError
from storage import open_store

FAMILIES = (
    "llama llama-mha mistral qwen2 qwen3 gemma gemma2 gemma3 gpt2 gpt_neo gpt_neox opt phi phi3 "
    "olmo2"
).split()
EAGER = ("gemma2", "gpt_neo")
"""Families for which transformers has no other implementation of attention."""
SITES = [("attn", 0), ("attn", 1), ("mlp", 0), ("mlp", 1)]


def tokens_of(run: Run, task: str, column: str) -> dict[int, list[Any]]:
    """A column of table ``tokens`` for the positions after the first, by sample."""
    rows = run.store.sql(
        f"select sample, list({column} order by position) from tokens "
        "where run = $run and task = $task and position > 0 group by sample",
        {"run": run.id, "task": task},
    ).fetchall()
    return dict(rows)


def assert_moments_agree(found: dict[str, np.ndarray], z: np.ndarray, *, slack: float) -> None:
    """Compare with a two-pass reference over `z`, (positions, neurons) in float64.

    Args:
        slack: what another batch shape may change of an activation, relative to the largest
            magnitude of its neuron.
    """
    largest = np.abs(z).max(0) * slack
    mean, std = z.mean(0), z.std(0)
    assert (np.abs(mean) <= 100 * std).all(), "the tolerances below are promised up to 100"
    rms = np.sqrt(np.square(z).mean(0))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-6, atol=(1e-9 * rms + largest).max())
    for name, expected in {
        "std": std,
        "rms": rms,
        "abs": np.abs(z).mean(0),
        "sqrt": np.sqrt(np.abs(z)).mean(0),
        "pos": np.maximum(z, 0).mean(0),
        "neg": np.minimum(z, 0).mean(0),
    }.items():
        np.testing.assert_allclose(
            found[name], expected, rtol=5e-5 + 10 * slack, atol=1e-12, err_msg=name
        )


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "float32") for family in ("llama", "mistral", "gemma3", "gpt2", "opt", "phi3")),
        ("llama", "bfloat16"),
        ("llama", "float16"),
    ],
)
def test_statistics_equal_a_two_pass_reference_on_the_same_batches(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    reference_of: Callable[..., Any],
    neurons_of: Callable[..., Any],
    family: str,
    dtype: str,
) -> None:
    run = capture_locally(write_study(family=family), None, f"model.dtype={dtype}")
    for task, reference in reference_of(run, one_by_one=False).items():
        for site, layer in SITES:
            z = torch.cat(reference.activations[site, layer]).double().numpy()
            found = neurons_of(run, task, site, layer)
            assert (found["n"] == 160).all()
            np.testing.assert_array_equal(np.rint(found["freq"] * 160), (z > 0).sum(0))
            np.testing.assert_array_equal(np.rint(found["nonzero"] * 160), (z != 0).sum(0))
            np.testing.assert_array_equal(found["min"], z.min(0))
            np.testing.assert_array_equal(found["max"], z.max(0))
            assert_moments_agree(found, z, slack=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_samples_equal_samples_one_by_one(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    reference_of: Callable[..., Any],
    neurons_of: Callable[..., Any],
    family: str,
) -> None:
    attention = "eager" if family in EAGER else "sdpa"
    run = capture_locally(write_study(family=family), None, f"model.attention={attention}")
    sizes = run.store.sql("select count(*) from samples group by task, shard, batch").fetchall()
    assert max(sizes) > (2,), "samples must share batches for the test to mean something"
    for task, reference in reference_of(run, one_by_one=True).items():
        for column in ("top1", "top10"):
            assert tokens_of(run, task, column) == getattr(reference, column)
        losses = tokens_of(run, task, "loss")
        assert losses.keys() == reference.losses.keys()
        for sample, expected in reference.losses.items():
            np.testing.assert_allclose(losses[sample], expected, rtol=0, atol=2e-4)
        for site, layer in SITES:
            z = torch.cat(reference.activations[site, layer]).double().numpy()
            found = neurons_of(run, task, site, layer)
            assert (found["n"] == len(z)).all()
            scale = np.abs(z).max()
            np.testing.assert_allclose(found["min"], z.min(0), rtol=0, atol=1e-5 * scale)
            np.testing.assert_allclose(found["max"], z.max(0), rtol=0, atol=1e-5 * scale)
            assert_moments_agree(found, z, slack=1e-5)


@pytest.mark.parametrize("special_tokens", ["exclude", "include"])
def test_special_tokens_are_in_tokens_and_count_only_if_asked(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    neurons_of: Callable[..., Any],
    special_tokens: str,
) -> None:
    run = capture_locally(write_study(), None, f"capture.special_tokens={special_tokens}")
    included = special_tokens == "include"
    store = run.store
    first = store.sql(
        "select distinct token_id, token, is_special, counted, loss, top1, top10 "
        "from tokens where position = 0"
    ).fetchall()
    assert first == [(0, "<s>", True, included, None, None, None)]
    later = store.sql(
        "select distinct is_special, counted, loss is null from tokens where position > 0"
    ).fetchall()
    assert later == [(False, True, False)]
    for task, tokens, samples in store.sql(
        "select task, count(*), count(distinct sample) from tokens group by task"
    ).fetchall():
        assert tokens == 160 + (0 if included else samples)
        assert set(neurons_of(run, task, "attn", 1)["n"]) == {160}


def test_pooled_values_equal_a_reference_on_the_same_batches(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    reference_of: Callable[..., Any],
) -> None:
    run = capture_locally(write_study(), None, "capture.pooled=[mean, max]")
    for task, reference in reference_of(run, one_by_one=False).items():
        bounds = np.cumsum(list(reference.num_counted.values()))[:-1]
        for site, layer in SITES:
            z = np.split(torch.cat(reference.activations[site, layer]).double().numpy(), bounds)
            expected = dict(zip(reference.num_counted, z, strict=True))
            found = run.store.sql(
                "select sample, list(max order by neuron), list(mean order by neuron) "
                "from pooled_activations where task = $task and site = $site and layer = $layer "
                "group by sample",
                {"task": task, "site": site, "layer": layer},
            ).fetchall()
            assert {row[0] for row in found} == expected.keys()
            for sample, largest, mean in found:
                np.testing.assert_array_equal(largest, expected[sample].max(0))
                np.testing.assert_allclose(mean, expected[sample].mean(0), rtol=1e-6, atol=1e-7)


def test_pairs_of_neurons_equal_a_reference_on_the_same_batches(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    reference_of: Callable[..., Any],
) -> None:
    pairs = "capture.coactivation={sites: [attn, mlp], layers: [1]}"
    run = capture_locally(write_study(), None, pairs)
    for task, reference in reference_of(run, one_by_one=False).items():
        for site in ("attn", "mlp"):
            z = torch.cat(reference.activations[site, 1]).double().numpy()
            found = neuron_pairs(run.store, run.id, task, site, 1)
            active = (z > 0).astype(np.int64)
            assert found.n == len(z)
            np.testing.assert_array_equal(found.together, active.T @ active)
            np.testing.assert_array_equal(found.product, found.product.T)
            scale = np.sqrt(np.square(z).sum(0))
            np.testing.assert_allclose(
                found.product, z.T @ z, rtol=0, atol=1e-6 * np.outer(scale, scale).max()
            )
            expected = np.corrcoef(z.T)
            np.testing.assert_allclose(found.correlation, expected, rtol=0, atol=2e-5)
            rows = run.store.sql(
                "select together, expected, lift, correlation from neuron_pairs "
                "where task = $task and site = $site and layer = 1 order by neuron, other",
                {"task": task, "site": site},
            ).fetchnumpy()
            together, share = (active.T @ active) / len(z), active.mean(0)
            np.testing.assert_allclose(rows["together"], together.flatten())
            np.testing.assert_allclose(rows["expected"], np.outer(share, share).flatten())
            np.testing.assert_allclose(rows["correlation"], expected.flatten(), atol=2e-5)
    with pytest.raises(
        AnalysisError,
        match=r"counted no pairs of neurons of site 'mlp', layer 0, in task 'code' \(it counted "
        r"code: attn \[1\], code: mlp \[1\], .*: capture with capture\.coactivation: \{sites: "
        r"\[mlp\], layers: \[0\]\}\.",
    ):
        neuron_pairs(run.store, run.id, "code", "mlp", 0)
    with pytest.raises(
        StudyError,
        match=r"capture\.coactivation must name sites and layers that are captured, found site "
        r"'mlp' of layer 7; captured layers of that site are: 0, 1\.",
    ):
        capture_locally(write_study(), None, "capture.coactivation={layers: [7]}")


def test_heads_are_blocks_of_the_attention_site_and_absent_at_the_mlp(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    neurons_of: Callable[..., Any],
) -> None:
    run = capture_locally(write_study(family="qwen3"))
    heads = neurons_of(run, "code", "attn", 0)["head"]
    np.testing.assert_array_equal(heads, np.repeat(np.arange(4), 16))
    (absent,) = run.store.sql("select count(head) from stats where site = 'mlp'").fetchall()
    assert absent == (0,)


def spoil(folder: Path, target: Path, tensor: str, row: int, value: float) -> Path:
    """A copy of a model whose tensor has a value in one row."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    weights[tensor][row] = value
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(("value", "dtype"), [(nan, "float32"), (inf, "float32"), (6e4, "float16")])
def test_an_activation_that_is_not_finite_stops_the_run_and_names_the_neuron(
    tmp_path: Path,
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    model_folder: Callable[[str], Path],
    value: float,
    dtype: str,
) -> None:
    model = spoil(
        model_folder("llama"), tmp_path / "model", "model.layers.1.mlp.up_proj.weight", 5, value
    )
    study = write_study(model={"source": str(model), "dtype": dtype})
    with pytest.raises(
        CaptureError,
        match=r"sample \d+ \(.*\.txt\) in shard 0 of task 'code' fails, because neuron 5 of site "
        r"'mlp', layer 1, is NaN, infinite or too large to square at position \d+: .* try "
        r"model\.dtype: bfloat16 or float32\..* capture\.max_quarantined is 0: remove the cause",
    ):
        capture_locally(study)
    store = open_store(tmp_path / "store")
    assert store.sql("from commits").fetchall() == []
    assert store.sql("from stats").fetchall() == []


def test_logits_that_overflow_stop_the_run_and_name_the_position(
    tmp_path: Path,
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    model_folder: Callable[[str], Path],
) -> None:
    # The last norm has no neurons behind it that could tell.
    model = spoil(model_folder("gpt2"), tmp_path / "model", "transformer.ln_f.bias", 0, inf)
    study = write_study(model={"source": str(model)})
    with pytest.raises(
        CaptureError,
        match=r"sample \d+ .* of task 'code' fails, because the loss of position 1 is not finite: "
        r"the model's logits overflow; try model\.dtype",
    ):
        capture_locally(study, None, "capture.sites=[mlp]")
    assert open_store(tmp_path / "store").sql("from commits").fetchall() == []


def test_a_stage_that_missed_a_batch_refuses_to_write_the_shard(
    write_study: Callable[..., Path], begin_locally: Callable[..., Run]
) -> None:
    run = begin_locally(write_study(), None, "capture.batch_tokens=24")
    stage = build_stage(run.stage_spec())
    shard, other = run.shards[:2]
    stage.step(shard, 0)
    for wrong in (lambda: stage.finish(shard), lambda: stage.step(shard, 2)):
        with pytest.raises(CaptureError, match=r"shard 0 of task 'code' was interrupted before"):
            wrong()
    stage.step(other, 0)
    with pytest.raises(CaptureError, match="it must be computed again from its first batch"):
        stage.step(shard, 1)


def test_weights_that_changed_since_the_plan_are_refused(
    tmp_path: Path,
    write_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    model_folder: Callable[[str], Path],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder("llama"), model)
    run = begin_locally(write_study(model={"source": str(model)}))
    shutil.rmtree(model)
    spoil(model_folder("llama"), model, "model.norm.weight", 0, 2.0)
    with pytest.raises(
        CaptureError, match=r"differ from those the run was planned with .* restore"
    ):
        build_stage(run.stage_spec())
