"""Tiny real models, texts and studies, made offline from what Python itself carries."""

import inspect
import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import pytest
import tokenizers
import torch
import transformers
import yaml
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ray_app.capture import driver
from ray_app.capture.stage import build_stage
from ray_app.capture.workers import LocalWorkers
from ray_app.plan import inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run, begin_run, find_run
from ray_app.study import load_study
from storage import create_store

pytest_plugins = ["vision_fixtures"]

# How long an example takes says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make long` asks for the long forms of slow tests."""
    parser.addoption("--long", action="store_true", help="run slow tests in their long form")


@pytest.fixture(scope="session")
def long_form(request: pytest.FixtureRequest) -> bool:
    """Whether slow tests run in their long form."""
    return bool(request.config.getoption("--long"))


WORDS = {
    "code": "def merge ( left , right ) : return [ * left , * right ] if left else right".split(),
    "prose": "the lake lies still in the morning and the boats wait for wind".split(),
    "numbers": "one two three four five six seven eight nine ten eleven twelve".split(),
}


def make_documents(task: str, count: int) -> list[str]:
    """Documents of differing length that only depend on the arguments."""
    words = WORDS[task]
    return [
        " ".join(words[(start * 7 + step * (1 + start % 3)) % len(words)] for step in range(length))
        for start, length in enumerate(5 + (11 * n) % 40 for n in range(count))
    ]


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts <s> before every text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([inspect.getsource(json), *map(" ".join, WORDS.values())], trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>"
    )


_SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GATED = _SMALL | {"intermediate_size": 72}
_GROUPED = _GATED | {"num_key_value_heads": 2}
# Shorter than the longest samples, so that what a window hides is tested too.
_WINDOW = {"sliding_window": 8}
_ALTERNATING = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GROUPED),
    "llama-mha": transformers.LlamaConfig(**_GATED),
    "mistral": transformers.MistralConfig(**_GROUPED, **_WINDOW, head_dim=16),
    "qwen2": transformers.Qwen2Config(**_GROUPED),
    "qwen3": transformers.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma": transformers.GemmaConfig(**_GROUPED, head_dim=16),
    "gemma2": transformers.Gemma2Config(**_GROUPED, **_ALTERNATING, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(**_GROUPED, **_ALTERNATING, head_dim=16),
    "gpt2": transformers.GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=400, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]], window_size=8, bos_token_id=0, eos_token_id=1,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**_GATED),
    "opt": transformers.OPTConfig(
        **_SMALL, ffn_dim=72, word_embed_proj_dim=32
    ),
    "phi": transformers.PhiConfig(**_GATED),
    "phi3": transformers.Phi3Config(**_GROUPED),
    "olmo2": transformers.Olmo2Config(**_GROUPED),
}  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: transformers.PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """Gives the folder of a tiny model of a family, with weights large enough to tell it apart."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.15)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a filesystem of a size such as '32k', which fills up as a disk does."""
    folder = tmp_path / "disk"
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            reason = done.stderr.strip()
            pytest.skip(f"mounting a tmpfs needs rights that this user lacks: {reason}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A folder with one sub-folder of text files for each of the three tasks."""
    for task in WORDS:
        folder = tmp_path / "texts" / task
        folder.mkdir(parents=True)
        for index, text in enumerate(make_documents(task, 24)):
            (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "texts"


@pytest.fixture
def write_study(
    tmp_path: Path, text_folder: Path, model_folder: Callable[[str], Path]
) -> Callable[..., Path]:
    """Writes a small study; keyword arguments replace its top-level keys."""

    def write(*, family: str = "llama", file_name: str = "study.yaml", **changes: Any) -> Path:
        study: dict[str, Any] = {
            "name": "tiny",
            "model": {"source": str(model_folder(family))},
            "tasks": {
                **{task: {"files": f"{text_folder}/{task}/*.txt"} for task in WORDS},
                "mixed": {"mixture": list(WORDS)},
            },
            "reference": "mixed",
            "capture": {
                "tokens": 160,
                "max_length": 24,
                "batch_tokens": 96,
                "shard_tokens": 64,
            },
        }
        path = tmp_path / file_name
        path.write_text(yaml.safe_dump(study | changes), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3-compatible server that runs as long as the tests do."""
    log = tmp_path_factory.mktemp("s3") / "server.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a new bucket; the environment has endpoint and credentials."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return name


def _open_apart(opened: Callable[..., MemoryFile]) -> Callable[..., MemoryFile]:
    """Gives each reader a file of its own; fsspec's readers of one file share their position."""

    def apart(self: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> MemoryFile:
        file = opened(self, path, mode, **options)
        return MemoryFile(self, path, file.getvalue()) if mode == "rb" else file

    return apart


@pytest.fixture(params=["folder", "memory", "s3"])
def store_root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Where a new store can be: a folder, this process's memory, an S3 bucket."""
    if request.param == "folder":
        return str(tmp_path / "store")
    if request.param == "memory":
        monkeypatch.setattr(MemoryFileSystem, "_open", _open_apart(MemoryFileSystem._open))
        return f"memory://store-{uuid.uuid4().hex}"
    return f"s3://{request.getfixturevalue('s3_bucket')}/lake/store"


@pytest.fixture
def capture_locally(tmp_path: Path) -> Callable[..., Run]:
    """Captures a study in this process, on one thread and without Ray.

    The second argument is the folder of the store, made if it is not there; further ones override
    settings of the study, as `--set` does.
    """

    def capture(study: Path, store: Path | None = None, *overrides: str) -> Run:
        run = begin(study, store or tmp_path / "store", *overrides)
        driver.capture(run, LocalWorkers(build_stage(run.stage_spec())), NoProgress())
        return run

    return capture


def begin(study_path: Path, store_path: Path, *overrides: str) -> Run:
    """The run of a study in a store: the one it began earlier, or a new one."""
    store, study = create_store(store_path), load_study(study_path, overrides)
    model = inspect_model(study)
    run = find_run(store, study, model, new_run=False)
    return run or begin_run(store, study, model, threads=1)


@pytest.fixture
def begin_locally(tmp_path: Path) -> Callable[..., Run]:
    """Begins or finds the run of a study, and captures nothing; arguments as `capture_locally`."""
    return lambda study, store=None, *overrides: begin(
        study, store or tmp_path / "store", *overrides
    )
