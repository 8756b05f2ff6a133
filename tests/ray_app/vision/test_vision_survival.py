"""Workers that die in the middle of images leave the files that undisturbed ones do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_app.capture import driver
from ray_app.capture.scheduling import Scheduler
from ray_app.capture.stage import build_stage
from ray_app.progress import NoProgress
from ray_app.run import Run
from storage import verify_store

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shards_of_images_that_dead_workers_had_come_out_the_same(
    write_vision_study: Callable[..., Path],
    begin_locally: Callable[..., Run],
    tmp_path: Path,
    inline_calls: Any,
    inline_pipeline: Any,
) -> None:
    path = write_vision_study("timm")
    contents = []
    for deaths in (set[int](), {2, 5, 9, 10}):
        run = begin_locally(path, tmp_path / f"store-{len(deaths)}")
        stages = map(build_stage, run.stage_specs([range(1), range(1, 4)]))
        pipeline = inline_pipeline(*stages, dies_at=deaths)
        workers = Scheduler([pipeline], inline_calls, max_deaths=4)
        driver.capture(run, workers, NoProgress())
        assert (pipeline.num_revivals > 0) == bool(deaths)
        assert verify_store(run.store).problems == []
        files = run.store.files
        contents.append({path: files.sha256(path) for path in files.list("runs/*/*/**/*.*")})
    assert contents[0] == contents[1]
