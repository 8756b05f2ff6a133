"""The samples that ablated models are evaluated on, kept in the store as an analysis of the run.

They are drawn by the study's seed like those of the capture, from documents that the capture did
not use or from another split. They are kept rather than drawn again by every worker: workers on
other machines, and later commands, read them from the store and need neither hub nor corpus, and
two commands are measured on the very same samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from analysis.keeping import ComputedTables, committed_lineage, keep
from ray_app.capture.shards import PlannedShard
from ray_app.encoders import open_encoder
from ray_app.facts import ModelFacts
from ray_app.run import Run
from ray_app.sampling import draw_task, open_all_documents
from ray_app.study import CaptureSettings, Study, StudyError, TaskSettings, load_study
from storage import TABLES, FileRecord
from storage.sqlfiles import load_query

__all__ = ["EvaluationSamples", "evaluation_samples", "study_of", "with_tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSamples:
    """Samples by task, as shards that workers can read."""

    analysis: str
    """Id of the analysis that holds them."""
    shards: Mapping[str, tuple[PlannedShard, ...]]
    """Shards of each task that has any."""
    notes: tuple[str, ...]
    """What was asked for and is not there."""

    def of(self, task: str) -> tuple[PlannedShard, ...]:
        """The shards of a task.

        Raises:
            StudyError: if it has no evaluation samples.
        """
        if task not in self.shards:
            raise StudyError(
                f"task {task!r} has no documents to evaluate on, because the capture used all of "
                "them: capture fewer tokens, or name a split or data_files under evaluation in the "
                "study and pass --study."
            )
        return self.shards[task]


def study_of(run: Run, path: Any = None) -> Study:
    """The study of a run, from its record.

    Args:
        run: the run.
        path: a study file whose evaluations and resources to take over; neither affects a run.

    Raises:
        StudyError: if the study file cannot be read, or is not about the tasks of the run.
    """
    record, identity = run.record, run.record["identity"]
    defaults = CaptureSettings().model_dump(mode="json")
    capture = {key: v for key, v in identity["capture"].items() if v != defaults[key]}
    tasks: dict[str, Any] = {name: dict(task) for name, task in identity["tasks"].items()}
    more: dict[str, Any] = {}
    if path is not None:
        given = load_study(path)
        if missing := sorted(tasks.keys() - given.tasks.keys()):
            raise StudyError(
                f"{path} must be the study of run {run.id!r}, and lacks its task {missing[0]!r}: "
                "name another study file or another run."
            )
        more = {
            key: getattr(given, key).model_dump(exclude_unset=True)
            for key in ("evaluation", "resources")
        }
        for name in tasks:
            own = given.tasks[name].evaluation
            if own is not None:
                tasks[name]["evaluation"] = own.model_dump(exclude_unset=True)
    return Study.model_validate(
        {
            "name": record["study"],
            "seed": identity["seed"],
            "model": record["model"]["settings"],
            "tasks": tasks,
            "reference": record["reference"],
            "capture": capture,
            **more,
        }
    )


def with_tokens(study: Study, tokens: int) -> Study:
    """The study with so many counted tokens to evaluate each task on, whatever it says itself."""
    tasks = {
        name: task.model_copy(
            update={"evaluation": study.evaluation_of(name).model_copy(update={"tokens": tokens})}
        )
        for name, task in study.tasks.items()
    }
    return study.model_copy(update={"tasks": tasks})


def evaluation_samples(
    run: Run,
    study: Study,
    model: ModelFacts,
    *,
    on_task: Callable[[str], None] = lambda task: None,
) -> EvaluationSamples:
    """Draw the evaluation samples of all tasks, or find those that were drawn before.

    Args:
        run: the run, whose capture must be complete.
        study: its study.
        model: its model.
        on_task: called with the name of each task before it is drawn.

    Raises:
        AnalysisError: if the capture is not complete.
        StudyError: if what evaluation asks of a task is not there.
    """
    lineage = committed_lineage(
        run.store, run.record, partial=False, advice="finish it with `actlake capture` first"
    )
    asked = _evaluated(study)
    tasks = {
        name: task.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        for name, task in asked.tasks.items()
    }
    capture = run.record["identity"]["capture"]
    parameters = {"seed": study.seed, "capture": capture, "tasks": tasks}
    key = {"run": run.id, "parameters": parameters, "lineage": lineage}
    table = "evaluation_samples"
    made = keep(
        run.store, "samples", key, (table,), lambda: _draw(run, study, asked, model, on_task)
    )
    (record,) = made.files
    shards = _shards(run.store.files.get_recorded_table(record), record)
    notes = []
    for name in study.tasks:
        wanted = asked.tokens_of(name)
        found = sum(shard.num_counted for shard in shards.get(name, ()))
        if found < wanted:
            notes.append(
                f"note: the evaluation documents of {name} end at {found:,} of the {wanted:,} "
                "counted tokens asked for"
            )
    return EvaluationSamples(analysis=made.id, shards=shards, notes=tuple(notes))


def _evaluated(study: Study) -> Study:
    """The study whose capture would read the evaluation samples."""
    tasks = {}
    for name, task in study.tasks.items():
        asked = study.evaluation_of(name)
        place = asked.model_dump(include={"split", "data_files"}, exclude_none=True)
        if place and task.files is not None:
            raise StudyError(
                f"evaluation.{min(place)} says nothing about tasks.{name}, which reads files: give "
                "it under the evaluation of each task that reads a dataset."
            )
        tokens = asked.tokens or study.tokens_of(name)
        update = {"tokens": tokens, "evaluation": None} | ({} if task.mixture else place)
        tasks[name] = task.model_copy(update=update)
    return study.model_copy(update={"tasks": tasks})


def _draw(
    run: Run, study: Study, asked: Study, model: ModelFacts, on_task: Callable[[str], None]
) -> ComputedTables:
    encoder = open_encoder(study, model)
    used = _used(run, study, asked)
    streams = open_all_documents(asked, model.architecture.modality, used=used)
    parts: list[pa.Table] = [TABLES["evaluation_samples"].schema.empty_table()]
    # Mixtures come last, because they take what the others leave.
    for name in sorted(asked.tasks, key=lambda name: (asked.tasks[name].mixture is not None, name)):
        on_task(name)

        def on_shard(shard: int, table: pa.Table, name: str = name) -> None:
            columns = {"run": [run.id] * len(table), "task": [name] * len(table)}
            whole = pa.table(columns | {n: table[n] for n in table.column_names})
            parts.append(whole.cast(TABLES["evaluation_samples"].schema))

        draw_task(name, asked, streams[name], encoder, on_shard)
    return ComputedTables(evaluation_samples=pa.concat_tables(parts))


def _used(run: Run, study: Study, asked: Study) -> dict[str, set[str]]:
    """By task, sources of documents that the capture used, where they are drawn from again.

    A mixture uses documents of its members. Tasks that read one and the same dataset or files, with
    different filters, may use each other's; streams number documents in an order of their own.
    """
    by_place: dict[Any, set[str]] = {}
    rows = run.store.table(load_query("ray_app", "used_sources").text, {"run": run.id})
    for row in rows.to_pylist():
        name, source = row["task"], row["source"]
        if study.tasks[name].mixture is not None:
            name, _, source = source.partition("/")
        by_place.setdefault(_place(name, study.tasks[name]), set()).add(source)
    places = {name: _place(name, task) for name, task in asked.tasks.items()}
    return {name: by_place[place] for name, place in places.items() if place in by_place}


def _place(name: str, task: TaskSettings) -> Any:
    if task.files is not None:
        return "files", str(task.files)
    where = (task.dataset, task.subset, task.split, str(task.data_files), task.revision)
    return (*where, name) if task.streaming or task.mixture else where


def _shards(samples: pa.Table, record: FileRecord) -> dict[str, tuple[PlannedShard, ...]]:
    shards: dict[str, list[PlannedShard]] = {}
    counts = samples.group_by(["task", "shard"], use_threads=False).aggregate(
        [("sample", "count"), ("num_tokens", "sum"), ("num_counted", "sum"), ("batch", "max")]
    )
    for row in counts.sort_by([("task", "ascending"), ("shard", "ascending")]).to_pylist():
        shards.setdefault(row["task"], []).append(
            PlannedShard(
                task=row["task"],
                shard=row["shard"],
                num_samples=row["sample_count"],
                num_tokens=row["num_tokens_sum"],
                num_counted=row["num_counted_sum"],
                num_batches=row["batch_max"] + 1,
                samples=record,
            )
        )
    return {task: tuple(found) for task, found in shards.items()}
