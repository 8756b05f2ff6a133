"""Tiny vision transformers, images whose labels are known, and studies over them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from timm.models import save_for_hf

LABELS = ["crab", "trout", "shark", "spider"]

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3,
        "num_classes": 4}  # fmt: skip
"""Arguments of a tiny timm model."""

TIMM_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "timm": ("vit_tiny_patch16_224", TIMM),
    "timm-registers": (
        "vit_tiny_patch16_224",
        TIMM | {"reg_tokens": 2, "global_pool": "avg", "init_values": 0.5, "pre_norm": True},
    ),
    "timm-distilled": ("deit_tiny_distilled_patch16_224", TIMM),
    "timm-headless": ("vit_tiny_patch16_224", TIMM | {"num_classes": 0}),
    "timm-grey": ("vit_tiny_patch16_224", TIMM | {"in_chans": 1}),
}

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "id2label": dict(enumerate(LABELS)),
}
TRANSFORMERS_MODELS: dict[str, transformers.PreTrainedConfig] = {
    "vit": transformers.ViTConfig(**_SMALL),
    "deit": transformers.DeiTConfig(**_SMALL, architectures=["DeiTForImageClassification"]),
    "dinov2": transformers.Dinov2Config(**_SMALL | {"mlp_ratio": 2}),
}


def png(image: np.ndarray) -> bytes:
    """An image (height, width[, channels]) as PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def random_image(seed: int, channels: int = 3) -> bytes:
    """A PNG of noise that only depends on the arguments."""
    shape = (20, 20) if channels == 1 else (20, 20, channels)
    return png(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def one_thread() -> Any:
    """Every stage computes with one thread, as the models that it is compared with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny vision transformer."""
    root = tmp_path_factory.mktemp("vision-models")

    def make(kind: str) -> Path:
        folder = root / kind
        if folder.exists():
            return folder
        torch.manual_seed(0)
        if kind in TIMM_MODELS:
            name, arguments = TIMM_MODELS[kind]
            model = enlarged(timm.create_model(name, **arguments))
            known = {"label_names": LABELS[: arguments["num_classes"]]}
            save_for_hf(model, str(folder), known, model_args=arguments, safe_serialization=True)
        else:
            config = TRANSFORMERS_MODELS[kind]
            enlarged(
                transformers.AutoModelForImageClassification.from_config(config)
            ).save_pretrained(folder)
            transformers.ViTImageProcessor(
                size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
            ).save_pretrained(folder)
        return folder

    return make


def enlarged(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with weights large enough to tell images apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes images as Parquet: by default 24 of noise, with labels in turn."""

    def write(
        images: list[bytes] | None = None,
        labels: list[Any] | None = None,
        *,
        name: str = "images.parquet",
    ) -> Path:
        images = images or [random_image(seed) for seed in range(24)]
        labels = labels or [LABELS[index % 4] for index in range(len(images))]
        stored = [{"bytes": image, "path": None} for image in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        path = tmp_path / name
        pq.write_table(
            pa.table(
                {"image": pa.array(stored, kind), "label": labels, "number": range(len(images))}
            ),
            path,
        )
        return path

    return write


@pytest.fixture
def write_vision_study(
    tmp_path: Path, vision_folder: Callable[[str], Path], write_images: Callable[..., Path]
) -> Callable[..., Path]:
    """Writes a small study of a kind of model; keyword arguments replace its top-level keys."""

    def write(kind: str = "vit", **changes: Any) -> Path:
        common = {
            "dataset": "parquet",
            "data_files": str(write_images(name="noise.parquet")),
            "label_column": "label",
        }
        fish = {"superclasses": "cifar20", "superclass": "fish"}
        study: dict[str, Any] = {
            "name": "pictures",
            "model": {"source": str(vision_folder(kind))},
            "tasks": {
                "crabs": common | {"filter": {"label": "crab"}},
                "fish": common | fish,
                "all": common,
            },
            "reference": "all",
            "capture": {"tokens": 100, "batch_tokens": 60, "shard_tokens": 60},
        }
        path = tmp_path / "pictures.yaml"
        path.write_text(yaml.safe_dump(study | changes), encoding="utf-8")
        return path

    return write
