"""Loading configurations, tokenizers and models: from a hub, timm, a folder, a file, a package."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ray_app.hub import OutOfReachError, why_unreachable
from ray_app.models.architecture import Architecture
from ray_app.models.errors import ModelError
from ray_app.models.gguf import unpack_gguf
from ray_app.models.parts import StageModel, find_parts, whole_parts
from ray_app.models.sites import layer_prefixes
from ray_app.models.timm_models import locate_timm, timm_name, timm_transformer
from ray_app.models.transformers_models import (
    CausalModel,
    ImageClassifier,
    blank_processor,
    reads_images,
)
from ray_app.models.weights import read_tensors
from ray_app.places import resolve_path
from ray_app.study import ModelSettings

__all__ = [
    "ModelError",
    "ModelFiles",
    "load_architecture",
    "load_config",
    "load_model",
    "load_shape",
    "load_stage",
    "load_tokenizer",
    "locate_model",
    "quiet_transformers",
    "read_tensor",
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
    """First argument of from_pretrained: a hub id or a folder; or 'timm:NAME'."""
    fingerprint: str
    """What tells these weights from others: a digest of local weight files, or the hub commit."""


def locate_model(settings: ModelSettings) -> ModelFiles:
    """Find a model's files and tell its weights from others.

    Raises:
        ModelError: if there is no such folder, file or hub model.
        OutOfReachError: if it could only be on the hub, which cannot be asked.
    """
    if settings.source.startswith("timm:"):
        return ModelFiles(name=settings.source, fingerprint=locate_timm(settings))
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
            f"model.source {settings.source!r} does not exist: give a Hugging Face id, timm:NAME, "
            "an existing folder or GGUF file, or package:NAME/FILE."
        )
    return ModelFiles(name=settings.source, fingerprint=_hub_commit(settings))


def load_config(settings: ModelSettings, files: ModelFiles) -> transformers.PreTrainedConfig:
    """The model's configuration, with the attention implementation of the study.

    Raises:
        ModelError: if it cannot be read, or says otherwise than the study's `model.shape`.
    """
    try:
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            files.name,
            revision=settings.revision,
            attn_implementation=settings.attention,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("configuration", settings, error) from error
    if settings.shape is not None:
        for key, value in settings.shape.model_dump(exclude_none=True).items():
            if (found := getattr(config, key, None)) != value:
                raise ModelError(
                    f"model.shape.{key} must be as the configuration of {settings.source!r} says, "
                    f"which is {found!r}, found {value!r}: correct it, or leave model.shape out."
                )
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


def load_architecture(settings: ModelSettings, files: ModelFiles) -> Architecture:
    """What the model is, without its weights.

    Raises:
        ModelError: if its configuration cannot be read, or it is of no kind that is captured.
    """
    name = timm_name(files.name)
    if name is not None:
        try:
            return timm_transformer(settings, name, files.fingerprint)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise _cannot_load("configuration", settings, error) from error
    config = load_config(settings, files)
    if not reads_images(config):
        return CausalModel.of(config)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            files.name, revision=settings.revision
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load("image processor", settings, error) from error
    return ImageClassifier.of(config, processor)


def load_shape(settings: ModelSettings) -> tuple[ModelFiles, Architecture] | None:
    """What the model is, from the study alone; its files are not looked for.

    Returns:
        Its name with the fingerprint ``shape``, and what it is; None if neither `model.shape` nor
        timm knows.

    Raises:
        ModelError: if its shape is of no kind that is captured.
    """
    files = ModelFiles(name=settings.source, fingerprint="shape")
    if settings.source.startswith("timm:"):
        return files, load_architecture(settings, files)
    if settings.shape is None:
        return None
    try:
        config = transformers.AutoConfig.for_model(
            settings.shape.model_type,
            attn_implementation=settings.attention,
            **settings.shape.given(),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.shape makes no configuration of transformers: {' '.join(str(error).split())}."
        ) from error
    if reads_images(config):
        return files, ImageClassifier.of(config, blank_processor(config))
    return files, CausalModel.of(config)


def load_model(settings: ModelSettings, files: ModelFiles) -> nn.Module:
    """The whole model, in evaluation mode, on the CPU; errors as `load_stage`."""
    return load_stage(settings, files).model


def load_stage(
    settings: ModelSettings,
    files: ModelFiles,
    layers: range | None = None,
    *,
    device: str = "cpu",
) -> StageModel:
    """Some layers of a model, in evaluation mode.

    Random initialisation runs the architecture's own initialisers, in float32, and converts
    afterwards, so that every dtype starts from the same numbers.

    Args:
        settings: which model.
        files: from `locate_model`.
        layers: the layers of the stage; all if not given.
        device: where the weights go.

    Raises:
        ModelError: if the weights cannot be read, some are missing, or the architecture is of no
            kind that is captured, or cannot be cut.
    """
    architecture = load_architecture(settings, files)
    skeleton = architecture.skeleton()
    prefixes = layer_prefixes(skeleton, architecture.num_layers)
    if layers is None or len(layers) == len(prefixes):
        parts, layers = whole_parts(prefixes, architecture), range(len(prefixes))
    else:
        parts = find_parts(skeleton, architecture)
    try:
        model = architecture.build(settings, files.name, parts, layers, device=device)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise _cannot_load("weights", settings, error) from error
    return StageModel(model.eval().requires_grad_(False), architecture, parts, layers)


def read_tensor(settings: ModelSettings, files: ModelFiles, names: frozenset[str]) -> Tensor | None:
    """One tensor of a checkpoint of transformers, as it is stored; nothing else of it is read.

    Args:
        settings: which model.
        files: from `locate_model`.
        names: names that the tensor may have.

    Returns:
        The tensor, or None if the checkpoint has none of that name.

    Raises:
        ModelError: if the checkpoint cannot be read.
    """
    try:
        found = read_tensors(files.name, settings.revision, names.__contains__)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _cannot_load("weights", settings, error) from error
    return next((tensor[:] for tensor in found.values()), None)


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
        transformers.AutoConfig.from_pretrained(settings.source, revision=settings.revision)
        path = cached_file(settings.source, "config.json", revision=settings.revision)
    except (OSError, ValueError, KeyError) as error:
        if unreachable is not None:
            raise OutOfReachError(
                f"model.source {settings.source!r} is no folder or file here and not in the local "
                f"cache, and the hub cannot be asked for it ({unreachable}): check the id and the "
                "network, or give a local folder."
            ) from error
        raise _cannot_load("configuration", settings, error) from error
    # .../snapshots/COMMIT/config.json
    return f"hub:{Path(str(path)).parent.name}"


def _cannot_load(part: str, settings: ModelSettings, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    is_local = Path(resolve_path(settings.source)).exists()
    is_offline = not is_local and os.environ.get("HF_HUB_OFFLINE")
    offline = " (HF_HUB_OFFLINE is set)" if is_offline else ""
    hint = "check the id, the network and access rights"
    if part == "GGUF file":
        hint = "the file may be incomplete or not a model: fetch it again"
    elif part == "image processor":
        hint = "write its preprocessor_config.json beside config.json"
    elif is_local:
        hint = "its files may be incomplete or damaged: write or fetch them again"
    unknown = ("architecture", "model type", "Unrecognized")
    if part != "image processor" and any(words in reason for words in unknown):
        hint = (
            "actlake needs a decoder that transformers' AutoModelForCausalLM knows, or a vision "
            "transformer of AutoModelForImageClassification or timm"
        )
    return ModelError(
        f"the {part} of model.source {settings.source!r} cannot be loaded{offline}: "
        f"{reason[:300]}; {hint}."
    )
