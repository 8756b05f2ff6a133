"""``actlake experts`` and ``align`` on a model into which experts and tasks are built."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ray_app.capture.workers import LocalWorkers
from ray_app.commands.ablation import Session
from ray_app.run import Run
from storage import Store, open_store

Actlake = Callable[..., tuple[int, str, str]]

NUM_EXPERTS, SIZE, WIDTH = 6, 12, 32
WORDS = {"boats": "boats wait for wind ", "sums": "seven eleven "}


@pytest.fixture
def planted(tmp_path: Path, model_folder: Callable[[str], Path]) -> tuple[Path, np.ndarray]:
    """(folder, (layers, neurons) planted experts) of a model with an expert for each task.

    Tokens that one task alone has lie along an axis of its own, and are told apart along axes that
    no row has. The rows of an expert are along one axis, with noise along axes that no token has:
    the experts 0 and 1 work for one task each, and the others for none. What attention and MLP
    write is zero, so both layers read the same.
    """
    source, folder = model_folder("llama"), tmp_path / "planted"
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    random = torch.Generator().manual_seed(0)
    axes = torch.eye(WIDTH)
    experts = []
    with torch.no_grad():
        texts = WORDS.values()
        ids = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        model.model.embed_tokens.weight[:, :20] = axes[0, :20]
        for axis, own in ((1, ids[0] - ids[1]), (2, ids[1] - ids[0])):
            model.model.embed_tokens.weight[list(own), axis] = 2
        for layer in model.model.layers:
            expert = torch.randperm(NUM_EXPERTS * SIZE, generator=random) % NUM_EXPERTS
            noise = torch.randn((NUM_EXPERTS * SIZE, WIDTH), generator=random) * 0.1
            noise[:, : NUM_EXPERTS + 1] = noise[:, 20:] = 0
            lengths = 1 + torch.rand((NUM_EXPERTS * SIZE, 1), generator=random)
            layer.mlp.up_proj.weight[:] = lengths * (axes[1 + expert] + noise)
            layer.mlp.gate_proj.weight[:] = axes[0]
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
            experts.append(expert.numpy())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, np.stack(experts)


@pytest.fixture
def capture(
    planted: tuple[Path, np.ndarray],
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    tmp_path: Path,
) -> Callable[..., str]:
    """Captures the planted model over the two tasks into tmp_path / 'store'; the run's id."""
    tasks: dict[str, Any] = {"both": {"mixture": list(WORDS)}}
    for task, words in WORDS.items():
        (tmp_path / task).mkdir()
        for index in range(12):
            (tmp_path / task / f"{index}.txt").write_text(words * (1 + index % 3))
        tasks[task] = {"files": f"{tmp_path}/{task}/*.txt"}
    sizes = {"tokens": 40, "max_length": 24, "batch_tokens": 96, "shard_tokens": 64}

    def run(*overrides: str, name: str = "planted") -> str:
        model = {"source": str(planted[0])}
        study = write_study(name=name, model=model, tasks=tasks, reference="both", capture=sizes)
        return capture_locally(study, tmp_path / "store", *overrides).id

    return run


def made(error: str) -> str:
    """The id of the analysis that a command says it made."""
    return error.split("analysis ")[1].split()[0]


def test_planted_experts_are_found_and_hold_what_their_tasks_select(
    capture: Callable[..., str], planted: tuple[Path, np.ndarray], tmp_path: Path, actlake: Actlake
) -> None:
    store_path, run = str(tmp_path / "store"), capture()
    status, output, error = actlake("experts", store_path, "--clusters", str(NUM_EXPERTS))
    assert status == 0, error
    assert len([line for line in output.splitlines() if "│ " in line]) == 2
    experts = made(error)
    _, _, error = actlake("experts", store_path, "--clusters", "6", "--method", "random")
    control = made(error)
    _, _, error = actlake("experts", store_path, "--clusters", str(NUM_EXPERTS))
    assert f"analysis {experts} was there already" in error

    store = open_store(store_path)
    by_method: dict[str, np.ndarray] = {}
    for name in (experts, control):
        rows = "select expert from clusters where analysis = $analysis order by layer, neuron"
        labels = store.table(rows, {"analysis": name})["expert"].to_numpy().reshape(2, -1)
        assert all(np.bincount(layer).tolist() == [SIZE] * NUM_EXPERTS for layer in labels)
        by_method[name] = labels
    for found, built in zip(by_method[experts], planted[1], strict=True):
        assert len(set(zip(found.tolist(), built.tolist(), strict=True))) == NUM_EXPERTS
    assert not np.array_equal(*by_method[control])

    twin = capture("model.init=random", name="twin")
    _, _, error = actlake("experts", store_path, "--run", twin, "--clusters", "7")
    of_twin, plots = made(error), tmp_path / "plots"
    sizes = store.sql(f"select smallest, largest from cluster_layers where run = '{twin}'")
    assert sizes.fetchall() == [(10, 11)] * 2
    options = "--fractions", str(1 / NUM_EXPERTS), "--plots", str(plots)
    status, output, error = actlake("align", store_path, experts, control, of_twin, *options)
    assert status == 0, error
    assert [file.suffix for file in plots.iterdir()] == [".png"]
    assert max(map(len, output.splitlines()[:-1])) <= 80
    combinations = store.sql("select experts, run, count(*) from cluster_alignment group by all")
    assert set(combinations.fetchall()) == {
        (name, of, 2 * len(WORDS)) for name in (experts, control, of_twin) for of in (run, twin)
    }
    check_alignment(store, experts, control, run)


