"""Samples that always fail are set aside, the same ones however the work is cut and interrupted."""

from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor

from ray_app.capture import driver
from ray_app.capture.errors import CaptureError
from ray_app.capture.modality import Language
from ray_app.capture.quarantine import Quarantine
from ray_app.capture.scheduling import Scheduler
from ray_app.capture.shards import batches_of
from ray_app.capture.stage import build_stage, load_stage_model
from ray_app.capture.workers import LocalWorkers
from ray_app.models.parts import StageModel
from ray_app.models.prediction import score_predictions
from ray_app.plan import identity_of, inspect_model
from ray_app.progress import NoProgress
from ray_app.run import Run, begin_run
from ray_app.study import load_study
from storage import create_store, layout, verify_store

CUTS = {
    1: [range(6)],
    2: [range(2), range(2, 6)],
    3: [range(1), range(1, 4), range(4, 6)],
}
KINDS = {
    "raises": "the model raised ValueError: no such token",
    "activation": "neuron 0 of site 'attn', layer 4, is NaN, infinite or too large to square at "
    "position",
    "loss": "the loss of position 1 is not finite: the model's logits overflow",
}


@pytest.fixture
def begin(
    tmp_path: Path, write_study: Callable[..., Path], deep_model_folder: Callable[[str], Path]
) -> Callable[..., Run]:
    def make(store: str, **capture: Any) -> Run:
        settings = {"tokens": 160, "max_length": 24, "batch_tokens": 96, "shard_tokens": 150}
        path = write_study(
            model={"source": str(deep_model_folder("llama"))}, capture=settings | capture
        )
        study = load_study(path)
        return begin_run(create_store(tmp_path / store), study, inspect_model(study), threads=1)

    return make


def first_ids(run: Run) -> dict[tuple[str, int], tuple[int, ...]]:
    """Token ids of every sample by (task, sample)."""
    tables = {
        shard.key: run.store.files.get_table(shard.samples.path).to_pylist() for shard in run.shards
    }
    return {
        (task, row["sample"]): tuple(row["token_ids"])
        for (task, _), rows in tables.items()
        for row in rows
    }


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[tuple[int, ...], str]], None]:
    """Makes the model fail in a given way on samples of given token ids."""

    def apply(kinds: dict[tuple[int, ...], str]) -> None:
        run = StageModel.run

        def kind_of(ids: Tensor) -> str | None:
            found = (kind for key, kind in kinds.items() if tuple(ids[: len(key)].tolist()) == key)
            return next(found, None)

        def failing(
            self: StageModel, ids: Tensor, mask: Tensor | None, hidden: Tensor | None
        ) -> Tensor:
            rows = [kind_of(row) for row in ids]
            if "raises" in rows and 3 in self.layers:
                raise ValueError("no such\n token")
            bad = torch.tensor([kind == "activation" for kind in rows])

            def hook(module: Any, inputs: Any, output: Any) -> Any:
                states = output if isinstance(output, Tensor) else output[0]
                return torch.where(bad[:, None, None], nan, states)

            handle = None
            if 3 in self.layers:
                layer = self.model.get_submodule(self.parts.layers[3])
                handle = layer.register_forward_hook(hook)
            try:
                output = run(self, ids, mask, hidden)
            finally:
                if handle is not None:
                    handle.remove()
            if self.is_last:
                output[torch.tensor([kind == "loss" for kind in rows])] = nan
            return output

        monkeypatch.setattr(StageModel, "run", failing)

    return apply


@pytest.fixture
def spoilt(
    begin: Callable[..., Run], spoil: Callable[[dict[tuple[int, ...], str]], None]
) -> dict[tuple[str, int], str]:
    """Six samples on which the model fails, with how; two of them in one batch."""
    ids = first_ids(begin("draft"))
    by_kind = dict(zip(ids, ["raises", "activation", "loss"], strict=False))
    by_kind |= dict(zip(reversed(ids), ["loss", "raises", "activation"], strict=False))
    kinds = {ids[key]: kind for key, kind in by_kind.items()}
    spoil(kinds)
    return {key: kinds[tokens] for key, tokens in ids.items() if tokens in kinds}


def capture(run: Run, cut: list[range], *, most: int = 1000) -> None:
    quarantine = Quarantine(max_samples=most, num_samples=run.num_quarantined())
    stages = map(build_stage, run.stage_specs(cut))
    driver.capture(run, LocalWorkers(*stages, quarantine=quarantine), NoProgress())


def contents_of(run: Run) -> dict[str, bytes]:
    files = run.store.files
    paths = files.list(f"{layout.run_folder(run.id)}/**/*.*")
    return {path: files.local(path).read_bytes() for path in paths if not path.endswith("run.json")}


def tables_of(run: Run) -> list[pa.Table]:
    return [
        run.store.table(f"select * exclude (bytes, num_files) from {table} order by all")
        if table == "commits"
        else run.store.table(f"select * from {table} order by all")
        for table in ("samples", "tokens", "stats", "top", "commits", "quarantine")
    ]


def test_samples_that_fail_are_set_aside_and_everything_counts_the_rest(
    begin: Callable[..., Run], spoilt: dict[tuple[str, int], str]
) -> None:
    run = begin("store")
    capture(run, CUTS[1])
    rows = run.store.table("from quarantine order by task, sample").to_pylist()
    assert {(row["task"], row["sample"]) for row in rows} == spoilt.keys()
    for row in rows:
        assert row["error"].startswith(KINDS[spoilt[row["task"], row["sample"]]])
        assert row["source"].endswith(".txt")
    assert run.num_quarantined() == len(spoilt) >= 6
    assert verify_store(run.store).problems == []
    both = run.store.table("from tokens semi join quarantine using (run, task, sample)")
    assert both.num_rows == 0
    (counts,) = run.store.table(
        "select sum(num_samples) as computed, sum(num_quarantined) as aside, "
        "(select count(*) from samples) as planned from commits"
    ).to_pylist()
    assert counts["computed"] + counts["aside"] == counts["planned"]


