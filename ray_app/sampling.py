"""From documents to shards: cutting, tokenising, and packing samples, the same way every time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ray_app.documents import Document, open_documents, task_seed
from ray_app.study import CaptureSettings, Study, StudyError
from storage import TABLES

if TYPE_CHECKING:
    import transformers

__all__ = ["Encoder", "TaskDraw", "draw_task", "open_all_documents"]


class Encoder:
    """Cuts a text into samples of token ids, and tells tokens' texts and which are special."""

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

    def samples_of(self, text: str, random: np.random.Generator) -> list[list[int]]:
        """Token ids of the samples that a document yields; each has a token that counts.

        Args:
            text: the document.
            random: chooses the windows if a document has more than are wanted.
        """
        if not text.strip():
            return []
        capture = self._capture
        split = capture.long_documents == "split"
        encoded = self._tokenizer(
            [text],
            truncation=True,
            max_length=capture.max_length,
            return_overflowing_tokens=split,
            verbose=False,
        )
        windows = [ids for ids in encoded["input_ids"] if any(self.counted(ids))]
        wanted = capture.windows_per_document
        if split and wanted is not None and len(windows) > wanted:
            chosen = sorted(random.choice(len(windows), size=wanted, replace=False))
            windows = [windows[index] for index in chosen]
        return windows

    def special(self, token_ids: Sequence[int]) -> list[bool]:
        """Whether each token is one of the tokenizer's special tokens."""
        return [token in self._special for token in token_ids]

    def counted(self, token_ids: Sequence[int]) -> list[bool]:
        """Whether each token counts in statistics."""
        if self._capture.special_tokens == "include":
            return [True] * len(token_ids)
        return [token not in self._special for token in token_ids]

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        for token in set(token_ids) - self._texts.keys():
            self._texts[token] = str(self._tokenizer.decode([token]))
        return [self._texts[token] for token in token_ids]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a sample."""
        return str(self._tokenizer.decode(list(token_ids)))


@dataclass(slots=True)
class TaskDraw:
    """What a task yielded, counted while its shards were made."""

    num_documents: int = 0
    """Documents read."""
    num_empty: int = 0
    """Documents set aside because no token that counts was in them."""
    num_samples: int = 0
    """Samples."""
    num_tokens: int = 0
    """Tokens."""
    num_counted: int = 0
    """Tokens that count in statistics."""
    num_shards: int = 0
    """Shards."""
    members: Counter[str] = field(default_factory=Counter)
    """Of a mixture: documents that came from each member; those that gave none are not in it."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """(source, text) of the first samples, for people to look at."""


@dataclass(frozen=True, slots=True)
class _Sample:
    index: int
    source: str
    label: str | None
    token_ids: list[int]


class _Stream:
    """Documents of a task, and how many were drawn."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self._documents = documents
        self.num_drawn = 0

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        document = next(self._documents)
        self.num_drawn += 1
        return document


def open_all_documents(study: Study) -> dict[str, Iterator[Document]]:
    """Document streams of all tasks.

    A mixture continues where its members stopped and never repeats a document of theirs, so it
    must be drawn after them. Mixtures do not know of each other: two that share a member may share
    documents, and adding one changes nothing in another.
    """
    streams = {
        name: _Stream(open_documents(name, task, study.seed))
        for name, task in study.tasks.items()
        if task.mixture is None
    }
    mixtures = {
        name: islice(_mixture(name, study, streams), task.limit)
        for name, task in study.tasks.items()
        if task.mixture is not None
    }
    return {**streams, **mixtures}


def draw_task(
    name: str,
    study: Study,
    documents: Iterable[Document],
    encoder: Encoder,
    on_shard: Callable[[int, pa.Table], None],
) -> TaskDraw:
    """Draw the samples of one task and hand over its shards one by one.

    Samples are drawn until the task's tokens are reached; the last one is cut to reach them
    exactly. Shards take samples in the order drawn, so that each is a random part of the task;
    inside a shard, batches are packed by length.

    Args:
        name: name of the task.
        study: the study.
        documents: the task's documents.
        encoder: the model's tokenizer.
        on_shard: called with the index and the table ``samples`` of each shard.
    """
    draw = TaskDraw()
    pending: list[_Sample] = []
    num_pending = 0
    for sample in _samples(name, study, documents, encoder, draw):
        size = len(sample.token_ids)
        if pending and num_pending + size > study.capture.shard_tokens:
            on_shard(draw.num_shards, _shard_table(draw, pending, encoder, study.capture))
            pending, num_pending = [], 0
        pending.append(sample)
        num_pending += size
    if pending:
        on_shard(draw.num_shards, _shard_table(draw, pending, encoder, study.capture))
    return draw