def check_alignment(store: Store, experts: str, control: str, run: str) -> None:
    query = "from cluster_alignment where run = $run order by task, layer"
    aligned = store.table(query, {"run": run}).to_pylist()
    assert {row["num_selected"] for row in aligned} == {SIZE}
    of_planted = [row for row in aligned if row["experts"] == experts]
    assert len(of_planted) == 2 * len(WORDS)
    for row in of_planted:
        assert row["curve"] == [0, *[SIZE] * NUM_EXPERTS]
        assert row["auc"] == row["auc_best"] == (NUM_EXPERTS - 1) / NUM_EXPERTS
        assert row["ami"] == pytest.approx(1)
        assert row["p_value"] == 1 / 1001
        assert row["auc_random"] < 0.7
    for row in aligned:
        if row["experts"] == control:
            assert row["auc"] < 0.75
            assert row["p_value"] > 0.001
            assert abs(row["ami"]) < 0.2
    full = store.table(
        "from cluster_enrichment where experts = $experts and run = $run and held > 0",
        {"experts": experts, "run": run},
    ).to_pylist()
    assert len(full) == 2 * len(WORDS)
    for row in full:
        assert (row["held"], row["expected"], row["lift"]) == (SIZE, 2, NUM_EXPERTS)
        # One way out of 72 over 12 to choose the expert's neurons.
        assert row["p_value"] == pytest.approx(1 / 15363284301456, rel=1e-6)


def test_neurons_that_fire_together_are_one_expert_and_tokens_keep_it(
    capture: Callable[..., str],
    planted: tuple[Path, np.ndarray],
    tmp_path: Path,
    actlake: Actlake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_path = str(tmp_path / "store")
    run = capture("capture.coactivation={layers: [1]}", name="pairs")
    made_by_weight = {}
    for weight in ("product", "together"):
        options = "--clusters", "6", "--method", "coactivation", "--weight", weight
        status, _, error = actlake("experts", store_path, *options)
        assert status == 0, error
        made_by_weight[weight] = made(error)
    store = open_store(store_path)
    for name in made_by_weight.values():
        rows = "select layer, expert from clusters where analysis = $analysis order by neuron"
        found = store.table(rows, {"analysis": name})
        assert set(found["layer"].to_pylist()) == {1}
        labels = found["expert"].to_numpy()
        assert np.bincount(labels).tolist() == [SIZE] * NUM_EXPERTS
        # The neurons of the other experts never fire: no edge says where they belong.
        for expert in (0, 1):
            assert len(set(labels[planted[1][1] == expert])) == 1
    assert min(store.table("from cluster_layers")["inside"].to_pylist()) > 0.9

    def local(self: Session, specs_of: Any, build: Any) -> Any:
        return nullcontext(LocalWorkers(*map(build, specs_of([range(2)]))))

    monkeypatch.setattr(Session, "workers", local)
    shares = "--shares", str(1 / NUM_EXPERTS)
    options = *made_by_weight.values(), "--tasks", "boats,sums", *shares, "--tokens", "20"
    status, output, error = actlake("routing", store_path, *options)
    assert status == 0, error
    assert max(map(len, output.splitlines())) <= 80
    assert "Rise of the loss of sums (nats), " in output
    kept = store.table("from routing_layers where router = 'truth' and run = $run", {"run": run})
    assert set(kept["layer"].to_pylist()) == {1}
    assert len(kept) == 4
    twice = *made_by_weight.values(), "--layers", "0"
    status, _, error = actlake("routing", store_path, *twice)
    assert "layers must be among those that all of the experts have (1), found 0" in error


def test_mistakes_are_told_in_a_sentence(
    capture: Callable[..., str], planted: tuple[Path, np.ndarray], tmp_path: Path, actlake: Actlake
) -> None:
    store_path, run = str(tmp_path / "store"), capture()
    attention = capture("capture.sites=[attn]", name="attention")
    narrow = capture("model.init=random", name="narrow")
    record_path = tmp_path / "store" / "runs" / f"run={narrow}" / "run.json"
    record = json.loads(record_path.read_text())
    record["sites"] = [site | {"width": site["width"] - 1} for site in record["sites"]]
    record_path.write_text(json.dumps(record))

    def said(*arguments: str) -> str:
        status, _, error = actlake(*arguments)
        assert status == 2
        return " ".join(error.split())

    def experts(*options: str, of: str = run) -> str:
        return said("experts", store_path, "--run", of, *options)

    assert "clusters must be at most the number of neurons of a layer, 72 in" in experts(
        "--clusters", "73"
    )
    assert "clusters" in experts("--clusters", "0")
    assert (
        "counted no pairs of neurons of site 'mlp' in task 'both' (it counted none at all): "
        "capture with capture.coactivation: {sites: [mlp], layers: [...]}"
    ) in experts("--clusters", "6", "--method", "coactivation")
    assert "method" in experts("--clusters", "6", "--method", "metis")
    assert "must have captured site 'mlp' to have experts, found attn" in experts(
        "--clusters", "6", of=attention
    )
    names = []
    for of in (run, narrow):
        of_run = "--run", of, "--clusters", "6", "--method", "random"
        names.append(made(actlake("experts", store_path, *of_run)[2]))
    assert "of one architecture, found 2 layers of 72 neurons in" in said(
        "align", store_path, *names
    )
    assert "there are no experts 'experts-0'" in said("align", store_path, "experts-0")
    assert "selects no neuron" in said("align", store_path, names[0], "--fractions", "0.001")
    weights = planted[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert "differ from those the run was planned with" in experts("--clusters", "6")
