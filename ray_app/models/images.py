"""Reading encoded images as one model reads them."""

import io
from collections.abc import Callable

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ray_app.models.errors import ModelError

__all__ = ["ImageError", "ImageReader"]

_MODES = {1: ("L", "1"), 3: ("RGB", "L", "1")}
"""Pillow's modes that a model of so many channels reads: those that lose nothing on the way."""


class ImageError(Exception):
    """One image cannot be read; the message says why."""


class ImageReader:
    """Decodes an image and prepares it as the model's own evaluation does."""

    def __init__(self, num_channels: int, prepare: Callable[[Image.Image], Tensor]) -> None:
        """Take a preparation into use.

        Args:
            num_channels: channels that the model reads.
            prepare: makes (channels, height, width) float32 of an image of that many channels;
                always of the same shape.

        Raises:
            ModelError: if the model reads anything but grey or coloured images.
        """
        if num_channels not in _MODES:
            raise ModelError(
                f"the model reads images of {num_channels} channels: actlake reads images of 1 "
                "(grey) or 3 (red, green, blue)."
            )
        self._modes = _MODES[num_channels]
        self._prepare = prepare
        self.shape = tuple(prepare(Image.new(self._modes[0], (32, 32))).shape)
        """(channels, height, width) of what the model is given."""

    def __call__(self, data: bytes) -> Tensor:
        """Read one image: (channels, height, width) float32.

        Raises:
            ImageError: if it cannot be decoded, or has channels that the model does not read.
        """
        try:
            image: Image.Image = Image.open(io.BytesIO(data))
            image.load()
        except UnidentifiedImageError as error:
            # Pillow's own words hold an address, which differs whenever the shard is computed.
            raise ImageError("the image cannot be decoded: it is of no known format") from error
        except Exception as error:
            # Of damaged data, Pillow's decoders raise whatever they trip over.
            raise ImageError(f"the image cannot be decoded: {' '.join(str(error).split())}") from (
                error
            )
        if image.mode == "P" and "transparency" not in image.info:
            image = image.convert("RGB")  # A palette is a way to store colours, or greys.
        if image.mode not in self._modes:
            raise ImageError(
                f"the image has the channels {image.mode}, and the model reads {self._modes[0]}"
            )
        return self._prepare(image.convert(self._modes[0]))