def test_the_rest_of_a_batch_is_computed_as_a_batch_without_the_sample(
    begin: Callable[..., Run], spoilt: dict[tuple[str, int], str]
) -> None:
    run = begin("store")
    capture(run, CUTS[2])
    model = load_stage_model(run.stage_spec())
    shard = run.shards[0]
    samples = run.store.files.get_table(shard.samples.path)
    bad = pa.array([sample for task, sample in spoilt if task == shard.task], pa.int32())
    kept = samples.filter(pc.invert(pc.is_in(samples["sample"], bad)))
    assert 0 < kept.num_rows < samples.num_rows
    losses, compiled = [], run.record["reduction"] == "compiled"
    with torch.inference_mode():
        for batch in batches_of(kept):
            token_ids = Language().inputs(batch, is_first=True)
            logits = model.run(token_ids, batch.attention_mask, None)
            for row, length in enumerate(batch.lengths.tolist()):
                ids = token_ids[row, :length]
                scored = score_predictions(logits[row, :length], ids, compiled=compiled)
                losses.append(scored.loss)
    path = layout.tokens_path(run.id, shard.task, shard.shard)
    stored = run.store.files.get_table(path)["loss"].drop_null()
    np.testing.assert_array_equal(stored.to_numpy(), np.concatenate(losses))


def test_stages_replicas_and_deaths_set_the_same_samples_aside(
    begin: Callable[..., Run], spoilt: dict[tuple[str, int], str], inline_calls: Any,
    inline_pipeline: Any,
) -> None:  # fmt: skip
    whole = begin("whole")
    capture(whole, CUTS[1])
    for num_stages in (2, 3):
        alone, shared = begin(f"alone-{num_stages}"), begin(f"shared-{num_stages}")
        capture(alone, CUTS[num_stages])
        for ours, theirs in zip(tables_of(alone), tables_of(whole), strict=True):
            assert ours.equals(theirs)
        pipelines = [
            inline_pipeline(*map(build_stage, shared.stage_specs(CUTS[num_stages])), dies_at=dies)
            for dies in ({2, 5, 7}, {2})
        ]
        quarantine = Quarantine(max_samples=len(spoilt))
        workers = Scheduler(pipelines, inline_calls, max_deaths=9, quarantine=quarantine)
        driver.capture(shared, workers, NoProgress())
        assert sum(pipeline.num_revivals for pipeline in pipelines) >= 2
        assert contents_of(shared) == contents_of(alone)
        # What could not be written is not kept in memory either.
        assert not any(stage._closed for pipeline in pipelines for stage in pipeline._stages)


def test_one_sample_too_many_stops_the_run_which_a_higher_bound_lets_go_on(
    begin: Callable[..., Run], spoilt: dict[tuple[str, int], str]
) -> None:
    run = begin("stopped")
    for most in range(0, len(spoilt), 2):
        with pytest.raises(
            CaptureError,
            match=rf"sample \d+ \(.*\.txt\) in shard \d of task '\w+' fails, because .*\. "
            rf"\d+ sample\(s\) of the run fail and capture\.max_quarantined is {most}: remove",
        ):
            capture(run, CUTS[2], most=most)
        assert run.num_quarantined() <= most
        assert verify_store(run.store).problems == []
    capture(run, CUTS[2], most=len(spoilt))
    undisturbed = begin("undisturbed")
    capture(undisturbed, CUTS[2])
    assert contents_of(run) == contents_of(undisturbed)


def test_a_shard_of_which_nothing_is_left_is_committed_without_tokens(
    begin: Callable[..., Run], spoil: Callable[[dict[tuple[int, ...], str]], None]
) -> None:
    run = begin("store", shard_tokens=24, batch_tokens=24)
    ids = first_ids(run)
    spoil({ids["code", 0]: "loss"})
    capture(run, CUTS[3])
    assert verify_store(run.store).problems == []
    emptied = run.store.table("from commits where num_samples = 0").to_pylist()
    assert emptied
    assert {row["num_tokens"] for row in emptied} == {0}
    finite = run.store.table("from neuron_stats where not isfinite(mean) or not isfinite(min)")
    assert finite.num_rows == 0


def test_verify_sees_a_record_that_counts_other_samples_than_the_quarantine_holds(
    begin: Callable[..., Run], spoilt: dict[tuple[str, int], str]
) -> None:
    run = begin("store")
    capture(run, CUTS[1])
    path = layout.commit_path(run.id, *run.shards[0].key)
    record = run.store.files.get_json(path)
    right = record["num_quarantined"]
    run.store.files.put_json(path, record | {"num_quarantined": right + 1})
    (problem,) = verify_store(run.store).problems
    assert f"num_quarantined {right + 1}, quarantined_rows {right}" in problem


def test_the_bound_is_no_part_of_the_runs_identity(write_study: Callable[..., Path]) -> None:
    identities = []
    for most in (0, 5):
        study = load_study(write_study(), [f"capture.max_quarantined={most}"])
        identities.append(identity_of(study, inspect_model(study)))
    assert identities[0] == identities[1]
