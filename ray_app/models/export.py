"""Writing a model without some of its neurons as a checkpoint that transformers or timm loads."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ray_app.models.errors import ModelError
from ray_app.models.loading import ModelFiles, load_stage, load_tokenizer
from ray_app.models.parts import StageModel
from ray_app.models.sites import SiteLocation
from ray_app.models.timm_models import timm_name
from ray_app.study import ModelSettings

__all__ = ["check_exportable", "delete_neurons", "export_model"]

Neurons = Mapping[tuple[str, int], np.ndarray]


def check_exportable(
    settings: ModelSettings,
    sites: Sequence[SiteLocation],
    skeleton: nn.Module,
    neurons: Neurons,
    *,
    has_values: bool,
    out: Path,
) -> None:
    """Refuse what cannot be exported, before weights are read.

    Args:
        settings: which model.
        sites: where its neurons are.
        skeleton: its modules (`Architecture.skeleton`).
        neurons: the neurons to delete, by (site, layer).
        has_values: whether they are to be replaced with other constants than zero.
        out: folder to make.

    Raises:
        ModelError: if the folder is there already, the model is quantised, or a projection has no
            bias that could hold the values.
    """
    if out.exists():
        raise ModelError(f"--out must not exist yet, found {out}: name a new folder.")
    if settings.quantization != "none":
        raise ModelError(
            f"a model that was captured in {settings.quantization} cannot be exported, because the "
            "weights that stand for its neurons are rounded together: capture it with "
            "model.quantization: none."
        )
    for site in sites:
        touched = has_values and (site.site, site.layer) in neurons
        if touched and getattr(skeleton.get_submodule(site.module), "bias", None) is None:
            raise ModelError(
                f"only --kind zero can be exported of this model: {site.module} has no bias that "
                "could hold what the removed neurons are replaced with."
            )


def export_model(
    settings: ModelSettings,
    files: ModelFiles,
    sites: Sequence[SiteLocation],
    neurons: Neurons,
    values: Neurons,
    out: Path,
) -> None:
    """Write a model with neurons deleted, in the folder form that it is loaded from.

    Args:
        settings: which model.
        files: from `locate_model`.
        sites: where its neurons are.
        neurons: the neurons to delete, by (site, layer).
        values: what the deleted ones are taken to be, in the same order; zero where not given.
        out: folder to make.

    Raises:
        ModelError: if the model cannot be loaded, or the folder not be written.
    """
    stage = load_stage(settings, files)
    model: Any = stage.model
    for site in sites:
        key = site.site, site.layer
        if key in neurons:
            delete_neurons(model.get_submodule(site.module), neurons[key], values.get(key))
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _save(stage, settings, files, temporary)
        temporary.rename(out)
    except OSError as error:
        raise ModelError(f"cannot write --out {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_neurons(module: nn.Module, neurons: np.ndarray, values: np.ndarray | None) -> None:
    """Set the weights that an output projection multiplies neurons with to zero.

    Args:
        module: the projection, changed in place.
        neurons: (K,) the neurons.
        values: (K,) constants that the neurons are replaced with, whose part of the output goes
            into the bias; zeros if not given.
    """
    chosen = torch.from_numpy(neurons.astype(np.int64))
    weight: Any = module.weight
    # GPT-2's Conv1D keeps its weight transposed.
    columns: Tensor = weight.T if isinstance(module, Conv1D) else weight
    with torch.no_grad():
        if values is not None:
            bias: Any = module.bias
            constant = columns[:, chosen].double() @ torch.from_numpy(values).double()
            bias += constant.to(bias.dtype)
        columns[:, chosen] = 0


def _save(stage: StageModel, settings: ModelSettings, files: ModelFiles, folder: Path) -> None:
    model: Any = stage.model
    if timm_name(files.name) is not None:
        _save_timm(model, files.name, folder)
        return
    model.save_pretrained(folder)
    if stage.architecture.modality == "language":
        reader: Any = load_tokenizer(settings, files)
    else:
        reader = transformers.AutoImageProcessor.from_pretrained(
            files.name, revision=settings.revision
        )
    reader.save_pretrained(folder)


def _save_timm(model: Any, source: str, folder: Path) -> None:
    config = Path(source) / "config.json"
    if not config.is_file():
        save_for_hf(model, str(folder), safe_serialization=True)
        return
    # It says more than timm would write anew, such as the names of classes.
    shutil.copyfile(config, folder / config.name)
    safetensors.torch.save_model(model, str(folder / "model.safetensors"), {"format": "pt"})
