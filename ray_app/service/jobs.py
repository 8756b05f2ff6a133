"""Jobs: captures and analyses of the study files in one folder, as commands that others run.

What may be asked is narrow: the name of a file in the folder, and changes of settings that name
neither files nor models nor code. `Runner` is what carries commands out; Ray's is in
`ray_app.service.ray_jobs`.
"""

import re
import shlex
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ray_app.service.pool import QuestionError
from ray_app.service.settings import ServiceSettings
from ray_app.study import StudyError, load_study
from storage import Store, StoreError, open_store

__all__ = ["Action", "JobDesk", "Runner", "RunnerJob", "State"]

Action = Literal["capture", "analyse", "run"]
State = Literal["pending", "running", "succeeded", "failed", "stopped"]

SAFE_SECTIONS = ("capture", "resources")
SAFE_KEYS = ("seed", "reference", "model.init", "model.init_seed", "model.dtype",
             "model.quantization")  # fmt: skip
"""Settings that a job may change. Not among them are those that name files, data sets or models
(tasks, evaluation, model.source, model.revision), modules of the model (model.site_modules), or the
study's own name and analyses."""

_STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.ya?ml")
_RUN_OF_LOG = re.compile(r"^run ([A-Za-z0-9_.-]+): \d+ of \d+ shards committed", re.MULTILINE)
_PREFIX = "actlake-"
_LOG_CHARACTERS = 256 << 10
"""Most characters of a log that one answer holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerJob:
    """A command as its runner knows it."""

    id: str
    """Its id."""
    state: State
    """How far it is."""
    created: str | None
    """When it was submitted, ISO 8601, UTC."""
    ended: str | None
    """When it ended."""
    message: str
    """What the runner says of its state."""
    labels: Mapping[str, str]
    """What was given with it."""


class Runner(Protocol):
    """Runs commands in the background, for all replicas together."""

    def submit(self, job: str, command: str, labels: Mapping[str, str]) -> None:
        """Start a shell command under an id."""

    def jobs(self) -> list[RunnerJob]:
        """All commands, ended ones too."""

    def log(self, job: str) -> str:
        """What a command has written so far."""

    def stop(self, job: str) -> None:
        """End a command; nothing happens if it has ended."""


class JobDesk:
    """Takes jobs for one store."""

    def __init__(self, settings: ServiceSettings, runner: Runner | None) -> None:
        """Jobs are taken only if `settings.studies` is a folder and there is a runner."""
        self._settings = settings
        self._runner = runner
        self._store: Store | None = None
        self._runs: dict[str, str | None] = {}
        """The run of each job that named it, None of those that ended without."""

    def studies(self) -> dict[str, Any]:
        """Whether jobs are taken, and the study files, with the comment at the top of each."""
        if self._settings.studies is None or self._runner is None:
            return {"enabled": False, "studies": []}
        names = sorted(
            path.name for path in self._settings.studies.iterdir()
            if _STUDY_NAME.fullmatch(path.name)
        )  # fmt: skip
        return {
            "enabled": True,
            "studies": [
                {"name": name, "description": _description(path)}
                for name in names
                if (path := self._study_path(name)) is not None
            ],
        }

    def submit(
        self,
        action: Action,
        study: str,
        overrides: Mapping[str, str],
        tokens: int | None,
        run: str | None,
    ) -> dict[str, Any]:
        """Start a job.

        Args:
            action: 'capture', 'analyse', or 'run' for both.
            study: name of a file in the folder of studies.
            overrides: key.path and YAML value of settings to change; not of 'analyse'.
            tokens: counted tokens of each task; not of 'analyse'.
            run: for 'analyse', which run, if the store has several.

        Raises:
            QuestionError: of kind 'disabled', 'not_found' or 'invalid'.
        """
        runner = self._enabled()
        path = self._study_path(study)
        if path is None:
            raise QuestionError("not_found", f"there is no study {study!r}: GET /api/studies.")
        changed = [f"{_safe(key)}={_one_line(key, value)}" for key, value in overrides.items()]
        if tokens is not None:
            changed.append(f"capture.tokens={tokens}")
        _check(action, path, changed, run)
        arguments = (
            ["analyse", self._settings.store, "--study", str(path)]
            if action == "analyse"
            else [action, str(path), "--store", self._settings.store, "--new-run"]
        )
        arguments += [part for change in changed for part in ("--set", change)]
        arguments += [] if run is None else ["--run", run]
        command = shlex.join([sys.executable, "-m", "ray_app", *arguments])
        if self._settings.job_folder is not None:
            command = f"cd {shlex.quote(str(self._settings.job_folder))} && exec {command}"
        job = f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        labels = {"store": self._settings.store, "action": action, "study": study}
        runner.submit(job, command, labels)
        return self.job(job)

    def jobs(self) -> dict[str, Any]:
        """All jobs of this store, the newest first."""
        known = [self._described(job) for job in self._known()]
        return {"jobs": sorted(known, key=lambda job: job["created"] or "", reverse=True)}

    def job(self, job: str) -> dict[str, Any]:
        """One job.

        Raises:
            QuestionError: if this store has no such job, or jobs are off.
        """
        return {"job": self._described(self._one(job))}

    def log(self, job: str, offset: int) -> dict[str, Any]:
        """What a job has written, from a character on; see `job`."""
        self._one(job)
        text = self._enabled().log(job)
        part = text[offset : offset + _LOG_CHARACTERS]
        return {"text": part, "next_offset": min(offset, len(text)) + len(part)}

    def cancel(self, job: str) -> dict[str, Any]:
        """End a job; what it committed stays. See `job`."""
        if self._one(job).state in ("pending", "running"):
            self._enabled().stop(job)
        return self.job(job)

    def _enabled(self) -> Runner:
        if self._settings.studies is None or self._runner is None:
            raise QuestionError(
                "disabled", "jobs are off: start the service with --studies FOLDER to allow them."
            )
        return self._runner

    def _known(self) -> list[RunnerJob]:
        return [
            job for job in self._enabled().jobs()
            if job.id.startswith(_PREFIX) and job.labels.get("store") == self._settings.store
        ]  # fmt: skip

    def _one(self, job: str) -> RunnerJob:
        for known in self._known():
            if known.id == job:
                return known
        raise QuestionError("not_found", f"there is no job {job!r}: GET /api/jobs.")

    def _study_path(self, name: str) -> Path | None:
        """The file of a study, if it lies in the folder itself, whatever links say."""
        assert self._settings.studies is not None  # noqa: S101 - asked before
        folder = self._settings.studies.resolve()
        if not _STUDY_NAME.fullmatch(name):
            return None
        path = (folder / name).resolve()
        return path if path.parent == folder and path.is_file() else None

    def _described(self, job: RunnerJob) -> dict[str, Any]:
        return {
            "id": job.id,
            "action": job.labels.get("action"),
            "study": job.labels.get("study"),
            "state": job.state,
            "created": job.created,
            "ended": job.ended,
            "message": job.message,
            "progress": self._progress(job),
        }

    def _progress(self, job: RunnerJob) -> dict[str, Any] | None:
        """Committed shards of the run that a job captures; None until its log names the run."""
        if job.labels.get("action") == "analyse" or job.state == "pending":
            return None
        if job.id not in self._runs:
            found = _RUN_OF_LOG.search(self._enabled().log(job.id))
            if found is None and job.state == "running":
                return None
            self._runs[job.id] = None if found is None else found[1]
        run = self._runs[job.id]
        if run is None:
            return None
        try:
            self._store = self._store or open_store(self._settings.store)
            total = len(self._store.run_record(run)["shards"])
            return {"done": len(self._store.committed(run)), "total": total, "unit": "shards"}
        except StoreError:
            return None  # The run is not there yet, or was removed.


def _safe(key: str) -> str:
    if key in SAFE_KEYS or key.partition(".")[0] in SAFE_SECTIONS:
        return key
    raise QuestionError(
        "invalid",
        f"overrides can change {', '.join(SAFE_KEYS)} and keys of {' and '.join(SAFE_SECTIONS)}, "
        f"found {key!r}: change the study file for others.",
    )


def _one_line(key: str, value: str) -> str:
    if value.isprintable():
        return value
    raise QuestionError("invalid", f"the value of {key} must be one printable line of YAML.")


def _check(action: Action, path: Path, changed: list[str], run: str | None) -> None:
    """Refuse what the command would refuse, before it runs."""
    if action == "analyse" and changed:
        raise QuestionError(
            "invalid",
            "an analysis takes what was captured: overrides and tokens are of capture and run.",
        )
    if action != "analyse" and run is not None:
        raise QuestionError("invalid", "run says which run to analyse: leave it out elsewhere.")
    try:
        load_study(path, changed)
    except StudyError as error:
        raise QuestionError("invalid", str(error)) from error


def _description(path: Path) -> str:
    """The comment that a study file begins with, as one line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    return " ".join(comment)
