"""Loading configurations, tokenizers and models from a hub, a folder, a GGUF file or a package."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn

from ray_app.hub import why_unreachable
from ray_app.models.errors import ModelError
from ray_app.models.gguf import unpack_gguf
from ray_app.models.parts import StageModel, find_parts, whole_parts
from ray_app.models.sites import empty_model, layer_prefixes
from ray_app.models.weights import build_model, random_tensors, read_tensors
from ray_app.places import resolve_path
from ray_app.study import ModelSettings

__all__ = [
    "ModelError",
    "ModelFiles",
    "load_config",
    "load_model",
    "load_stage",
    "load_tokenizer",
    "locate_model",
    "quiet_transformers",
]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def quiet_transformers() -> None:
    """Keep the warnings and progress bars of transformers and bitsandbytes out of our output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # It says at every call that 8-bit maps round their inputs to float16: that is what LLM.int8 is.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
    """The whole causal language model, in evaluation mode, on the CPU; errors as `load_stage`."""
    return load_stage(settings, files).model


def load_stage(
    settings: ModelSettings,
    files: ModelFiles,
    layers: range | None = None,
    *,
    device: str = "cpu",
) -> StageModel:
    """Some layers of a causal language model, in evaluation mode.

    Only the tensors of these layers (and of the embedding or head, if they belong to the stage)
    are read. Random initialisation runs the architecture's own initialisers, in float32, and
    converts afterwards, so that every dtype starts from the same numbers.

    Args:
        settings: which model.
        files: from `locate_model`.
        layers: the layers of the stage; all if not given.
        device: where the weights go.

    Raises:
        ModelError: if the weights cannot be read, some are missing, or the architecture has no
            language model head or cannot be cut.
    """
    config = load_config(settings, files)
    skeleton = empty_model(config)
    model_class = type(skeleton)
    tied = dict(skeleton.all_tied_weights_keys)
    prefixes = layer_prefixes(skeleton, config.get_text_config().num_hidden_layers)
    if layers is None or len(layers) == len(prefixes):
        parts, layers = whole_parts(prefixes, config), range(len(prefixes))
    else:
        parts = find_parts(skeleton, config)
    try:
        if settings.init == "random":
            tensors: dict[str, Any] = random_tensors(
                model_class, config, parts, layers, seed=settings.init_seed
            )
        else:
            tensors = _stored_tensors(settings, files, model_class, tied, parts.absent(layers))
        model = build_model(
            model_class, config, parts, layers, tensors, settings=settings, device=device
        )
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise _cannot_load("weights", settings, error) from error
    return StageModel(model.eval().requires_grad_(False), parts, layers)


def _stored_tensors(
    settings: ModelSettings,
    files: ModelFiles,
    model_class: type[transformers.PreTrainedModel],
    tied: dict[str, str],
    absent: list[str],
) -> dict[str, Any]:
    prefix = model_class.base_model_prefix

    def wanted(name: str) -> bool:
        # Checkpoints saved from the bare model leave its prefix out.
        names = (name, f"{prefix}.{name}")
        return name in tied or not any(_lies_in(n, module) for n in names for module in absent)

    tensors = read_tensors(files.name, settings.revision, wanted)
    for target, source in tied.items():
        stored = tensors.pop(target, None)
        # Of weights that are tied, a checkpoint may hold either name.
        here = not any(_lies_in(source, module) for module in absent)
        if stored is not None and here and source not in tensors:
            tensors[source] = stored
    return tensors


def _lies_in(tensor: str, module: str) -> bool:
    return tensor.startswith(module + ".")


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
    unreachable = why_unreachable()
    try:
        config = transformers.AutoConfig.from_pretrained(
            settings.source, revision=settings.revision
        )
    except (OSError, ValueError, KeyError) as error:
        if unreachable is not None:
            raise ModelError(
                f"model.source {settings.source!r} is no folder or file here and not in the local "
                f"cache, and the hub cannot be asked for it ({unreachable}): check the id and the "
                "network, or give a local folder."
            ) from error
        raise _cannot_load("configuration", settings, error) from error
    return f"hub:{config._commit_hash or settings.revision or 'unknown'}"


def _cannot_load(part: str, settings: ModelSettings, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    is_local = Path(resolve_path(settings.source)).exists()
    is_offline = not is_local and os.environ.get("HF_HUB_OFFLINE")
    offline = " (HF_HUB_OFFLINE is set)" if is_offline else ""
    hint = "check the id, the network and access rights"
    if part == "GGUF file":
        hint = "the file may be incomplete or not a model: fetch it again"
    elif is_local:
        hint = "its files may be incomplete or damaged: write or fetch them again"
    if "architecture" in reason or "model type" in reason or "Unrecognized" in reason:
        hint = "actlake needs a decoder that transformers' AutoModelForCausalLM knows"
    return ModelError(
        f"the {part} of model.source {settings.source!r} cannot be loaded{offline}: "
        f"{reason[:300]}; {hint}."
    )
