"""The files for `ray up` fit Ray's own schema and say what the documentation promises of them."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
FILES = ("cluster.yaml", "cluster.local.yaml")


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return config


@pytest.mark.parametrize("name", FILES)
def test_the_file_fits_rays_schema(name: str) -> None:
    config = load(name)
    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_rays_schema_refuses_a_misspelt_key(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        jsonschema.validate(load(name) | {"setup_comands": []}, SCHEMA)


@pytest.mark.parametrize("name", FILES)
def test_every_node_installs_the_project_and_asks_for_the_token(name: str) -> None:
    config = load(name)
    assert any("constraints.txt" in command for command in config["setup_commands"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for kind in ("head", "worker"):
        starts = [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]


def test_the_cloud_file_scales_gpu_workers() -> None:
    worker = load("cluster.yaml")["available_node_types"]["gpu_worker"]
    assert worker["resources"]["GPU"] == 1
    assert 1 <= worker["min_workers"] < worker["max_workers"] <= load("cluster.yaml")["max_workers"]


def test_the_local_file_makes_up_for_what_rays_launcher_lacks() -> None:
    config = load("cluster.local.yaml")
    (start,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    # The second autoscaler starts no worker of this provider, and `ray up` exports a 1.
    assert "RAY_enable_autoscaler_v2=0 ray start" in start
    # `ray down` runs `ray stop` over ssh, and a job's command has the PATH of `ray start`.
    assert any("actlake-env/bin:$PATH" in line for line in config["setup_commands"])
