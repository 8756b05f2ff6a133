"""Quantisation of linear maps by bitsandbytes."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ray_app.models.errors import ModelError
from ray_app.models.sites import SiteLocation
from ray_app.study import ModelSettings

__all__ = ["BYTES_PER_WEIGHT", "check_quantizable", "quantization_config", "quantized_weights"]

BYTES_PER_WEIGHT = {"none": 0.0, "int8": 1.0, "int4": 0.5625}
"""Bytes of one quantised weight; int4 has one float32 scale per block of 64 weights."""

_INT4_BLOCK = 64


def quantization_config(settings: ModelSettings, model: nn.Module) -> Any:
    """What `from_pretrained` takes; None without quantisation.

    The maps that stay as they are (the output head, tied weights) are those that transformers
    spares in the whole model; a stage alone would lead it to others.

    Args:
        settings: which quantisation.
        model: the whole model; its weights may be absent (`Architecture.skeleton`).
    """
    if settings.quantization == "none":
        return None
    spared = get_keys_to_not_convert(model)
    if settings.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        llm_int8_skip_modules=spared,
    )


def quantized_weights(model: nn.Module, settings: ModelSettings) -> set[str]:
    """Names of the weights that quantisation makes smaller.

    Args:
        model: the whole model; its weights may be absent (`Architecture.skeleton`).
        settings: which quantisation.
    """
    if settings.quantization == "none":
        return set()
    spared = get_keys_to_not_convert(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if _is_quantizable(module) and should_convert_module(name, spared)
    }


def check_quantizable(model: nn.Module, sites: list[SiteLocation], settings: ModelSettings) -> None:
    """Refuse a quantisation that would leave captured layers as they are, or cannot work.

    Args:
        model: the whole model; its weights may be absent (`Architecture.skeleton`).
        sites: its sites.
        settings: which quantisation.

    Raises:
        ModelError: naming the first module that cannot be quantised, and its type.
    """
    if settings.quantization == "none":
        return
    for site in sites:
        module = model.get_submodule(site.module)
        if not _is_quantizable(module):
            raise ModelError(
                f"model.quantization: {settings.quantization} needs linear maps of type Linear or "
                f"Conv1D, and {site.module} is of type {type(module).__name__}, which bitsandbytes "
                "leaves as it is: set model.quantization to none, and model.dtype to a narrower "
                "one to save memory."
            )
        if settings.quantization == "int4" and site.width % _INT4_BLOCK:
            raise ModelError(
                f"model.quantization: int4 needs linear maps whose inputs are a multiple of "
                f"{_INT4_BLOCK}, and {site.module} has {site.width}: set it to int8 or none."
            )


def _is_quantizable(module: nn.Module) -> bool:
    # bitsandbytes replaces these very types; it passes over subclasses without a word.
    return type(module) in (nn.Linear, Conv1D)
