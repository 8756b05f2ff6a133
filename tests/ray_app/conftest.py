"""Models that are deep enough to be cut, and pipelines that run in this process."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ray_app.ablation.engine import Engine, evaluation_specs
from ray_app.ablation.samples import EvaluationSamples, evaluation_samples, study_of
from ray_app.ablation.stage import build_evaluation
from ray_app.capture.errors import CaptureError, ShardInterruptedError
from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import Stage
from ray_app.capture.workers import LocalWorkers, Workers
from ray_app.facts import inspect_model
from ray_app.models.loading import quiet_transformers
from ray_app.progress import NoProgress
from ray_app.run import Run

_DEEP: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GROUPED = _DEEP | {"intermediate_size": 128, "num_key_value_heads": 2}

DEEP_FAMILIES: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GROUPED),
    "llama-tied": transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**_GROUPED, sliding_window=4),
    "gemma2": transformers.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=4),
    "gpt2": transformers.GPT2Config(
        vocab_size=400, n_embd=64, n_layer=6, n_head=4, n_positions=128, bos_token_id=0,
        eos_token_id=1, scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=400, hidden_size=64, num_layers=6, num_heads=4, max_position_embeddings=128,
        attention_types=[[["global", "local"], 3]], window_size=4, bos_token_id=0, eos_token_id=1,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**_DEEP, intermediate_size=128),
    "opt": transformers.OPTConfig(**_DEEP, ffn_dim=128, word_embed_proj_dim=32),
    "cohere": transformers.CohereConfig(**_GROUPED),
}  # fmt: skip


ATTENTION = {"gemma2": "eager", "gpt_neo": "eager"}
"""Families that transformers computes without scaled_dot_product_attention."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every stage computes with one thread, as the models that it is compared with."""
    quiet_transformers()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def deep_model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: transformers.PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """Gives the folder of a tiny model of six layers of a family."""
    root = tmp_path_factory.mktemp("deep-models")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            torch.manual_seed(1)
            config = DEEP_FAMILIES[family]
            config._attn_implementation = ATTENTION.get(family, "sdpa")
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.15)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


class InlineCalls:
    """Handles are results, or the errors that calls raised."""

    def wait(self, handles: list[Any]) -> Any:
        return handles[0]

    def result(self, handle: Any) -> Any:
        value = handle[0]
        if isinstance(value, BaseException):
            raise value
        return value


class InlinePipeline:
    """Stages in this process, called at once; stages can be killed before a given call."""

    def __init__(self, *stages: Stage, dies_at: set[int] | None = None) -> None:
        self.num_stages = len(stages)
        self.num_steps = 0
        self.num_revivals = 0
        self._stages = stages
        self._dies_at = dies_at or set()
        self._dead = False

    def step(self, shard: PlannedShard, batch: int) -> Any:
        self.num_steps += 1
        self._dead = self._dead or self.num_steps in self._dies_at
        passed: Any = None
        for stage in self._stages:
            passed = self._call(stage.step, shard, batch, passed)
            if isinstance(passed, BaseException):
                break
        return _handle(passed)

    def close(self, shard: PlannedShard) -> list[Any]:
        return [_handle(self._call(stage.close, shard)) for stage in self._stages]

    def write(self, shard: PlannedShard) -> list[Any]:
        return [_handle(self._call(stage.write, shard)) for stage in self._stages]

    def drop(self, shard: PlannedShard) -> None:
        for stage in self._stages:
            stage.drop(shard)

    def revive(self) -> list[Any]:
        self.num_revivals += 1
        self._dead = False
        return [_handle(None)]

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        if self._dead:
            return ShardInterruptedError("it was killed")
        try:
            return method(*args)
        except CaptureError as error:
            return error


class _Handle(tuple[Any]):
    """A tuple that is equal to itself only, so that it can be a key."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _handle(value: Any) -> _Handle:
    return _Handle((value,))


@pytest.fixture
def inline_calls() -> InlineCalls:
    return InlineCalls()


@pytest.fixture
def inline_pipeline() -> type[InlinePipeline]:
    return InlinePipeline


@pytest.fixture
def draw() -> Callable[..., EvaluationSamples]:
    """Draws the evaluation samples of a run; further arguments as of `study_of`."""

    def samples_of(run: Run, *study: Any) -> EvaluationSamples:
        settings = study_of(run, *study)
        return evaluation_samples(run, settings, inspect_model(settings))

    return samples_of


@pytest.fixture
def open_engine() -> Callable[..., Any]:
    """Gives what opens engines of a run in this process, with a stage for each range of layers.

    `make_workers` makes the workers of those stages, if they are not to be one plain pipeline.
    """

    def opener(
        run: Run,
        samples: EvaluationSamples,
        *cut: range,
        make_workers: Callable[..., Workers] = LocalWorkers,
    ) -> Callable[..., Any]:
        layers = cut or (range(run.record["model"]["num_layers"]),)

        @contextmanager
        def engine(*, reference: str, kinds: Iterable[Any]) -> Iterator[Engine]:
            specs = evaluation_specs(run, layers, reference, kinds=kinds)
            workers = make_workers(*map(build_evaluation, specs))
            yield Engine(workers, run, samples, reference, lambda **_: nullcontext(NoProgress()))

        return engine

    return opener
