"""Beginning a run and finding it again: the chosen inputs go into the store before any work."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa

from ray_app.capture.moments import can_compile, make_accumulator
from ray_app.capture.shards import PlannedShard
from ray_app.capture.stage import StageSpec
from ray_app.models.sites import SiteLocation
from ray_app.plan import (
    ModelFacts,
    Plan,
    check_fits,
    identity_of,
    make_plan,
)
from ray_app.study import CaptureSettings, ModelSettings, Study
from storage import SCHEMA_VERSION, ActlakeError, FileRecord, Store, StoreFiles, layout
from storage.files import canonical_json

__all__ = ["Run", "StudyChangedError", "begin_run", "find_run", "load_run"]

_RECORD_NAME = PurePosixPath(layout.run_path("")).name

_LONG = 60
"""Characters of a setting that are shown when it changed."""


class StudyChangedError(ActlakeError):
    """A study differs from the run that it began in this store."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has begun: its record, and its shards."""

    store: Store
    record: dict[str, Any]
    shards: tuple[PlannedShard, ...]

    @property
    def id(self) -> str:
        """Id of the run."""
        return str(self.record["run"])

    def stage_spec(self) -> StageSpec:
        """What a worker needs to build the stage that holds the whole model."""
        return self.stage_specs([range(self.record["model"]["num_layers"])])[0]

    def stage_specs(self, cut: Sequence[range]) -> list[StageSpec]:
        """What workers need to build the stages of one pipeline.

        Args:
            cut: the layers of each stage, in order (`PartSizes.cut`).
        """
        model = self.record["model"]
        sites = [SiteLocation(**site) for site in self.record["sites"]]
        return [
            StageSpec(
                store=self.store.files.root,
                run=self.id,
                index=index,
                start=layers.start,
                stop=layers.stop,
                model=ModelSettings.model_validate(model["settings"]),
                fingerprint=model["fingerprint"],
                sites=tuple(site for site in sites if site.layer in layers),
                threads=self.record["threads"],
                reduction=self.record["reduction"],
                seed=self.record["identity"]["seed"],
                capture=CaptureSettings.model_validate(self.record["capture"]),
            )
            for index, layers in enumerate(cut)
        ]

    def remaining(self) -> list[PlannedShard]:
        """Shards without a commit record, in the order of the plan."""
        committed = self.store.committed(self.id)
        return [shard for shard in self.shards if shard.key not in committed]

    def num_quarantined(self) -> int:
        """Samples that its committed shards set aside."""
        committed = self.store.committed(self.id)
        paths = {layout.quarantine_path(self.id, *key) for key in committed}
        found = self.store.files.list(f"{layout.run_folder(self.id)}/quarantine/*/*.parquet")
        return sum(self.store.files.num_rows(path) for path in found if path in paths)


def find_run(store: Store, study: Study, model: ModelFacts, *, new_run: bool) -> Run | None:
    """The run that this study began in the store, if it did.

    Args:
        store: the store.
        study: the study.
        model: its model.
        new_run: whether runs of a differing study of the same name may stand beside it.

    Raises:
        StudyChangedError: if runs of that name exist and none has the same settings; says what
            changed.
    """
    identity = identity_of(study, model)
    changes: dict[str, list[str]] = {}
    for run in store.runs():
        record = store.run_record(run)
        if record["study"] == study.name:
            changes[run] = list(_differences(record["identity"], identity))
            if not changes[run]:
                return load_run(store, run)
    if changes and not new_run:
        nearest = min(changes, key=lambda run: len(changes[run]))
        raise StudyChangedError(
            f"the study {study.name!r} changed since its run {nearest} in {store.files.root} "
            f"began: {'; '.join(changes[nearest])}. Restore the study to resume, or pass --new-run "
            "to capture beside it."
        )
    return None


def load_run(store: Store, run: str) -> Run:
    """A run from its record."""
    record = store.run_record(run)
    return Run(store, record, tuple(PlannedShard.from_dict(s) for s in record["shards"]))


