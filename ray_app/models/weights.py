"""The weights of a stage: read from a checkpoint or drawn at random, tensor by tensor."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.utils.hub import cached_file

from ray_app.models.errors import ModelError
from ray_app.models.parts import ModelParts, remove_parts
from ray_app.models.quantization import quantization_config
from ray_app.study import ModelSettings

__all__ = ["build_model", "random_tensors", "read_tensors", "stored_tensors"]

_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")
"""In the order of preference; each may be split into files named by an index beside them."""


def read_tensors(name: str, revision: str | None, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The tensors of a checkpoint that are wanted, read only when they are used.

    Args:
        name: a folder, or a hub id of which only the files needed are downloaded.
        revision: branch, tag or commit of a hub id.
        wanted: says by its name in the checkpoint whether a tensor is.

    Returns:
        Tensors by name, or what `from_pretrained` takes as a tensor that is still on disk.

    Raises:
        OSError: if there is no checkpoint.
    """
    found: dict[str, Any] = {}
    for path, names in _checkpoint_files(name, revision, wanted).items():
        if path.suffix == ".safetensors":
            # A mapped file would count as memory of the process, beside the tensors copied from it.
            file: Any = safe_open(path, framework="pt", backend="pread")
            there = file.keys() if names is None else names
            found |= {key: file.get_slice(key) for key in there if wanted(key)}
        else:
            stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            found |= {key: value for key, value in stored.items() if wanted(key)}
    return found


def stored_tensors(
    name: str, revision: str | None, skeleton: transformers.PreTrainedModel, absent: list[str]
) -> dict[str, Any]:
    """The tensors of a checkpoint that a stage holds.

    Args:
        name: a folder or a hub id.
        revision: branch, tag or commit of a hub id.
        skeleton: the whole model.
        absent: names of the modules that the stage does not hold.

    Raises:
        OSError: if there is no checkpoint.
    """
    prefix = skeleton.base_model_prefix
    tied = dict(skeleton.all_tied_weights_keys)

    def wanted(name: str) -> bool:
        # Checkpoints saved from the bare model leave its prefix out.
        names = (name, f"{prefix}.{name}")
        return name in tied or not any(_lies_in(n, module) for n in names for module in absent)

    tensors = read_tensors(name, revision, wanted)
    for target, source in tied.items():
        stored = tensors.pop(target, None)
        # Of weights that are tied, a checkpoint may hold either name.
        here = not any(_lies_in(source, module) for module in absent)
        if stored is not None and here and source not in tensors:
            tensors[source] = stored
    return tensors


def random_tensors(
    model_class: type[transformers.PreTrainedModel],
    config: transformers.PreTrainedConfig,
    parts: ModelParts,
    layers: range,
    *,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The tensors of a stage as the architecture's own initialisers draw them, in float32.

    Every module is initialised under a seed of its own, derived from `seed` and its name, so that
    a stage draws the numbers that it would have in the whole model, and only those.

    Raises:
        ModelError: if the architecture leaves a tensor without a value.
    """
    with torch.device("meta"):
        model: Any = _stage_class(model_class, parts, layers, torch.float32)(config)
    model = model.to(torch.float32).to_empty(device="cpu")
    tied = set(model.all_tied_weights_keys)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and name not in tied:
                tensor.fill_(torch.nan)
        for name, module, owner in _bottom_up(model, "", model):
            if f"{name}.weight" not in tied:
                torch.manual_seed(_seed_of(seed, name))
                owner._init_weights(module)
    model.tie_weights(recompute_mapping=False)
    tensors = dict(model.state_dict())
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ModelError(
                f"model.init: random is not possible for {model_class.__name__}: its initialiser "
                f"leaves {name!r} without a value; use model.init: pretrained."
            )
    return tensors


def build_model(
    skeleton: transformers.PreTrainedModel,
    config: transformers.PreTrainedConfig,
    parts: ModelParts,
    layers: range,
    tensors: dict[str, Any],
    *,
    settings: ModelSettings,
    device: str,
) -> nn.Module:
    """A stage with its tensors, converted and quantised as the settings say.

    Args:
        skeleton: the whole model, without weights.
        config: its configuration.
        parts: its parts.
        layers: layers of the stage.
        tensors: the stage's tensors.
        settings: dtype and quantisation.
        device: where the weights go.

    Raises:
        ModelError: if the checkpoint lacks tensors of the stage.
        OSError, ValueError, KeyError, RuntimeError, ImportError: what transformers raises.
    """
    dtype = getattr(torch, settings.dtype)
    stage_class: Any = _stage_class(type(skeleton), parts, layers, dtype)
    model, report = stage_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        quantization_config=quantization_config(settings, skeleton),
        device_map={"": device},
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise ModelError(
            f"the weights of model.source {settings.source!r} lack {len(report['missing_keys'])} "
            f"tensors, the first of them {min(report['missing_keys'])!r}: the download or copy is "
            "incomplete, or the configuration belongs to another model."
        )
    loaded: nn.Module = model
    return loaded


def _stage_class(
    model_class: type[transformers.PreTrainedModel],
    parts: ModelParts,
    layers: range,
    dtype: torch.dtype,
) -> type[transformers.PreTrainedModel]:
    """The model's class, made so that its instances never have the other stages' modules."""

    def initialise(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        remove_parts(self, parts, layers, dtype)

    # transformers looks classes up by name: this one keeps the name and place of its base.
    body = {"__init__": initialise, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), body)


def _bottom_up(
    module: nn.Module, name: str, owner: transformers.PreTrainedModel
) -> Iterator[tuple[str, nn.Module, transformers.PreTrainedModel]]:
    """(name, module, the model whose initialiser is responsible), children before parents."""
    if isinstance(module, transformers.PreTrainedModel):
        owner = module
    for child_name, child in module.named_children():
        yield from _bottom_up(child, f"{name}.{child_name}" if name else child_name, owner)
    yield name, module, owner


def _lies_in(tensor: str, module: str) -> bool:
    return tensor.startswith(module + ".")


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _checkpoint_files(
    name: str, revision: str | None, wanted: Callable[[str], bool]
) -> dict[Path, list[str] | None]:
    """The files that hold wanted tensors, each with their names if an index tells them."""
    for checkpoint in _CHECKPOINTS:
        index = _file(name, f"{checkpoint}.index.json", revision)
        if index is not None:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            by_file: dict[str, list[str]] = {}
            for key in filter(wanted, places):
                by_file.setdefault(places[key], []).append(key)
            return {_required(name, file, revision): keys for file, keys in by_file.items()}
        whole = _file(name, checkpoint, revision)
        if whole is not None:
            return {whole: None}
    raise OSError(f"neither {' nor '.join(_CHECKPOINTS)} is there, whole or with an index")


def _file(name: str, file: str, revision: str | None) -> Path | None:
    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _required(name: str, file: str, revision: str | None) -> Path:
    path = _file(name, file, revision)
    if path is None:
        raise OSError(f"the checkpoint's index names {file!r}, which is not there")
    return path
