"""Vision transformers of timm: by name, or from a folder that timm's `save_for_hf` wrote."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from ray_app.hub import OutOfReachError, why_unreachable
from ray_app.models.architecture import ImageArchitecture, PatchGrid
from ray_app.models.errors import ModelError
from ray_app.models.images import ImageReader
from ray_app.models.parts import ModelParts, remove_parts
from ray_app.study import ModelSettings

__all__ = ["TimmTransformer", "locate_timm", "timm_name", "timm_transformer"]

_KINDS = "vit_*, deit_*, deit3_* and their DINO, DINOv2, CLIP and SigLIP variants"


def timm_name(source: str) -> str | None:
    """What `timm.create_model` takes, of `ModelFiles.name`; None if it is no model of timm."""
    if source.startswith("timm:"):
        return source.removeprefix("timm:")
    config = Path(source) / "config.json"
    try:
        written = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # A hub id, or a folder whose configuration transformers will complain about.
    # transformers writes "architectures" and "model_type".
    is_timm = isinstance(written, dict) and "architecture" in written
    return f"local-dir:{source}" if is_timm else None


def locate_timm(settings: ModelSettings) -> str:
    """The fingerprint of a model that is given as ``timm:NAME``.

    Raises:
        ModelError: if timm has no such model, or the hub no weights of it.
        OutOfReachError: if the hub cannot be asked.
    """
    name = settings.source.removeprefix("timm:")
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(
            f"model.source {settings.source!r} is no model of timm {timm.__version__}"
            + (f": did you mean {' or '.join(near)}?" if near else ": timm.list_models() has them.")
        )
    if settings.init == "random":
        return f"timm:{name}"
    try:
        repository = _repository(name)
    except RuntimeError as error:
        raise ModelError(f"model.source {settings.source!r}: {error}.") from error
    if repository is None:
        raise ModelError(
            f"model.source {settings.source!r} has no trained weights on the hub: give a folder "
            "with config.json and model.safetensors, or set model.init to random."
        )
    unreachable = why_unreachable()
    try:
        path = huggingface_hub.hf_hub_download(
            repository, "config.json", revision=settings.revision
        )
    except (OSError, ValueError) as error:
        reason = unreachable or " ".join(str(error).split())[:300]
        kind = ModelError if unreachable is None else OutOfReachError
        raise kind(
            f"model.source {settings.source!r} is not in the local cache, and {repository} cannot "
            f"be read from the hub ({reason}): check model.revision and the network, or give a "
            "local folder."
        ) from error
    # .../snapshots/COMMIT/config.json
    return f"hub:{Path(path).parent.name}"


def timm_transformer(settings: ModelSettings, name: str, fingerprint: str) -> "TimmTransformer":
    """A model of timm without its weights.

    Args:
        settings: which model.
        name: from `timm_name`.
        fingerprint: `ModelFiles.fingerprint`.

    Raises:
        ModelError: if it is no vision transformer.
        OSError, ValueError, KeyError, RuntimeError, TypeError: what timm raises.
    """
    if settings.quantization != "none":
        raise ModelError(
            f"model.quantization: {settings.quantization} is not there for models of timm: set it "
            "to none, and model.dtype to a narrower one to save memory."
        )
    commit = fingerprint.removeprefix("hub:") if fingerprint.startswith("hub:") else None
    overlay = {} if commit is None else {"hf_hub_id": f"{_repository(name)}@{commit}"}
    model = _create(name)
    if not isinstance(model, timm.models.VisionTransformer):
        raise ModelError(
            f"model.source {settings.source!r} is a {type(model).__name__}: of timm's models, "
            f"actlake captures the VisionTransformer kind, which are {_KINDS}."
        )
    data = resolve_model_data_config(model)
    # The size that the model was built for; a configuration may have been copied from another.
    data["input_size"] = (model.in_chans, *model.patch_embed.img_size)
    reader = ImageReader(model.in_chans, create_transform(**data, is_training=False))
    pixels = torch.zeros((1, *reader.shape), device="meta")
    grid = PatchGrid.measure(model, "blocks.0", lambda: model(pixels), _prefix(model))
    block: Any = model.blocks[0]
    known: Any = model.pretrained_cfg
    return TimmTransformer(
        name=type(model).__name__,
        num_layers=len(model.blocks),
        width=model.embed_dim,
        num_heads=block.attn.num_heads,
        head_dim=block.attn.head_dim,
        num_outputs=model.num_classes,
        max_positions=len(grid.texts),
        reader=reader,
        grid=grid,
        classes=tuple(known.get("label_names") or ()),
        source=name,
        overlay=overlay,
    )


@dataclass(frozen=True, kw_only=True)
class TimmTransformer(ImageArchitecture):
    """A vision transformer of timm."""

    source: str
    """What `timm.create_model` takes."""
    overlay: dict[str, Any]
    """What its trained weights are pinned to."""

    def skeleton(self) -> nn.Module:
        """See `Architecture.skeleton`."""
        return _create(self.source)

    def build(
        self,
        settings: ModelSettings,
        source: str,
        parts: ModelParts,
        layers: range,
        *,
        device: str,
    ) -> nn.Module:
        """Make the whole model and drop what other stages hold; see `Architecture.build`.

        timm renames and resizes tensors of checkpoints as a whole, and draws random ones in one
        sequence; vision transformers are small enough to be in memory once.
        """
        dtype = getattr(torch, settings.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.init_seed)
            model: Any = timm.create_model(
                self.source,
                pretrained=settings.init == "pretrained",
                pretrained_cfg_overlay=dict(self.overlay),
            )
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = settings.attention == "sdpa"
        remove_parts(model, parts, layers, dtype)
        stage: nn.Module = model.to(device, dtype)
        return stage

    def run(self, model: nn.Module, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        """See `Architecture.run`; images have no padding."""
        logits: Tensor = model(inputs)
        return logits


def _create(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name).eval()
    return model


def _repository(name: str) -> str | None:
    config = timm.get_pretrained_cfg(name)
    return None if config is None else config.hf_hub_id


def _prefix(model: timm.models.VisionTransformer) -> tuple[str, ...]:
    names = ["[CLS]"] * model.has_class_token
    names += ["[DIST]"] * (model.num_prefix_tokens - len(names) - model.num_reg_tokens)
    return (*names, *["[REG]"] * model.num_reg_tokens)