def begin_run(
    store: Store,
    study: Study,
    model: ModelFacts,
    *,
    threads: int,
    reduction: Literal["auto", "eager", "compiled"] = "auto",
    on_task: Callable[[str], None] = lambda task: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Run:
    """Plan a run and write its inputs and its record.

    The run's id is a digest of its inputs, so they are written to a staging place first and get
    their names once all are there, the record last: a run either has all its inputs or does not
    exist.

    Args:
        store: the store.
        study: the study.
        model: its model.
        threads: CPU threads of each stage.
        reduction: how statistics are reduced; if 'auto', compiled where a C compiler is.
        on_task: called with the name of each task before it is drawn.
        on_note: called with what the study asks for and its documents do not give (`Plan.notes`).

    Raises:
        StudyError: if a task yields nothing.
        PlanError: if the run does not fit this machine.
        NativeError: if compiled reductions are asked for and cannot be built here.
        StoreError: if the store cannot be written.
    """
    if reduction == "auto":
        reduction = "compiled" if can_compile() else "eager"
    make_accumulator(1, reduction=reduction)
    with store.files.staging() as staged:
        plan = make_plan(study, model, write=_writer(staged), on_task=on_task)
        for note in plan.notes():
            on_note(note)
        check_fits(plan.costs(store.files.free_bytes()))
        identity = identity_of(study, model)
        inputs = [shard.samples.sha256 for shard in plan.shards]
        digest = hashlib.sha256(canonical_json([identity, inputs])).hexdigest()
        run = f"{study.name}-{digest[:8]}"
        record = _record(plan, run, identity) | {"threads": threads, "reduction": reduction}
        staged.put_json(_RECORD_NAME, record)
        store.files.publish(staged, layout.run_folder(run), last=_RECORD_NAME)
    return load_run(store, run)


def _writer(staged: StoreFiles) -> Callable[[str, int, pa.Table], FileRecord]:
    def write(task: str, shard: int, table: pa.Table) -> FileRecord:
        inside = layout.samples_path("", task, shard).removeprefix(layout.run_folder("") + "/")
        return staged.put_table(inside, "samples", table)

    return write


def _record(plan: Plan, run: str, identity: dict[str, Any]) -> dict[str, Any]:
    """What run.json says.

    Runs of one study over the same inputs differ in `created` alone, and in `threads` and
    `reduction` where the study leaves them to the machine.
    """
    study, model = plan.study, plan.model
    shards = []
    for shard in plan.shards:
        path = layout.samples_path(run, shard.task, shard.shard)
        shards.append(replace(shard, samples=replace(shard.samples, path=path)))
    return {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "study": study.name,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "identity": identity,
        "capture": plan.kept().model_dump(mode="json"),
        "reference": study.reference,
        "model": {
            "source": study.model.source,
            "init": study.model.init,
            "dtype": study.model.dtype,
            "quantization": study.model.quantization,
            "settings": study.model.model_dump(mode="json"),
            "fingerprint": model.files.fingerprint,
            "architecture": model.architecture.name,
            "modality": model.architecture.modality,
            "num_layers": model.num_layers,
            "num_parameters": model.num_parameters,
            "num_neurons": model.num_neurons,
        },
        "sites": [asdict(site) for site in model.sites],
        "tasks": [_task_record(plan, name) for name in study.tasks],
        "shards": [shard.to_dict() for shard in shards],
    }


def _task_record(plan: Plan, name: str) -> dict[str, Any]:
    task, draw = plan.study.tasks[name], plan.tasks[name]
    source = task.dataset or task.files or f"mixture of {', '.join(task.mixture or [])}"
    return {
        "task": name,
        "source": source if isinstance(source, str) else ", ".join(source),
        "num_documents": draw.num_documents,
        "num_empty": draw.num_empty,
        "num_samples": draw.num_samples,
        "num_tokens": draw.num_tokens,
        "num_counted": draw.num_counted,
        "num_shards": draw.num_shards,
    }


def _differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield f"{place}: {' -> '.join(_told_apart(before, after))}"


def _told_apart(*values: Any) -> Iterator[str]:
    """Values for people, short, and from where they begin to differ if they are long."""
    texts = ["not given" if value is None else str(value) for value in values]
    places = enumerate(zip(*texts, strict=False))
    differing = (place for place, characters in places if len(set(characters)) > 1)
    alike = next(differing, min(map(len, texts)))
    for text in texts:
        start = max(0, alike - 20) if len(text) > _LONG else 0
        cut = ("..." if start else "") + text[start:]
        yield cut if len(cut) <= _LONG else cut[: _LONG - 3] + "..."
