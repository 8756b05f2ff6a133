"""What a model is before its weights are read: its measures, how it is built and called.

The rest of the code knows models through `Architecture` alone; its kinds are in
`transformers_models` and `timm_models`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from ray_app.models.errors import ModelError
from ray_app.models.images import ImageReader

if TYPE_CHECKING:
    from ray_app.models.parts import ModelParts
    from ray_app.study import ModelSettings

__all__ = ["Architecture", "ImageArchitecture", "Modality", "PatchGrid"]

Modality = Literal["language", "image"]


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """A kind of transformer in one size, without weights."""

    modality: ClassVar[Modality]
    """What the model reads."""

    name: str
    """Class name in transformers or timm."""
    num_layers: int
    """Number of layers."""
    width: int
    """Width of the residual stream."""
    num_heads: int | None
    """Attention heads of a layer; None without attention."""
    head_dim: int | None
    """Width of a head; None without attention."""
    num_outputs: int
    """Size of the vocabulary, or number of classes; 0 without a head."""
    max_positions: int | None
    """Longest sample that the model can read, if it has a bound."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The model's modules without any memory for weights, to look at its structure."""

    @abstractmethod
    def build(
        self,
        settings: "ModelSettings",
        source: str,
        parts: "ModelParts",
        layers: range,
        *,
        device: str,
    ) -> nn.Module:
        """A stage of the model with its weights.

        Args:
            settings: which weights, in which dtype.
            source: `ModelFiles.name`.
            parts: the model's parts.
            layers: layers of the stage.
            device: where the weights go.

        Raises:
            ModelError: if weights are missing.
            OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError: if they
                cannot be read.
        """

    @abstractmethod
    def run(self, model: nn.Module, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        """One forward pass.

        Args:
            model: the model, or a stage of it.
            inputs: (B, P) token ids or (B, C, H, W) pixels, where the model is.
            attention_mask: (B, P) int64, or None if there is no padding.

        Returns:
            (B, P, vocabulary) or (B, classes) logits.
        """

    @abstractmethod
    def blank_inputs(self, num_samples: int) -> Tensor:
        """Inputs without content, for passes through a skeleton."""

    @property
    @abstractmethod
    def num_probed(self) -> int:
        """Positions of a probe."""

    @property
    @abstractmethod
    def changed_position(self) -> int:
        """The position of a probe whose content may be changed alone."""

    @abstractmethod
    def probe_inputs(self, codes: Tensor) -> Tensor:
        """Inputs whose positions differ.

        Args:
            codes: (1, num_probed) int64; equal codes give equal content.
        """


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The positions of an image: some tokens of the model's own, then patches row by row."""

    prefix: tuple[str, ...]
    """Texts of the tokens before the patches: '[CLS]' and the like."""
    rows: int
    """Rows of patches."""
    columns: int
    """Columns of patches."""

    @property
    def texts(self) -> list[str]:
        """What each position is called."""
        places = [(row, column) for row in range(self.rows) for column in range(self.columns)]
        return [*self.prefix, *(f"[PATCH {row},{column}]" for row, column in places)]

    @classmethod
    def measure(
        cls, model: nn.Module, first_layer: str, run: Callable[[], object], prefix: tuple[str, ...]
    ) -> "PatchGrid":
        """Watch one pass through a skeleton.

        Args:
            model: the skeleton.
            first_layer: name of its first layer.
            run: makes the pass.
            prefix: texts that tokens before the patches would have; those there are, are the first
                of them.

        Raises:
            ModelError: if the first layer does not read tokens of patches.
        """
        seen: dict[str, torch.Size] = {}
        patches = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if patches is None:
            raise ModelError(f"{type(model).__name__} cuts images into patches in an unknown way.")
        handles = [
            patches.register_forward_hook(lambda _, args, out: seen.update(grid=out.shape[-2:])),
            model.get_submodule(first_layer).register_forward_pre_hook(
                lambda _, args: seen.update(entering=args[0].shape)
            ),
        ]
        with torch.inference_mode():
            run()
        for handle in handles:
            handle.remove()
        rows, columns = seen["grid"]
        num_prefix = seen["entering"][1] - rows * columns
        if not 0 <= num_prefix <= len(prefix):
            raise ModelError(
                f"{type(model).__name__} reads {seen['entering'][1]} positions of {rows} x "
                f"{columns} patches: actlake captures models that read patches one by one, after "
                f"at most {len(prefix)} tokens of their own."
            )
        return cls(prefix[:num_prefix], rows, columns)


@dataclass(frozen=True, kw_only=True)
class ImageArchitecture(Architecture):
    """A vision transformer, with or without a classification head."""

    modality = "image"

    reader: ImageReader
    """Prepares images as the model's own evaluation does."""
    grid: PatchGrid
    """Its positions."""
    classes: tuple[str, ...]
    """Names of its classes, if it knows them."""

    def blank_inputs(self, num_samples: int) -> Tensor:
        """Pixels without content, where a skeleton's own tokens are."""
        return torch.zeros((num_samples, *self.reader.shape), device="meta")

    @property
    def num_probed(self) -> int:
        """Positions of every image."""
        return len(self.grid.texts)

    @property
    def changed_position(self) -> int:
        """The first patch."""
        return len(self.grid.prefix)

    def probe_inputs(self, codes: Tensor) -> Tensor:
        """An image of one colour per patch; codes of other positions do not matter."""
        rows, columns = self.grid.rows, self.grid.columns
        channels, height, width = self.reader.shape
        colours = (codes[0, self.changed_position :] + 1).float().sin().view(rows, columns)
        patches = colours.repeat_interleave(height // rows, 0).repeat_interleave(
            width // columns, 1
        )
        pixels = torch.zeros(1, channels, height, width)
        pixels[..., : patches.shape[0], : patches.shape[1]] = patches
        return pixels
