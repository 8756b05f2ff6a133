"""A small store behind the real application: its own query processes, no Ray, no network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from analysis import AnalysisSettings, analyse_run
from ray_app.service.app import create_app
from ray_app.service.auth import token_digest
from ray_app.service.settings import ServiceSettings
from service_parts import RUN, STUDY, TOKEN, FakeRunner
from storage import Store, create_store
from written_runs import importances, write_run


@pytest.fixture(scope="module")
def service_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A written run of 112 neurons in three tasks, and its analysis."""
    store = create_store(tmp_path_factory.mktemp("service") / "store")
    write_run(store, RUN, importances(7))
    analyse_run(store, RUN, AnalysisSettings(metrics=["abs", "rms"], fractions=[0.1, 0.25]))
    return store


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one study, with a link out of it and a file that is no study."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "small.yaml").write_text(STUDY, encoding="utf-8")
    (folder / "notes.txt").write_text("not a study", encoding="utf-8")
    outside = tmp_path_factory.mktemp("outside") / "outside.yaml"
    outside.write_text(STUDY, encoding="utf-8")
    (folder / "link.yaml").symlink_to(outside)
    return folder


@pytest.fixture(scope="module")
def service_settings(service_store: Store, studies: Path) -> ServiceSettings:
    return ServiceSettings(
        store=service_store.files.root,
        token_sha256=token_digest(TOKEN),
        hosts=["testserver"],
        studies=studies,
        slots=2,
        memory_mb=256,
        max_bytes=4 << 20,
        max_seconds=20,
        freshness_seconds=0,
    )


@pytest.fixture(scope="module")
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture(scope="module")
def client(service_settings: ServiceSettings, runner: FakeRunner) -> Iterator[TestClient]:
    """A client of the application that holds the token."""
    app = create_app(service_settings, runner)
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as made:
        yield made
