"""What language and images differ in once their samples are in the store.

A run's model decides what it is given of a batch, how its last stage's output is scored, and which
tables that makes. Everything else of a capture knows positions only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ray_app.capture.shards import Batch
from ray_app.models.architecture import Architecture, ImageArchitecture
from ray_app.models.images import ImageError
from ray_app.models.prediction import Prediction, score_predictions, score_rows

__all__ = ["Images", "Language", "Modality", "UnreadableError", "modality_of"]

_PREDICTED = {"loss": pa.float32(), "top1": pa.bool_(), "top10": pa.bool_()}
"""Columns that say how well something was predicted."""


class UnreadableError(Exception):
    """Samples of a batch cannot be read: why, by row of the batch."""

    def __init__(self, failing: dict[int, str]) -> None:
        super().__init__(failing)
        self.failing = failing


class Modality(Protocol):
    """What a model reads, and how well it predicts."""

    def inputs(self, batch: Batch, *, is_first: bool) -> Tensor:
        """What the model is given.

        Args:
            batch: the batch.
            is_first: whether for the first stage; later ones take the shape only.

        Raises:
            UnreadableError: if samples cannot be read.
        """

    def score(self, batch: Batch, inputs: Tensor, output: Tensor) -> list[Prediction]:
        """How well each sample was predicted.

        Args:
            batch: the batch.
            inputs: what the model was given.
            output: logits of the last stage, on any device.
        """

    def place(self, index: int) -> str:
        """What the prediction of that index inside a sample is about, for people."""

    def token_columns(
        self, lengths: np.ndarray, predictions: Sequence[Prediction]
    ) -> dict[str, pa.Array]:
        """Columns of table ``tokens`` that say how well each was predicted.

        Args:
            lengths: (S,) positions of each sample.
            predictions: of each sample.
        """

    def tables(
        self, samples: pa.Table, predictions: Sequence[Prediction]
    ) -> dict[str, dict[str, pa.Array]]:
        """Columns of further tables by name, one row per sample, without the shard."""


class Language:
    """Token ids; every token but the first is predicted from those before it."""

    def __init__(self, *, compiled: bool = False) -> None:
        self._compiled = compiled

    def inputs(self, batch: Batch, *, is_first: bool) -> Tensor:
        """(B, P) int64; padding is 0, which no result depends on."""
        token_ids = torch.zeros(batch.shape, dtype=torch.int64)
        token_ids[batch.valid] = torch.from_numpy(
            pc.list_flatten(batch.rows["token_ids"]).to_numpy().astype(np.int64)
        )
        return token_ids

    def score(self, batch: Batch, inputs: Tensor, output: Tensor) -> list[Prediction]:
        """Of each sample, the tokens after the first; `output` is (B, P, vocabulary)."""
        ids = inputs.to(output.device)
        return [
            score_predictions(output[row, :length], ids[row, :length], compiled=self._compiled)
            for row, length in enumerate(batch.lengths.tolist())
        ]

    def place(self, index: int) -> str:
        """The token's position."""
        return f"position {index + 1}"

    def token_columns(
        self, lengths: np.ndarray, predictions: Sequence[Prediction]
    ) -> dict[str, pa.Array]:
        """Null at the first position of each sample."""
        has_context = np.concatenate([np.arange(length) > 0 for length in lengths])

        def spread(name: str) -> pa.Array:
            values = np.concatenate([getattr(prediction, name) for prediction in predictions])
            column = np.zeros(len(has_context), dtype=values.dtype)
            column[has_context] = values
            return pa.array(column, _PREDICTED[name], mask=~has_context)

        return {name: spread(name) for name in _PREDICTED}

    def tables(
        self, samples: pa.Table, predictions: Sequence[Prediction]
    ) -> dict[str, dict[str, pa.Array]]:
        """None: what is predicted is in ``tokens``."""
        return {}


@dataclass(frozen=True, slots=True)
class _ClassPrediction(Prediction):
    """Arrays of one element, or of none for an image without a label."""

    predicted: int
    """The class that was most probable."""


class Images:
    """Pixels; the class of each image is predicted, if the model has a head."""

    def __init__(self, architecture: ImageArchitecture, *, compiled: bool = False) -> None:
        self._compiled = compiled
        self._read = architecture.reader
        self._classes = architecture.classes
        self._has_head = architecture.num_outputs > 0

    def inputs(self, batch: Batch, *, is_first: bool) -> Tensor:
        """(B, C, H, W) float32."""
        if not is_first:
            return torch.zeros(()).expand(batch.shape[0], *self._read.shape)
        images: list[Tensor] = []
        failing = {}
        for row, data in enumerate(batch.rows["image"].to_pylist()):
            try:
                images.append(self._read(data))
            except ImageError as error:
                failing[row] = str(error)
        if failing:
            raise UnreadableError(failing)
        return torch.stack(images)

    def score(self, batch: Batch, inputs: Tensor, output: Tensor) -> list[Prediction]:
        """The class of each image; `output` is (B, classes)."""
        if not self._has_head:
            return []
        labels = batch.rows["label_id"].to_pylist()
        best = output.float().argmax(1).tolist()
        scored = []
        for logits, label, predicted in zip(output, labels, best, strict=True):
            wanted = torch.tensor([] if label is None else [label], dtype=torch.int64)
            found = score_rows(
                logits.expand(len(wanted), -1), wanted.to(output.device), compiled=self._compiled
            )
            scored.append(_ClassPrediction(found.loss, found.top1, found.top10, predicted))
        return list(scored)

    def place(self, index: int) -> str:
        """There is one prediction."""
        return "its class"

    def token_columns(
        self, lengths: np.ndarray, predictions: Sequence[Prediction]
    ) -> dict[str, pa.Array]:
        """Nothing is predicted of patches."""
        return {name: pa.nulls(int(lengths.sum()), kind) for name, kind in _PREDICTED.items()}

    def tables(
        self, samples: pa.Table, predictions: Sequence[Prediction]
    ) -> dict[str, dict[str, pa.Array]]:
        """Table ``predictions``, if the model has a head."""
        if not self._has_head:
            return {}
        found = [p for p in predictions if isinstance(p, _ClassPrediction)]
        classes = [p.predicted for p in found]
        names = [self._classes[index] if self._classes else None for index in classes]
        return {
            "predictions": {
                "sample": samples["sample"],
                "label": samples["label"],
                "label_id": samples["label_id"],
                "predicted": pa.array(names, pa.string()),
                "predicted_id": pa.array(classes, pa.int32()),
            }
            | {
                name: pa.array([next(iter(getattr(p, name).tolist()), None) for p in found], kind)
                for name, kind in _PREDICTED.items()
            }
        }


def modality_of(architecture: Architecture, *, compiled: bool = False) -> Modality:
    """What a model reads, and how it is scored.

    Args:
        architecture: the model.
        compiled: as for `score_rows`.
    """
    if isinstance(architecture, ImageArchitecture):
        return Images(architecture, compiled=compiled)
    return Language(compiled=compiled)
