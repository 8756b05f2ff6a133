"""Samples are cut, counted and packed the same way every time; tasks do not disturb each other."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import transformers
import yaml

from ray_app.documents import Document
from ray_app.encoders import Encoded, TextEncoder
from ray_app.sampling import TaskDraw, draw_task, open_all_documents
from ray_app.study import CaptureSettings, Study, StudyError, load_study

RANDOM = np.random.default_rng(0)
BOS, EOS = 0, 1


@pytest.fixture
def encoder(tokenizer: transformers.PreTrainedTokenizerFast) -> Callable[..., TextEncoder]:
    return lambda **settings: TextEncoder(tokenizer, CaptureSettings(**settings))


@pytest.fixture
def draw(
    tokenizer: transformers.PreTrainedTokenizerFast, write_study: Callable[..., Path]
) -> Callable[..., tuple[TaskDraw, list[pa.Table]]]:
    """Draws one task from given texts; keyword arguments are settings of the capture."""

    def run(texts: list[str], **capture: Any) -> tuple[TaskDraw, list[pa.Table]]:
        study = load_study(write_study(capture=capture))
        shards: list[pa.Table] = []

        def keep(index: int, table: pa.Table) -> None:
            assert index == len(shards)
            shards.append(table)

        documents = (Document(source=f"d{n}", text=text) for n, text in enumerate(texts))
        encoder = TextEncoder(tokenizer, study.capture)
        return draw_task("code", study, documents, encoder, keep), shards

    return run


def ids_of(encoder: TextEncoder, text: str, random: np.random.Generator) -> list[Any]:
    return [
        sample.token_ids for sample in encoder.samples_of(Document(source="d", text=text), random)
    ]


def column(shards: list[pa.Table], name: str) -> list[Any]:
    return [value for shard in shards for value in shard[name].to_pylist()]


def test_special_tokens_are_known_and_by_default_not_counted(
    encoder: Callable[..., TextEncoder],
) -> None:
    plain = encoder()
    [ids] = ids_of(plain, "one two", RANDOM)
    assert ids[0] == BOS
    assert plain.special(ids) == [True] + [False] * (len(ids) - 1)
    assert plain.counted(ids) == [False] + [True] * (len(ids) - 1)
    # A special token inside the text is no more text than the one before it.
    [ids] = ids_of(plain, "one</s> two", RANDOM)
    assert ids.count(EOS) == 1
    assert not plain.counted(ids)[ids.index(EOS)]


def test_special_tokens_count_where_the_study_says_so(encoder: Callable[..., TextEncoder]) -> None:
    including = encoder(special_tokens="include")
    [ids] = ids_of(including, "one two", RANDOM)
    assert including.counted(ids) == [True] * len(ids)
    assert including.special(ids)[0]


@pytest.mark.parametrize("text", ["", " ", "\n\t", "<s>", "</s></s>"])
def test_a_document_without_a_token_that_counts_gives_no_sample(
    encoder: Callable[..., TextEncoder], text: str
) -> None:
    assert ids_of(encoder(), text, RANDOM) == []
    assert ids_of(encoder(long_documents="split"), text, RANDOM) == []


def test_texts_of_tokens_put_together_are_the_text(encoder: Callable[..., TextEncoder]) -> None:
    plain = encoder()
    text = "def merge(left):\n\treturn 7  # plain"
    [ids] = ids_of(plain, text, RANDOM)
    assert (
        "".join(plain.texts(ids))
        == "<s>" + text
        == plain.show(Encoded(plain.counted(ids), token_ids=ids))
    )
    assert plain.texts(ids) == plain.texts(ids)


def test_long_documents_are_cut_at_the_maximum_length(encoder: Callable[..., TextEncoder]) -> None:
    text = "word and word " * 40
    [whole] = ids_of(encoder(max_length=512), text, RANDOM)
    [cut] = ids_of(encoder(max_length=16), text, RANDOM)
    assert len(whole) > 16
    assert cut == whole[:16]


def test_split_documents_become_windows_that_each_begin_as_a_text(
    encoder: Callable[..., TextEncoder],
) -> None:
    text = "one two three four five six seven eight nine ten " * 8
    [whole] = ids_of(encoder(max_length=512), text, RANDOM)
    windows = ids_of(encoder(max_length=16, long_documents="split"), text, RANDOM)
    assert [len(window) for window in windows[:-1]] == [16] * (len(windows) - 1)
    assert all(window[0] == BOS for window in windows)
    assert [token for window in windows for token in window[1:]] == whole[1:]


def test_some_windows_of_a_document_are_chosen_by_the_seed(
    encoder: Callable[..., TextEncoder],
) -> None:
    text = " ".join(str(number) for number in range(200))
    windows = ids_of(encoder(max_length=16, long_documents="split"), text, RANDOM)
    few = encoder(max_length=16, long_documents="split", windows_per_document=3)
    chosen = ids_of(few, text, np.random.default_rng(0))
    assert len(windows) > 10
    assert len(chosen) == 3
    places = [windows.index(window) for window in chosen]
    assert places == sorted(set(places))
    assert ids_of(few, text, np.random.default_rng(0)) == chosen
    others = [ids_of(few, text, np.random.default_rng(seed)) for seed in range(1, 6)]
    assert any(other != chosen for other in others)
    assert ids_of(few, "short", RANDOM) == ids_of(encoder(), "short", RANDOM)


def test_a_tokenizer_that_cannot_split_is_refused(
    tokenizer: transformers.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    TextEncoder(tokenizer, CaptureSettings())
    with pytest.raises(StudyError) as caught:
        TextEncoder(tokenizer, CaptureSettings(long_documents="split"))
    assert str(caught.value) == (
        "capture.long_documents: split needs a tokenizer of the tokenizers library, and this model "
        f"has {type(tokenizer).__name__}: write truncate."
    )


@pytest.mark.parametrize("wanted", [1, 7, 50, 123])
def test_a_task_has_exactly_the_tokens_that_were_asked_for(
    draw: Callable[..., Any], wanted: int
) -> None:
    done, shards = draw(["one two three four five"] * 100, tokens=wanted, shard_tokens=40)
    assert done.num_counted == wanted
    assert sum(column(shards, "num_counted")) == wanted
    assert sum(column(shards, "num_tokens")) == done.num_tokens == wanted + done.num_samples
    assert len(column(shards, "sample")) == done.num_samples
    assert len(shards) == done.num_shards


def test_documents_that_end_early_give_what_they_have(draw: Callable[..., Any]) -> None:
    done, shards = draw(["one two", "", "three"], tokens=1000)
    assert (done.num_documents, done.num_empty, done.num_samples) == (3, 1, 2)
    assert done.num_counted == sum(column(shards, "num_counted")) < 1000


def test_nothing_is_drawn_beyond_what_is_needed(
    tokenizer: transformers.PreTrainedTokenizerFast, write_study: Callable[..., Path]
) -> None:
    study = load_study(write_study(capture={"tokens": 20}))

    def endless() -> Iterator[Document]:
        for number in range(1000):
            yield Document(source=f"d{number}", text="one two three four five six seven")
        raise AssertionError("drawn to the end")

    documents = endless()
    done = draw_task(
        "code", study, documents, TextEncoder(tokenizer, study.capture), lambda *_: None
    )
    assert done.num_documents < 20
    assert next(documents).source == f"d{done.num_documents}"


def test_shards_close_before_they_would_grow_too_large(draw: Callable[..., Any]) -> None:
    texts = ["one two three " * (1 + n % 4) for n in range(60)]
    done, shards = draw(texts, tokens=400, shard_tokens=50, max_length=32)
    sizes = [sum(shard["num_tokens"].to_pylist()) for shard in shards]
    assert all(size <= 50 for size in sizes)
    # No shard could have taken the first sample of the next one as well.
    for size, after in zip(sizes, shards[1:], strict=False):
        first = after.sort_by("sample")["num_tokens"][0].as_py()
        assert size + first > 50
    assert done.num_shards == len(sizes) > 5


def test_a_sample_larger_than_a_shard_is_a_shard_of_its_own(draw: Callable[..., Any]) -> None:
    done, shards = draw(["one two three four five six " * 5] * 3, tokens=60, shard_tokens=10)
    assert [shard.num_rows for shard in shards] == [1] * done.num_samples


def test_batches_hold_samples_of_like_length_longest_first(draw: Callable[..., Any]) -> None:
    texts = ["one two three " * (1 + (n * 7) % 9) for n in range(60)]
    _, shards = draw(texts, tokens=700, batch_tokens=64, shard_tokens=400, max_length=64)
    for shard in shards:
        lengths = shard["num_tokens"].to_pylist()
        assert lengths == sorted(lengths, reverse=True)
        batches = shard["batch"].to_pylist()
        assert batches == sorted(batches)
        assert set(batches) == set(range(max(batches) + 1))
        for batch in set(batches):
            members = [n for n, b in zip(lengths, batches, strict=True) if b == batch]
            assert len(members) == 1 or max(members) * len(members) <= 64


def test_a_row_of_samples_agrees_with_itself(draw: Callable[..., Any]) -> None:
    _, shards = draw(["one two three"] * 20, tokens=70, shard_tokens=30)
    assert column(shards, "sample") == sorted(column(shards, "sample"))
    for row in (row for shard in shards for row in shard.to_pylist()):
        assert len(row["token_ids"]) == len(row["tokens"]) == row["num_tokens"]
        assert sum(row["counted"]) == row["num_counted"]
        assert [a and b for a, b in zip(row["counted"], row["is_special"], strict=True)] == (
            [False] * row["num_tokens"]
        )
        assert "".join(row["tokens"]) == row["text"]
        assert row["source"] == f"d{row['sample']}"


def test_the_first_three_samples_are_kept_to_be_shown(draw: Callable[..., Any]) -> None:
    done, shards = draw([f"number {n}" for n in range(9)], tokens=30)
    assert [source for source, _ in done.examples] == ["d0", "d1", "d2"]
    texts = dict(zip(column(shards, "source"), column(shards, "text"), strict=True))
    assert [text for _, text in done.examples] == [texts["d0"], texts["d1"], texts["d2"]]


Sources = dict[str, list[str]]


@pytest.fixture
def sources(
    tokenizer: transformers.PreTrainedTokenizerFast, write_study: Callable[..., Path]
) -> Callable[..., Sources]:
    """Draws all tasks of a study in the order of a plan; gives the documents that each took."""

    def run(
        change: Callable[[dict[str, Any]], None] = lambda tasks: None, **changes: Any
    ) -> Sources:
        path = write_study(**changes)
        raw = yaml.safe_load(path.read_text())
        change(raw["tasks"])
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        study: Study = load_study(path)
        streams = open_all_documents(study)
        taken: Sources = {}
        for name in sorted(study.tasks, key=lambda name: study.tasks[name].mixture is not None):
            shards: list[pa.Table] = []
            keep = functools.partial(lambda shards, _, table: shards.append(table), shards)
            draw_task(name, study, streams[name], TextEncoder(tokenizer, study.capture), keep)
            taken[name] = sorted(column(shards, "source"))
        return taken

    return run


def test_a_mixture_takes_turns_among_its_members(sources: Callable[..., Sources]) -> None:
    taken = sources()
    members = [source.split("/")[0] for source in taken["mixed"]]
    counts = [members.count(member) for member in ("code", "prose", "numbers")]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1


def test_a_mixture_never_takes_what_its_members_used(sources: Callable[..., Sources]) -> None:
    taken = sources()
    for member in ("code", "prose", "numbers"):
        used = {f"{member}/{source}" for source in taken[member]}
        assert used
        assert used.isdisjoint(taken["mixed"])
    assert len(set(taken["mixed"])) == len(taken["mixed"])


def test_a_mixture_goes_on_with_the_others_when_a_member_ends(
    sources: Callable[..., Sources],
) -> None:
    taken = sources(lambda tasks: tasks["prose"].update(limit=2))
    assert not any(source.startswith("prose/") for source in taken["mixed"])
    assert any(source.startswith("code/") for source in taken["mixed"])


def test_the_limit_of_a_mixture_counts_its_documents(sources: Callable[..., Sources]) -> None:
    assert len(sources(lambda tasks: tasks["mixed"].update(limit=2))["mixed"]) == 2


def test_reordering_tasks_changes_nothing(sources: Callable[..., Sources]) -> None:
    def reverse(tasks: dict[str, Any]) -> None:
        items = list(tasks.items())
        tasks.clear()
        tasks.update(reversed(items))

    assert sources(reverse) == sources()


@pytest.mark.parametrize(
    "added",
    [
        {"limit": 5},
        {"mixture": ["code"]},
        {"mixture": ["prose", "numbers", "code"]},
    ],
)
def test_adding_a_task_changes_no_other_task(
    sources: Callable[..., Sources], text_folder: Path, added: dict[str, Any]
) -> None:
    if "mixture" not in added:
        added = added | {"files": f"{text_folder}/code/*.txt"}
    before = sources()
    # Drawn before the others by name.
    after = sources(lambda tasks: tasks.update(a_new_one=added))
    assert after.pop("a_new_one")
    assert after == before


def test_mixtures_that_share_members_do_not_take_what_these_used(
    sources: Callable[..., Sources],
) -> None:
    taken = sources(lambda tasks: tasks.update(again={"mixture": ["code", "prose"]}))
    used = {f"{member}/{source}" for member in ("code", "prose") for source in taken[member]}
    assert used.isdisjoint(taken["again"])
    assert used.isdisjoint(taken["mixed"])


def test_another_seed_gives_other_samples(sources: Callable[..., Sources]) -> None:
    assert sources(seed=1) != sources(seed=0)
    assert sources(seed=1) == sources(seed=1)


def test_labels_of_a_mixture_say_where_a_document_came_from(
    tokenizer: transformers.PreTrainedTokenizerFast, write_study: Callable[..., Path]
) -> None:
    study = load_study(write_study())
    streams = open_all_documents(study)
    assert [next(streams["mixed"]).label for _ in range(4)] == ["code", "prose", "numbers", "code"]
