"""What tests of the service share: a token, a study, and a runner that runs nothing."""

from collections.abc import Mapping

from ray_app.service.jobs import RunnerJob

TOKEN = "a-token-of-tests-that-nobody-guesses"
RUN = "small-1"

STUDY = """\
# A study that tests
# may start.
name: small
model: {source: nowhere}
tasks:
  code: {files: "nothing/*.py"}
  prose: {files: "nothing/*.txt"}
reference: prose
"""


class FakeRunner:
    """Remembers commands instead of running them."""

    def __init__(self) -> None:
        self.commands: dict[str, str] = {}
        self.states: dict[str, RunnerJob] = {}
        self.logs: dict[str, str] = {}

    def submit(self, job: str, command: str, labels: Mapping[str, str]) -> None:
        self.commands[job] = command
        self.logs[job] = ""
        self.states[job] = RunnerJob(
            id=job, state="running", created="2026-01-31T12:00:00+00:00", ended=None, message="",
            labels=labels,
        )  # fmt: skip

    def jobs(self) -> list[RunnerJob]:
        return list(self.states.values())

    def log(self, job: str) -> str:
        return self.logs[job]

    def stop(self, job: str) -> None:
        old = self.states[job]
        self.states[job] = RunnerJob(
            id=job, state="stopped", created=old.created, ended="2026-01-31T12:01:00+00:00",
            message="", labels=old.labels,
        )  # fmt: skip
