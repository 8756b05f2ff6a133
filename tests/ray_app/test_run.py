"""A run begins with all its inputs or not at all, and is found again only by the same study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_app.plan import PlanError, inspect_model
from ray_app.run import StudyChangedError, begin_run, find_run, load_run
from ray_app.study import StudyError, load_study
from storage import StoreError, create_store, open_store, verify_store

Begin = Callable[..., Any]


def everything_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in everything_in(folder)}


def changed(study: Path, store: Path, *overrides: str) -> str:
    """What is said of a study that changed under the run in a store."""
    study_now = load_study(study, overrides)
    with pytest.raises(StudyChangedError) as caught:
        find_run(create_store(store), study_now, inspect_model(study_now), new_run=False)
    return str(caught.value)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_begun_run_holds_its_inputs_and_its_record(
    write_study: Callable[..., Path], begin_locally: Begin, store: Path
) -> None:
    run = begin_locally(write_study())
    files = everything_in(store)
    assert f"runs/run={run.id}/run.json" in files
    assert sorted(shard.samples.path for shard in run.shards) == [
        path for path in files if "/samples/" in path
    ]
    assert len(files) == len(run.shards) + 1
    for shard in run.shards:
        assert run.store.files.sha256(shard.samples.path) == shard.samples.sha256
        assert run.store.files.get_table(shard.samples.path).num_rows == shard.num_samples
    assert run.remaining() == list(run.shards)


def test_the_views_know_a_run_that_has_only_begun(
    write_study: Callable[..., Path], begin_locally: Begin
) -> None:
    run = begin_locally(write_study())
    store = open_store(run.store.files.root)
    assert store.sql("select run, study, num_shards, num_committed from runs").fetchall() == [
        (run.id, "tiny", len(run.shards), 0)
    ]
    assert store.sql(
        "select task, is_reference, num_counted, committed_tokens from tasks order by task"
    ).fetchall() == [
        ("code", False, 160, 0),
        ("mixed", True, 160, 0),
        ("numbers", False, 160, 0),
        ("prose", False, 160, 0),
    ]
    assert store.sql("from samples").fetchall() == []


def test_the_same_study_finds_its_run_again(
    write_study: Callable[..., Path], begin_locally: Begin
) -> None:
    study = write_study()
    run = begin_locally(study)
    again = begin_locally(study)
    assert (again.id, again.shards) == (run.id, run.shards)
    assert load_run(run.store, run.id).shards == run.shards
    assert run.store.runs() == [run.id]


def test_resources_and_analyses_may_change_under_a_run(
    write_study: Callable[..., Path], begin_locally: Begin
) -> None:
    study = write_study()
    run = begin_locally(study)
    assert begin_locally(study, None, "resources.replicas=2", "analyses=[{}]").id == run.id


def test_a_resume_reads_no_source_again(
    write_study: Callable[..., Path], capture_locally: Begin, begin_locally: Begin,
    text_folder: Path,
) -> None:  # fmt: skip
    study = write_study()
    run = begin_locally(study)
    for file in text_folder.rglob("*.txt"):
        file.unlink()
    finished = capture_locally(study)
    assert finished.id == run.id
    assert finished.remaining() == []
    assert verify_store(open_store(run.store.files.root)).problems == []


def test_beginning_twice_gives_the_same_bytes(
    write_study: Callable[..., Path], begin_locally: Begin, tmp_path: Path
) -> None:
    study = write_study()
    begin_locally(study, tmp_path / "one")
    begin_locally(study, tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [path for path in one if one[path] != two[path] and not path.endswith("run.json")] == []


@pytest.mark.parametrize(
    ("overrides", "change"),
    [
        (["capture.tokens=161"], "capture.tokens: 160 -> 161"),
        (["seed=3"], "seed: 0 -> 3"),
        (["model.dtype=bfloat16"], "model.dtype: not given -> bfloat16"),
        (["capture.sites=[mlp]"], "capture.sites: ['attn', 'mlp'] -> ['mlp']"),
        (["tasks.code.limit=5"], "tasks.code.limit: not given -> 5"),
        (["tasks.mixed.mixture=[code]"], ("tasks.mixed.mixture: ['code', 'prose', 'numbers'] -> "
         "['code']")),
        (
            ["tasks.more.mixture=[code]"],
            "tasks.more: not given -> {'mixture': ['code']}",
        ),
        (
            ["seed=3", "capture.tokens=161"],
            "capture.tokens: 160 -> 161; seed: 0 -> 3",
        ),
    ],
)  # fmt: skip
def test_a_study_that_changed_under_its_run_is_refused_with_what_changed(
    write_study: Callable[..., Path], begin_locally: Begin, store: Path,
    overrides: list[str], change: str,
) -> None:  # fmt: skip
    study = write_study()
    run = begin_locally(study)
    before = contents(store)
    assert changed(study, store, *overrides) == (
        f"the study 'tiny' changed since its run {run.id} in {store} began: {change}. Restore the "
        "study to resume, or pass --new-run to capture beside it."
    )
    assert contents(store) == before


def test_long_settings_are_shown_from_where_they_differ(
    write_study: Callable[..., Path], begin_locally: Begin, store: Path, text_folder: Path
) -> None:
    files = f"{text_folder}/code/*.txt"
    study = write_study()
    begin_locally(study)
    message = changed(study, store, f"tasks.code.files={files[:-4]}1.txt")
    assert "tasks.code.files: ..." in message
    assert "/code/*.txt -> ..." in message
    assert "/code/*1.txt. Restore" in message


def test_the_nearest_of_several_runs_is_compared(
    write_study: Callable[..., Path], store: Path
) -> None:
    study = write_study()
    for overrides in (
        ["seed=1", "capture.tokens=100"],
        ["capture.tokens=120"],
        ["seed=2", "capture.tokens=99"],
    ):
        other = load_study(study, overrides)
        model = inspect_model(other)
        assert find_run(create_store(store), other, model, new_run=True) is None
        begin_run(create_store(store), other, model, threads=1)
    assert "began: capture.tokens: 120 -> 160. Restore" in changed(study, store)


def test_a_run_of_another_study_does_not_matter(
    write_study: Callable[..., Path], begin_locally: Begin
) -> None:
    first = begin_locally(write_study(name="other"))
    second = begin_locally(write_study())
    assert sorted(second.store.runs()) == sorted([first.id, second.id])


def test_other_weights_are_another_run(
    write_study: Callable[..., Path], begin_locally: Begin, store: Path, model_folder: Any
) -> None:
    study = write_study()
    begin_locally(study)
    other = load_study(study, [f"model.source={model_folder('llama-mha')}"])
    with pytest.raises(StudyChangedError, match=r"model\.fingerprint: .* -> .*; model\.source: "):
        find_run(create_store(store), other, inspect_model(other), new_run=False)


def test_a_plan_that_fails_leaves_nothing(
    write_study: Callable[..., Path], begin_locally: Begin, store: Path, text_folder: Path
) -> None:
    tasks = {
        "code": {"files": f"{text_folder}/code/*.txt"},
        "zero": {"files": f"{text_folder}/none/*.txt"},
    }
    with pytest.raises(StudyError, match=r"^tasks\.zero\.files: no file matches"):
        begin_locally(write_study(tasks=tasks, reference=None))
    assert not store.exists()


def test_a_folder_that_was_there_before_a_plan_that_fails_stays(
    write_study: Callable[..., Path], begin_locally: Begin, store: Path, text_folder: Path
) -> None:
    store.mkdir()
    tasks = {"zero": {"files": f"{text_folder}/none/*.txt"}}
    with pytest.raises(StudyError):
        begin_locally(write_study(tasks=tasks, reference=None))
    assert list(store.iterdir()) == []


def test_a_plan_that_does_not_fit_leaves_nothing(
    write_study: Callable[..., Path], begin_locally: Begin, store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("storage.local.LocalFolder.free_bytes", lambda folder: 1000)
    with pytest.raises(PlanError, match=r"^the run needs about .* and 0\.0 MiB are free"):
        begin_locally(write_study())
    assert not store.exists()


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A filesystem of 32 kB."""
    return mount_disk("32k")


def test_a_full_disk_leaves_no_run(
    write_study: Callable[..., Path], begin_locally: Begin, small_disk: Path
) -> None:
    with pytest.raises(StoreError, match=r"^cannot write .*: No space left on device\. Free or"):
        begin_locally(write_study(), small_disk / "store")
    assert everything_in(small_disk) == []


def test_a_store_that_cannot_be_written_is_refused(
    write_study: Callable[..., Path], begin_locally: Begin, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"^cannot make the store .*/file/store: Not a directory"):
        begin_locally(write_study(), tmp_path / "file" / "store")


def test_adding_a_task_leaves_the_samples_of_others_as_they_were(
    write_study: Callable[..., Path], begin_locally: Begin, tmp_path: Path
) -> None:
    study = write_study()
    one = begin_locally(study, tmp_path / "one")
    two = begin_locally(study, tmp_path / "two", "tasks.a_new_one.mixture=[prose, code]")
    digests = {shard.key: shard.samples.sha256 for shard in two.shards}
    assert {shard.key for shard in one.shards} < digests.keys()
    assert all(digests[shard.key] == shard.samples.sha256 for shard in one.shards)
