"""Train a small vision transformer on scikit-learn's scanned digits, and write both to a folder.

    python studies/make_digits_vit.py demo-digits

The folder gets ``train.parquet`` and ``test.parquet`` (8 x 8 scans as PNG, with their labels),
``model/`` as timm's save_for_hf writes it, and ``model/training.json``, which says how well it
went. What is there already is not made again. studies/digits-vit.yaml reads the folder.
"""

import io
import json
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

SEED = 0
NAMES = [str(digit) for digit in range(10)]
MODEL = "vit_tiny_patch16_224"
ARGUMENTS = {
    "img_size": 32, "patch_size": 8, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4,
    "num_classes": 10, "class_token": True,
}  # fmt: skip
DATA = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "crop_pct": 1.0}
EPOCHS, BATCH, LEARNING_RATE = 24, 32, 1e-3


def main(folder: Path) -> None:
    """Write images, and the model if it is not there."""
    scans, labels = load_digits(return_X_y=True)
    # Scans have 17 levels of grey.
    images = (scans.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    parts = train_test_split(images, labels, test_size=0.3, random_state=SEED, stratify=labels)
    train, test, train_labels, test_labels = parts
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder / "train.parquet", train, train_labels)
    write_images(folder / "test.parquet", test, test_labels)
    if not (folder / "model" / "training.json").exists():
        fit(folder / "model", (train, train_labels), (test, test_labels))
    log = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
    print(
        f"{folder}: {len(train)} + {len(test)} digits, a vision transformer with "
        f"{log['test_accuracy']:.1%} test accuracy after {log['seconds']:.0f} s of training"
    )


def write_images(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images (n, 8, 8) as the columns image and label."""
    columns = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": labels.tolist(),
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).to_parquet(path)


def png(image: np.ndarray) -> bytes:
    """A grey image as PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def fit(
    folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> None:
    """Train from random weights and write the model with its log."""
    start = time.monotonic()
    torch.set_num_threads(1)  # With more, sums round in another order, and weights differ.
    torch.manual_seed(SEED)
    model = timm.create_model(MODEL, **ARGUMENTS)
    model.pretrained_cfg |= DATA
    transform = create_transform(**resolve_data_config(DATA), is_training=False)
    pixels, labels = tensors(transform, *train)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.2
    )
    losses = []
    for _ in range(EPOCHS):
        epoch = []
        for chosen in torch.randperm(len(labels)).split(BATCH):
            loss = cross_entropy(model(moved(pixels[chosen])), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            epoch.append(loss.item())
        losses.append(float(np.mean(epoch)))
    model.eval()
    accuracy = {
        "train_accuracy": share_right(model, pixels, labels),
        "test_accuracy": share_right(model, *tensors(transform, *test)),
    }
    save_for_hf(
        model, str(folder), {"label_names": NAMES}, model_args=ARGUMENTS, safe_serialization=True
    )
    log = accuracy | {"seconds": time.monotonic() - start, "seed": SEED, "losses": losses}
    (folder / "training.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def tensors(transform: nn.Module, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Pixels (n, 1, 32, 32) as the model reads them, and labels (n,)."""
    pixels = [transform(Image.fromarray(image)) for image in images]
    return torch.stack(pixels), torch.from_numpy(labels)


def moved(pixels: Tensor) -> Tensor:
    """The images, each shifted by up to half a pixel of its scan, which is 2 of these."""
    size = pixels.shape[-1]
    padded = pad(pixels, (2, 2, 2, 2), value=-1.0)
    places = torch.randint(0, 5, (len(pixels), 2)).tolist()
    return torch.stack(
        [padded[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(places)]
    )


def share_right(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of the images whose class the model finds."""
    with torch.inference_mode():
        return float((model(pixels).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
