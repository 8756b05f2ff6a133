"""Jobs as Ray jobs: the cluster keeps them, so every replica sees the same."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_app.service.jobs import RunnerJob, State
from ray_app.service.pool import QuestionError

__all__ = ["RayRunner"]

_STATES: dict[JobStatus, State] = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "stopped",
}


class RayRunner:
    """A `Runner` over Ray's job server, which is part of the cluster's dashboard."""

    def __init__(self) -> None:
        """Nothing is asked yet: the job server is that of the cluster that this process is in."""
        self._made: JobSubmissionClient | None = None

    @property
    def _client(self) -> JobSubmissionClient:
        if self._made is None:
            self._made = JobSubmissionClient(ray.get_runtime_context().gcs_address)
        return self._made

    def submit(self, job: str, command: str, labels: Mapping[str, str]) -> None:
        """See `Runner.submit`."""
        with _answering():
            self._client.submit_job(entrypoint=command, submission_id=job, metadata=dict(labels))

    def jobs(self) -> list[RunnerJob]:
        """See `Runner.jobs`."""
        with _answering():
            known = self._client.list_jobs()
        return [_described(job) for job in known if job.submission_id is not None]

    def log(self, job: str) -> str:
        """See `Runner.log`."""
        with _answering():
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> None:
        """See `Runner.stop`."""
        with _answering():
            self._client.stop_job(job)


@contextmanager
def _answering() -> Iterator[None]:
    """Tell what the job server fails with: it is another process, and may be starting or down."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise QuestionError(
            "busy", f"Ray's job server does not do it now ({' '.join(str(error).split())[:300]})."
        ) from error


def _described(details: Any) -> RunnerJob:
    return RunnerJob(
        id=details.submission_id,
        state=_STATES[details.status],
        created=_time(details.start_time),
        ended=_time(details.end_time),
        message=details.message or "",
        labels=details.metadata or {},
    )


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
