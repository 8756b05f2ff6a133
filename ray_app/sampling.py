"""From documents to shards: drawing and packing samples, the same way every time."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from ray_app.documents import Document, open_documents, task_seed
from ray_app.encoders import Encoded, Encoder
from ray_app.models.architecture import Modality
from ray_app.study import CaptureSettings, Study
from storage import TABLES

__all__ = ["TaskDraw", "draw_task", "open_all_documents"]


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
    num_image_bytes: int = 0
    """Bytes of encoded images."""
    members: Counter[str] = field(default_factory=Counter)
    """Of a mixture: documents that came from each member; those that gave none are not in it."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """(source, text or description) of the first samples, for people to look at."""


@dataclass(frozen=True, slots=True)
class _Sample:
    index: int
    source: str
    label: str | None
    content: Encoded

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.content.counted)


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


def open_all_documents(
    study: Study,
    modality: Modality = "language",
    *,
    used: Mapping[str, Container[str]] = MappingProxyType({}),
) -> dict[str, Iterator[Document]]:
    """Document streams of all tasks, with the texts or images that a model reads.

    A mixture continues where its members stopped and never repeats a document of theirs, so it
    must be drawn after them. Mixtures do not know of each other: two that share a member may share
    documents, and adding one changes nothing in another.

    Args:
        study: the study.
        modality: what the model reads.
        used: sources of documents that are passed over, by task that is no mixture.
    """
    streams = {
        name: _Stream(_unused(name, study, modality, used))
        for name, task in study.tasks.items()
        if task.mixture is None
    }
    mixtures = {
        name: islice(_mixture(name, study, streams, modality, used), task.limit)
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
    exactly, if the encoder can cut samples. Shards take samples in the order drawn, so that each is
    a random part of the task; inside a shard, batches are packed by length.

    Args:
        name: name of the task.
        study: the study.
        documents: the task's documents.
        encoder: the model's encoder.
        on_shard: called with the index and the table ``samples`` of each shard.
    """
    draw = TaskDraw()
    pending: list[_Sample] = []
    num_pending = 0
    for sample in _samples(name, study, documents, encoder, draw):
        if pending and num_pending + sample.size > study.capture.shard_tokens:
            on_shard(draw.num_shards, _shard_table(draw, pending, encoder, study.capture))
            pending, num_pending = [], 0
        pending.append(sample)
        num_pending += sample.size
    if pending:
        on_shard(draw.num_shards, _shard_table(draw, pending, encoder, study.capture))
    return draw


def _unused(
    name: str, study: Study, modality: Modality, used: Mapping[str, Container[str]]
) -> Iterator[Document]:
    documents = open_documents(name, study.tasks[name], study.seed, modality)
    return (document for document in documents if document.source not in used.get(name, ()))


def _mixture(
    name: str,
    study: Study,
    streams: Mapping[str, _Stream],
    modality: Modality,
    used: Mapping[str, Container[str]],
) -> Iterator[Document]:
    uses = Counter(member for task in study.tasks.values() for member in task.mixture or ())
    members: dict[str, Iterator[Document]] = {}
    for member in study.tasks[name].mixture or ():
        members[member] = stream = streams[member]
        if uses[member] > 1:
            # Read again up to here, so that no documents need to be kept for the other mixtures.
            opened = _unused(member, study, modality, used)
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
                # The label of an image is a class that the model knows.
                label = document.label or (name if document.image is None else None)
                yield replace(document, source=f"{name}/{document.source}", label=label)


def _samples(
    name: str, study: Study, documents: Iterable[Document], encoder: Encoder, draw: TaskDraw
) -> Iterator[_Sample]:
    random = np.random.default_rng(task_seed(name, study.seed))
    wanted = study.tokens_of(name)
    for document in documents:
        draw.num_documents += 1
        if study.tasks[name].mixture is not None:
            draw.members[document.source.partition("/")[0]] += 1
        samples = encoder.samples_of(document, random)
        draw.num_empty += not samples
        for encoded in samples:
            content = encoder.cut(encoded, wanted - draw.num_counted)
            yield _Sample(draw.num_samples, document.source, document.label, content)
            draw.num_samples += 1
            draw.num_tokens += len(content.counted)
            draw.num_counted += sum(content.counted)
            draw.num_image_bytes += len(content.image or b"")
            if len(draw.examples) < 3:
                draw.examples.append((document.source, encoder.show(content)))
            if draw.num_counted >= wanted:
                return


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
            "counted": sample.content.counted,
            "num_tokens": sample.size,
            "num_counted": sum(sample.content.counted),
        }
        | encoder.columns(sample.content)
        for batch, members in enumerate(batches)
        for sample in members
    ]
    draw.num_shards += 1
    return pa.Table.from_pylist(rows, schema=TABLES["samples"].schema)


def _pack(samples: list[_Sample], batch_tokens: int) -> list[list[_Sample]]:
    """Batches of samples of similar length, longest first so that memory peaks at the start."""
    batches: list[list[_Sample]] = []
    for sample in sorted(samples, key=lambda sample: (-sample.size, sample.index)):
        # The first sample of a batch is its longest: it sets the padded length of all.
        if batches and batches[-1][0].size * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches
