"""From a document to samples: what a model would read of it, position by position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ray_app.documents import Document
from ray_app.facts import ModelFacts
from ray_app.models.architecture import ImageArchitecture
from ray_app.models.loading import load_tokenizer
from ray_app.study import CaptureSettings, Study, StudyError

if TYPE_CHECKING:
    import transformers

__all__ = ["Encoded", "Encoder", "ImageEncoder", "TextEncoder", "open_encoder"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The content of one sample."""

    counted: list[bool]
    """Of each position, whether it counts in statistics."""
    token_ids: list[int] | None = None
    """What a language model reads."""
    image: bytes | None = None
    """What a vision model reads, encoded."""
    label_id: int | None = None
    """Index of its class in the model's output."""


class Encoder(Protocol):
    """Makes samples of documents for one model."""

    def samples_of(self, document: Document, random: np.random.Generator) -> list[Encoded]:
        """The samples that a document yields; each has a position that counts.

        Args:
            document: the document.
            random: chooses if a document has more than are wanted.

        Raises:
            StudyError: if its label is none that the model predicts.
        """

    def cut(self, sample: Encoded, wanted: int) -> Encoded:
        """The sample, without what goes beyond the wanted number of counted positions."""

    def columns(self, sample: Encoded) -> dict[str, Any]:
        """Its columns of table ``samples`` that say what the model reads."""

    def show(self, sample: Encoded) -> str:
        """The sample for people."""


class TextEncoder:
    """Cuts texts into samples of token ids, and tells tokens' texts and which are special."""

    def __init__(
        self, tokenizer: "transformers.PreTrainedTokenizerBase", capture: CaptureSettings
    ) -> None:
        """Take a tokenizer into use.

        Raises:
            StudyError: if long documents are to be split and the tokenizer cannot do it.
        """
        if capture.long_documents == "split" and not tokenizer.is_fast:
            raise StudyError(
                "capture.long_documents: split needs a tokenizer of the tokenizers library, and "
                f"this model has {type(tokenizer).__name__}: write truncate."
            )
        self._tokenizer = tokenizer
        self._capture = capture
        self._special = frozenset(tokenizer.all_special_ids)
        self._texts: dict[int, str] = {}

    def samples_of(self, document: Document, random: np.random.Generator) -> list[Encoded]:
        """See `Encoder.samples_of`; `random` chooses the windows."""
        if not document.text.strip():
            return []
        capture = self._capture
        split = capture.long_documents == "split"
        encoded = self._tokenizer(
            [document.text],
            truncation=True,
            max_length=capture.max_length,
            return_overflowing_tokens=split,
            verbose=False,
        )
        windows = [Encoded(self.counted(ids), token_ids=ids) for ids in encoded["input_ids"]]
        windows = [window for window in windows if any(window.counted)]
        wanted = capture.windows_per_document
        if split and wanted is not None and len(windows) > wanted:
            chosen = sorted(random.choice(len(windows), size=wanted, replace=False))
            windows = [windows[index] for index in chosen]
        return windows

    def cut(self, sample: Encoded, wanted: int) -> Encoded:
        """The tokens up to the wanted number of counted ones."""
        reached = np.flatnonzero(np.cumsum(sample.counted) >= wanted)
        if sample.token_ids is None or not len(reached):
            return sample
        stop = int(reached[0]) + 1
        return replace(sample, counted=sample.counted[:stop], token_ids=sample.token_ids[:stop])

    def columns(self, sample: Encoded) -> dict[str, Any]:
        """See `Encoder.columns`."""
        ids = sample.token_ids or []
        return {
            "text": self.show(sample),
            "token_ids": ids,
            "tokens": self.texts(ids),
            "is_special": self.special(ids),
        }

    def show(self, sample: Encoded) -> str:
        """Its text, decoded from its tokens."""
        return str(self._tokenizer.decode(list(sample.token_ids or [])))

    def special(self, token_ids: Sequence[int]) -> list[bool]:
        """Whether each token is one of the tokenizer's special tokens."""
        return [token in self._special for token in token_ids]

    def counted(self, token_ids: Sequence[int]) -> list[bool]:
        """Whether each token counts in statistics."""
        if self._capture.counts_special("language"):
            return [True] * len(token_ids)
        return [token not in self._special for token in token_ids]

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        for token in set(token_ids) - self._texts.keys():
            self._texts[token] = str(self._tokenizer.decode([token]))
        return [self._texts[token] for token in token_ids]


class ImageEncoder:
    """Makes one sample of each image, and finds its label among the model's classes."""

    def __init__(self, architecture: ImageArchitecture, capture: CaptureSettings) -> None:
        grid = architecture.grid
        self._architecture = architecture
        self._class_of = {name: index for index, name in enumerate(architecture.classes)}
        self._tokens = grid.texts
        self._is_special = [place < len(grid.prefix) for place in range(len(grid.texts))]
        counts_special = capture.counts_special("image")
        self._counted = [counts_special or not special for special in self._is_special]

    def samples_of(self, document: Document, random: np.random.Generator) -> list[Encoded]:
        """See `Encoder.samples_of`; the whole image, or nothing if there is none."""
        if document.image is None:
            return []
        label_id = None
        if document.label is not None and self._architecture.num_outputs > 0:
            label_id = self._label_id(document, document.label)
        return [Encoded(self._counted, image=document.image, label_id=label_id)]

    def cut(self, sample: Encoded, wanted: int) -> Encoded:
        """The image, which is whole or not there."""
        return sample

    def columns(self, sample: Encoded) -> dict[str, Any]:
        """See `Encoder.columns`."""
        return {
            "label_id": sample.label_id,
            "image": sample.image,
            "tokens": self._tokens,
            "is_special": self._is_special,
        }

    def show(self, sample: Encoded) -> str:
        """Its size; the source says which image it is."""
        label = "" if sample.label_id is None else f", class {sample.label_id}"
        return f"image of {len(sample.image or b''):,} bytes{label}"

    def _label_id(self, document: Document, label: str) -> int:
        # Names tell more than numbers: datasets count the same classes in other orders.
        number = self._class_of.get(label, document.label_id)
        classes = self._architecture.num_outputs
        if number is None or not 0 <= number < classes:
            known = ", ".join(list(self._class_of)[:5])
            named = f", or their names ({known}, ...)" if known else ""
            raise StudyError(
                f"the label {label!r} of {document.source} is no class of the model, whose classes "
                f"are 0 to {classes - 1}{named}: choose another label_column, leave it out, or "
                "keep rows with classes of the model by a filter."
            )
        return number


def open_encoder(study: Study, model: ModelFacts) -> Encoder:
    """The encoder of a study's model.

    Raises:
        ModelError: if its tokenizer cannot be read.
        StudyError: if it cannot do what the study asks for.
    """
    architecture = model.architecture
    if isinstance(architecture, ImageArchitecture):
        return ImageEncoder(architecture, study.capture)
    return TextEncoder(load_tokenizer(study.model, model.files), study.capture)
