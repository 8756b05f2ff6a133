"""Models of transformers: decoders that predict tokens, and vision transformers that classify."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from ray_app.models.architecture import Architecture, ImageArchitecture, PatchGrid
from ray_app.models.errors import ModelError
from ray_app.models.images import ImageReader
from ray_app.models.parts import ModelParts
from ray_app.models.sites import layer_prefixes
from ray_app.models.weights import build_model, random_tensors, stored_tensors
from ray_app.study import ModelSettings

__all__ = ["CausalModel", "ImageClassifier", "blank_processor", "reads_images"]

_PROBE_LENGTH = 8
_PREFIXES = {"deit": ("[CLS]", "[DIST]")}
"""Tokens before the patches, of model types that differ from most."""
_PREFIX = ("[CLS]", *["[REG]"] * 16)


def reads_images(config: transformers.PreTrainedConfig) -> bool:
    """Whether transformers has an image classifier of this configuration, and no language model."""
    return (
        type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    )


def blank_processor(config: Any) -> Callable[..., Any]:
    """What stands for an image processor where only the shape of pixels matters."""
    size = config.image_size
    pixels = torch.zeros((1, getattr(config, "num_channels", 3), size, size))
    return lambda **_: {"pixel_values": pixels}


@dataclass(frozen=True, kw_only=True)
class _Transformers(Architecture):
    """A model of transformers."""

    config: transformers.PreTrainedConfig
    """Its configuration."""

    def build(
        self,
        settings: ModelSettings,
        source: str,
        parts: ModelParts,
        layers: range,
        *,
        device: str,
    ) -> nn.Module:
        """Read or draw only the tensors of the stage; see `Architecture.build`."""
        skeleton: Any = self.skeleton()
        if settings.init == "random":
            tensors: dict[str, Any] = random_tensors(
                type(skeleton), self.config, parts, layers, seed=settings.init_seed
            )
        else:
            tensors = stored_tensors(source, settings.revision, skeleton, parts.absent(layers))
        return build_model(
            skeleton, self.config, parts, layers, tensors, settings=settings, device=device
        )


@dataclass(frozen=True, kw_only=True)
class CausalModel(_Transformers):
    """A decoder that predicts each token from those before it."""

    modality = "language"

    @classmethod
    def of(cls, config: transformers.PreTrainedConfig) -> "CausalModel":
        """The model of a configuration.

        Raises:
            ModelError: if transformers has no causal language model for it.
        """
        text = config.get_text_config()
        return cls(
            **_measures(_skeleton(transformers.AutoModelForCausalLM, config), text),
            num_outputs=text.vocab_size,
            max_positions=getattr(text, "max_position_embeddings", None),
            config=config,
        )

    def skeleton(self) -> nn.Module:
        """See `Architecture.skeleton`."""
        return _skeleton(transformers.AutoModelForCausalLM, self.config)

    def run(self, model: nn.Module, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        """See `Architecture.run`."""
        output = model(input_ids=inputs, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def blank_inputs(self, num_samples: int) -> Tensor:
        """Three tokens a sample."""
        return torch.zeros((num_samples, 3), dtype=torch.int64)

    @property
    def num_probed(self) -> int:
        """A few tokens."""
        return _PROBE_LENGTH

    @property
    def changed_position(self) -> int:
        """The first, which all others can see."""
        return 0

    def probe_inputs(self, codes: Tensor) -> Tensor:
        """Token ids."""
        return codes % self.num_outputs


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(_Transformers, ImageArchitecture):
    """A vision transformer with a classification head, or with none if it has no labels."""

    @classmethod
    def of(
        cls, config: transformers.PreTrainedConfig, processor: Callable[..., Any]
    ) -> "ImageClassifier":
        """The model of a configuration.

        Args:
            config: the configuration.
            processor: the model's image processor.

        Raises:
            ModelError: if it is no vision transformer.
        """
        if not hasattr(config, "num_attention_heads") or not hasattr(config, "num_hidden_layers"):
            hint = (
                "write model.source: timm:NAME"
                if config.model_type == "timm_wrapper"
                else (
                    "actlake captures plain vision transformers such as ViT, DeiT, BEiT and DINOv2"
                )
            )
            raise ModelError(f"the architecture {config.model_type!r} is not captured: {hint}.")

        def prepare(image: Image.Image) -> Tensor:
            pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
            return pixels

        reader = ImageReader(getattr(config, "num_channels", 3), prepare)
        model = _skeleton(transformers.AutoModelForImageClassification, config)
        first = layer_prefixes(model, config.num_hidden_layers)[0]
        pixels = torch.zeros((1, *reader.shape), device="meta")
        prefix = _PREFIXES.get(config.model_type, _PREFIX)
        grid = PatchGrid.measure(model, first, lambda: model(pixel_values=pixels), prefix)
        names: Any = config.id2label or {}
        num_classes = config.num_labels or 0
        return cls(
            **_measures(model, config),
            num_outputs=num_classes,
            max_positions=len(grid.texts),
            config=config,
            reader=reader,
            grid=grid,
            classes=tuple(names[index] for index in range(num_classes)),
        )

    def skeleton(self) -> nn.Module:
        """See `Architecture.skeleton`."""
        return _skeleton(transformers.AutoModelForImageClassification, self.config)

    def run(self, model: nn.Module, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        """See `Architecture.run`; images have no padding."""
        logits: Tensor = model(pixel_values=inputs).logits
        return logits


def _measures(model: nn.Module, config: Any) -> dict[str, Any]:
    heads = getattr(config, "num_attention_heads", None)
    head_dim = None
    if heads is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "name": type(model).__name__,
        "num_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "num_heads": heads,
        "head_dim": head_dim,
    }


def _skeleton(
    auto_class: Any, config: transformers.PreTrainedConfig
) -> transformers.PreTrainedModel:
    try:
        with torch.device("meta"):
            model: transformers.PreTrainedModel = auto_class.from_config(config).eval()
    except ValueError as error:
        if "attn_implementation" in str(error):
            raise ModelError(
                f"model.attention: {config._attn_implementation} is not supported by transformers "
                f"for the architecture {config.model_type!r}: set model.attention to eager."
            ) from error
        raise ModelError(
            f"the architecture {config.model_type!r} has no causal language model and no image "
            "classifier in transformers: actlake captures decoders that AutoModelForCausalLM can "
            "load, and vision transformers that AutoModelForImageClassification can load."
        ) from error
    return model
