"""A captured run of a model whose neurons are known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml

from ray_app.run import Run

CYCLES = {"a": 0, "b": 1}
"""Tasks of the model whose neurons are known, and the layer that holds the neurons of each."""
LENGTH = 8
"""Tokens of a task's cycle, and so neurons that carry it."""
WIDTH = 24


@pytest.fixture
def carriers() -> dict[str, np.ndarray]:
    """By task, the MLP neurons that carry it: all of them in the layer of `CYCLES`."""
    random = np.random.default_rng(5)
    return {task: np.sort(random.permutation(WIDTH)[:LENGTH]) for task in CYCLES}


@pytest.fixture
def known_run(
    tmp_path: Path, carriers: dict[str, np.ndarray], capture_locally: Callable[..., Run]
) -> Run:
    """A run of a model that knows two cycles of tokens by heart, with one neuron for each step.

    Task a walks the cycle a0 a1 ... a7 a0 ..., task b its own; whatever the current token is, one
    neuron of the task's layer fires and writes the next one. Everything else is silent.
    """
    names = ["<s>", "</s>", *(f"{task}{step}" for task in CYCLES for step in range(LENGTH))]
    config = transformers.LlamaConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(layer.mlp, name).weight.zero_()
        identity = torch.eye(len(names), 32)
        model.model.embed_tokens.weight.copy_(identity)
        model.lm_head.weight.copy_(identity)
        for task, index in CYCLES.items():
            mlp = model.model.layers[index].mlp
            for step, neuron in enumerate(carriers[task]):
                now, after = (names.index(f"{task}{n % LENGTH}") for n in (step, step + 1))
                mlp.gate_proj.weight[neuron, now] = mlp.up_proj.weight[neuron, now] = 1
                mlp.down_proj.weight[after, neuron] = 1
    words = tokenizers.models.WordLevel({name: index for index, name in enumerate(names)}, "</s>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    model.save_pretrained(tmp_path / "known")
    fast.save_pretrained(tmp_path / "known")
    for task in CYCLES:
        (tmp_path / task).mkdir()
        for number in range(LENGTH * 3):
            steps = range(number, number + LENGTH + 1)
            text = " ".join(f"{task}{step % LENGTH}" for step in steps)
            (tmp_path / task / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    study = {
        "name": "known",
        "model": {"source": str(tmp_path / "known")},
        "tasks": {
            **{task: {"files": f"{tmp_path}/{task}/*.txt"} for task in CYCLES},
            "both": {"mixture": list(CYCLES)},
        },
        "reference": "both",
        "capture": {"tokens": 72, "max_length": 64, "batch_tokens": 40, "shard_tokens": 40},
    }
    path = tmp_path / "known.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return capture_locally(path)
