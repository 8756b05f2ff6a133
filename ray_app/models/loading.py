"""Loading configurations, tokenizers and models from a hub, a folder, a GGUF file or a package."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from ray_app.models.gguf import unpack_gguf
from ray_app.places import resolve_path
from ray_app.study import ModelSettings
from storage import ActlakeError

__all__ = [
    "ModelError",
    "ModelFiles",
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate_model",
    "quiet_transformers",
]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def quiet_transformers() -> None:
    """Keep transformers' warnings and progress bars out of our own output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class ModelError(ActlakeError):
    """A model cannot be found, loaded or understood."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """Where a model's files are, in the form that `from_pretrained` takes."""

    name: str
    """First argument of from_pretrained: a hub id or a folder."""
    fingerprint: str
    """What tells these weights from others: a digest of local weight files, or the hub commit."""


def locate_model(settings: ModelSettings) -> ModelFiles:
    """Find a model's files and tell its weights from others.

    Raises:
        ModelError: if there is no such folder, file or hub model.
    """
    path = Path(resolve_path(settings.source))
    if path.is_file() and path.suffix == ".gguf":
        return _locate_gguf(settings, path)
    if path.is_dir():
        weights = sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
        described = [*weights, path / "config.json"]
        if not described[-1].is_file():
            raise ModelError(
                f"model.source {settings.source!r} is a folder without config.json: give the "
                "folder that save_pretrained wrote, or the .gguf file itself."
            )
        return ModelFiles(name=str(path), fingerprint=_digest(described))
    if (
        ":" in settings.source
        or settings.source.startswith((".", "/", "~"))
        or path.suffix == ".gguf"
    ):
        raise ModelError(
            f"model.source {settings.source!r} does not exist: give a Hugging Face id, an existing "
            "folder or GGUF file, or package:NAME/FILE."
        )
    return ModelFiles(name=settings.source, fingerprint=_hub_commit(settings))


def load_config(settings: ModelSettings, files: ModelFiles) -> transformers.PreTrainedConfig:
    """The model's configuration, with the attention implementation of the study.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            files.name,
            revision=settings.revision,
            attn_implementation=settings.attention,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("configuration", settings, error) from error
    return config


def load_tokenizer(
    settings: ModelSettings, files: ModelFiles
) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        tokenizer: transformers.PreTrainedTokenizerBase = (
            transformers.AutoTokenizer.from_pretrained(files.name, revision=settings.revision)
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("tokenizer", settings, error) from error
    return tokenizer


def load_model(settings: ModelSettings, files: ModelFiles) -> nn.Module:
    """The whole causal language model, in evaluation mode, on the CPU.

    Random initialisation runs the architecture's own initialiser under the study's seed, in
    float32, and converts afterwards, so that every dtype starts from the same numbers.

    Raises:
        ModelError: if the weights cannot be read or the architecture has no language model head.
    """
    dtype = getattr(torch, settings.dtype)
    try:
        if settings.init == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.init_seed)
                config = load_config(settings, files)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model = model.to(dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                files.name,
                revision=settings.revision,
                attn_implementation=settings.attention,
                dtype=dtype,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _cannot_load("weights", settings, error) from error
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def _locate_gguf(settings: ModelSettings, path: Path) -> ModelFiles:
    fingerprint = _digest([path])
    try:
        folder = unpack_gguf(path, fingerprint.removeprefix("sha256:"))
    except Exception as error:
        # In a truncated or damaged file, the reader fails with whatever it trips over.
        raise _cannot_load("GGUF file", settings, error) from error
    return ModelFiles(name=str(folder), fingerprint=fingerprint)


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _hub_commit(settings: ModelSettings) -> str:
    try:
        config = transformers.AutoConfig.from_pretrained(
            settings.source, revision=settings.revision
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("configuration", settings, error) from error
    return f"hub:{config._commit_hash or settings.revision or 'unknown'}"


def _cannot_load(part: str, settings: ModelSettings, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    hint = "check the id, the network and access rights"
    if part == "GGUF file":
        hint = "the file may be incomplete or not a model: fetch it again"
    elif "architecture" in reason or "model type" in reason or "Unrecognized" in reason:
        hint = "actlake needs a decoder that transformers' AutoModelForCausalLM knows"
    return ModelError(
        f"the {part} of model.source {settings.source!r} cannot be loaded{offline}: "
        f"{reason[:300]}; {hint}."
    )
