"""GGUF files are unpacked once per machine, whole or not at all, whoever is killed meanwhile."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from ray_app.models.gguf import unpack_gguf
from ray_app.models.loading import ModelError, load_config, load_model, load_tokenizer, locate_model
from ray_app.study import ModelSettings

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF keeps the two halves that rotary embeddings turn row by row instead of one by one."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, path: Path) -> None:
    """Write a tiny Llama of safetensors as the GGUF file that llama.cpp would make of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (len(bpe["vocab"]) - 2))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
        "output": model.lm_head.weight,
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for name, short in NAMES.items():
            weight = layer.get_submodule(name).weight
            if short in heads:
                weight = interleaved(weight, heads[short])
            tensors[f"blk.{index}.{short}"] = weight
    for name, weight in tensors.items():
        writer.add_tensor(f"{name}.weight", weight.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(
    tmp_path: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A tiny Llama as GGUF, and an empty cache."""
    monkeypatch.setenv("ACTLAKE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(model_folder("llama"), path)
    return path


def unpacked(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_an_unpacked_model_computes_what_the_original_does(
    gguf_file: Path, model_folder: Callable[[str], Path]
) -> None:
    settings = ModelSettings(source=str(gguf_file))
    files = locate_model(settings)
    model = load_model(settings, files)
    original = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    tokenizer = load_tokenizer(settings, files)
    ids = torch.tensor([tokenizer("def merge ( left , right )")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert load_config(settings, files).architectures == ["LlamaForCausalLM"]


def test_a_file_is_unpacked_once(gguf_file: Path, tmp_path: Path) -> None:
    folder = unpack_gguf(gguf_file, "a" * 64)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert unpack_gguf(gguf_file, "a" * 64) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert unpacked(tmp_path) == [folder.name]


def test_a_changed_file_is_another_model(gguf_file: Path, tmp_path: Path) -> None:
    settings = ModelSettings(source=str(gguf_file))
    before = locate_model(settings)
    content = bytearray(gguf_file.read_bytes())
    content[-1] ^= 1
    gguf_file.write_bytes(content)
    after = locate_model(settings)
    assert after.fingerprint != before.fingerprint
    assert after.name != before.name
    assert len(unpacked(tmp_path)) == 2
    old, new = (load_model(settings, files).state_dict() for files in (before, after))
    assert [name for name in old if not torch.equal(old[name], new[name])] != []


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.2, 0.5, 0.99])
def test_a_truncated_file_is_refused_and_leaves_nothing(
    gguf_file: Path, tmp_path: Path, share: float
) -> None:
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ModelError,
        match=r"the GGUF file of model\.source '.*tiny\.gguf' cannot be loaded: "
        ".+; the file may be incomplete or not a model: fetch it again",
    ):
        locate_model(ModelSettings(source=str(gguf_file)))
    assert unpacked(tmp_path) == []


UNPACK = """
import pathlib, sys
from ray_app.models import gguf
path, digest = pathlib.Path(sys.argv[1]), "b" * 64
unpack = gguf._unpack

def say(*args):
    print("unpacking", flush=True)
    unpack(*args)
    if sys.argv[2] == "hang":
        print("written", flush=True)
        sys.stdin.read()

gguf._unpack = say
print("found", gguf.unpack_gguf(path, digest), flush=True)
"""


def start_unpacking(gguf_file: Path, how: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", UNPACK, str(gguf_file), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_of_two_processes_one_unpacks_and_a_killed_one_leaves_the_work_to_the_other(
    gguf_file: Path, tmp_path: Path
) -> None:
    killed = start_unpacking(gguf_file, "hang")
    with killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "unpacking\n"
        with start_unpacking(gguf_file, "finish") as waiting:
            assert killed.stdout.readline() == "written\n"
            assert waiting.stdout is not None
            (leftover,) = unpacked(tmp_path)
            assert leftover.startswith(".gguf-")
            assert waiting.poll() is None
            killed.kill()
            output = waiting.stdout.read()
    folder = tmp_path / "cache" / f"gguf-{'b' * 16}-{transformers.__version__}"
    assert output == f"unpacking\nfound {folder}\n"
    assert unpacked(tmp_path) == [folder.name]
    assert (folder / "model.safetensors").is_file()
