"""`ray up cluster.local.yaml` starts a cluster that captures; see ray_up.py."""

from pathlib import Path

import pytest

import ray_up


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_launcher_starts_a_cluster_a_job_captures_on_both_hosts_and_it_ends(
    tmp_path: Path,
) -> None:
    reason = ray_up.why_not()
    if reason is not None:
        pytest.skip(reason)
    assert ray_up.drive_ray_up(ray_up.write_study(tmp_path), again=False)