def _mixture(name: str, study: Study, streams: Mapping[str, _Stream]) -> Iterator[Document]:
    uses = Counter(member for task in study.tasks.values() for member in task.mixture or ())
    members: dict[str, Iterator[Document]] = {}
    for member in study.tasks[name].mixture or ():
        members[member] = stream = streams[member]
        if uses[member] > 1:
            # Read again up to here, so that no documents need to be kept for the other mixtures.
            opened = open_documents(member, study.tasks[member], study.seed)
            members[member] = islice(opened, stream.num_drawn, None)
    yield from _in_turn(members)


def _in_turn(members: dict[str, Iterator[Document]]) -> Iterator[Document]:
    exhausted: set[str] = set()
    for name in cycle(members):
        if len(exhausted) == len(members):
            return
        if name not in exhausted:
            document = next(members[name], None)
            if document is None:
                exhausted.add(name)
            else:
                yield Document(
                    source=f"{name}/{document.source}",
                    text=document.text,
                    label=document.label or name,
                )


def _samples(
    name: str, study: Study, documents: Iterable[Document], encoder: Encoder, draw: TaskDraw
) -> Iterator[_Sample]:
    random = np.random.default_rng(task_seed(name, study.seed))
    wanted = study.tokens_of(name)
    for document in documents:
        draw.num_documents += 1
        if study.tasks[name].mixture is not None:
            draw.members[document.source.partition("/")[0]] += 1
        windows = encoder.samples_of(document.text, random)
        draw.num_empty += not windows
        for token_ids in windows:
            cut = _cut(token_ids, encoder.counted(token_ids), wanted - draw.num_counted)
            yield _Sample(draw.num_samples, document.source, document.label, cut)
            draw.num_samples += 1
            draw.num_tokens += len(cut)
            draw.num_counted += sum(encoder.counted(cut))
            if len(draw.examples) < 3:
                draw.examples.append((document.source, encoder.text(cut)))
            if draw.num_counted >= wanted:
                return


def _cut(token_ids: list[int], counted: list[bool], wanted: int) -> list[int]:
    """The tokens up to the wanted number of counted ones."""
    reached = np.flatnonzero(np.cumsum(counted) >= wanted)
    return token_ids[: reached[0] + 1] if len(reached) else token_ids


def _shard_table(
    draw: TaskDraw, samples: list[_Sample], encoder: Encoder, capture: CaptureSettings
) -> pa.Table:
    batches = _pack(samples, capture.batch_tokens)
    rows = [
        {
            "shard": draw.num_shards,
            "batch": batch,
            "sample": sample.index,
            "source": sample.source,
            "label": sample.label,
            "text": encoder.text(sample.token_ids),
            "token_ids": sample.token_ids,
            "tokens": encoder.texts(sample.token_ids),
            "is_special": encoder.special(sample.token_ids),
            "counted": encoder.counted(sample.token_ids),
            "num_tokens": len(sample.token_ids),
            "num_counted": sum(encoder.counted(sample.token_ids)),
        }
        for batch, members in enumerate(batches)
        for sample in members
    ]
    draw.num_shards += 1
    return pa.Table.from_pylist(rows, schema=TABLES["samples"].schema)


def _pack(samples: list[_Sample], batch_tokens: int) -> list[list[_Sample]]:
    """Batches of samples of similar length, longest first so that memory peaks at the start."""
    batches: list[list[_Sample]] = []
    for sample in sorted(samples, key=lambda sample: (-len(sample.token_ids), sample.index)):
        # The first sample of a batch is its longest: it sets the padded length of all.
        if batches and len(batches[-1][0].token_ids) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches
