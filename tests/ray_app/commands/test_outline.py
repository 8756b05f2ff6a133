"""Plans of the paper's studies: bytes, memory, GPUs and hours, with a hub and without one."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from huggingface_hub import constants

from ray_app.facts import inspect_model, outline_model
from ray_app.hub import OutOfReachError, why_unreachable
from ray_app.models.errors import ModelError
from ray_app.plan import identity_of
from ray_app.study import StudyError, load_study

STUDIES = Path(__file__).parents[3] / "studies"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Port 1 of this machine refuses every connection.
NOWHERE = "http://127.0.0.1:1"

SHAPE: dict[str, Any] = {
    "model_type": "mistral", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask a hub that refuses every connection, and leave the libraries as they were."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    why_unreachable.cache_clear()
    yield
    why_unreachable.cache_clear()


def line(plan: str, start: str) -> str:
    [found] = [line for line in plan.splitlines() if line.startswith(start)]
    return found


@pytest.mark.usefixtures("_no_hub")
def test_the_mistral_study_is_planned_from_the_file_alone(
    actlake: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    study = STUDIES / "mistral-7b-modularity.yaml"
    status, plan, told = actlake("plan", study, "--store", tmp_path)
    assert (status, told) == (0, "")
    # As the model's card on the hub says: 7,241,732,096; and as the paper counts MLP neurons.
    assert line(plan, "model ") == (
        "model   MistralForCausalLM, 32 layers, 7,241,732,096 parameters, 589,824 neurons captured"
    )
    assert "\n        measures from the study\n" in plan
    assert re.search(rf"No samples were drawn: the hub cannot be\s+asked \({NOWHERE}", plan)
    assert line(plan, "pile ").split() == ["pile", "100", "100,000", "5"]
    assert re.match(r"store   1,322 files, about \d\.\d\d GiB; ", line(plan, "store"))
    assert "4 GPU(s) (L4, 24.00 GiB); this machine has " in plan
    stages = re.findall(r"stage (\d): layers (\d+)-(\d+), (\S+) GiB of GPU (\d), \d", plan)
    assert [(stage[0], stage[4]) for stage in stages] == [(str(n), str(n)) for n in range(4)]
    assert [int(stage[1]) for stage in stages[1:]] == [int(s[2]) + 1 for s in stages[:-1]]
    # 7 billion weights of a byte and more, on four GPUs.
    assert 7.2 < sum(float(stage[3]) for stage in stages) < 24
    # 2.4 million tokens, 2 FLOPs a weight, the largest of four stages, a tenth of 121 TFLOP/s.
    hours = float(line(plan, "hours").split()[1])
    assert 2.4e6 * 2 * 7.24e9 / 4 / 12.1e12 / 3600 < hours < 0.3
    assert "(10% of the 121 of one L4, assumed)" in " ".join(plan.split())


@pytest.mark.usefixtures("_no_hub")
def test_the_vit_study_is_planned_from_the_file_alone(
    actlake: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    study = STUDIES / "vit-cifar20-modularity.yaml"
    status, plan, _ = actlake(
        "plan", study, "--store", tmp_path, "--set", "resources.replicas=2",
        "--set", "resources.gpus_per_stage=2",
    )  # fmt: skip
    assert status == 0
    assert line(plan, "model ").split(", ")[1:] == [
        "12 layers", "85,875,556 parameters", "46,080 neurons captured",
    ]  # fmt: skip
    # 508 images of 197 positions, 100 images a shard.
    assert line(plan, "fish ").split() == ["fish", "508", "100,076", "6"]
    assert "4 GPU(s) (L4, 24.00 GiB)" in plan
    assert "of GPU 0-1, 2-3, " in plan
    assert "The bytes of images are not known" in plan


@pytest.mark.usefixtures("_no_hub")
def test_both_studies_have_a_twin_that_is_planned_alike(
    actlake: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    study = STUDIES / "vit-cifar20-modularity.yaml"
    trained, twin = (
        actlake("plan", study, "--store", tmp_path, "--set", f"model.init={init}")[1]
        for init in ("pretrained", "random")
    )
    free = re.compile(r"[\d.,]+ \w+ (are )?free")
    assert free.sub("", trained) == free.sub("", twin)


@pytest.mark.usefixtures("_no_hub")
def test_a_model_of_timm_needs_no_shape(
    actlake: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "study.yaml").write_text(
        "name: fish\nmodel: {source: 'timm:vit_tiny_patch16_224'}\n"
        "tasks: {all: {dataset: uoft-cs/cifar100, image_column: img}}\n"
    )
    status, plan, told = actlake("plan", tmp_path / "study.yaml", "--store", tmp_path)
    assert (status, told) == (0, "")
    assert line(plan, "model ").startswith("model   VisionTransformer, 12 layers, 5,717,416 param")


@pytest.mark.usefixtures("_no_hub")
def test_without_a_shape_the_study_is_refused_and_told_what_would_help(
    write_study: Callable[..., Path],
) -> None:
    study = load_study(write_study(model={"source": "nobody/nothing-7b"}))
    with pytest.raises(OutOfReachError, match=r"; to plan without it, give the .* as model\.shape"):
        outline_model(study)


@pytest.mark.usefixtures("_no_hub")
def test_a_capture_does_not_take_the_shape_for_the_model(
    write_study: Callable[..., Path],
) -> None:
    study = load_study(write_study(model={"source": "nobody/nothing-7b", "shape": SHAPE}))
    assert outline_model(study).is_outlined
    with pytest.raises(OutOfReachError, match="is no folder or file here and not in the local"):
        inspect_model(study)


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "nonsense"}, ModelError, "model.shape makes no configuration .*nonsense"),
        ({"max_position_embeddings": 16}, StudyError, "capture.max_length must be at most 16"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(
    write_study: Callable[..., Path],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    model = {"source": "nobody/nothing-7b", "shape": SHAPE | changes}
    with pytest.raises(error, match=message):
        outline_model(load_study(write_study(model=model)))


def test_a_shape_that_is_right_changes_no_run_and_one_that_is_wrong_is_refused(
    write_study: Callable[..., Path], model_folder: Callable[[str], Path]
) -> None:
    source = str(model_folder("llama"))
    config = json.loads((Path(source) / "config.json").read_text())
    shape = {key: config[key] for key in SHAPE}
    plain = load_study(write_study(model={"source": source}))
    shaped = load_study(write_study(model={"source": source, "shape": shape}))
    model = inspect_model(shaped)
    assert identity_of(shaped, model) == identity_of(plain, inspect_model(plain))
    assert not model.is_outlined
    wrong = load_study(write_study(model={"source": source, "shape": shape | {"hidden_size": 7}}))
    width = config["hidden_size"]
    with pytest.raises(ModelError, match=rf"shape\.hidden_size must .* is {width}, found 7: corr"):
        inspect_model(wrong)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with the configuration of one model, and nothing else."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        config = transformers.MistralConfig(**{k: v for k, v in SHAPE.items() if k != "model_type"})
        body = config.to_json_string().encode()
        found = self.path == "/some/mistral/resolve/main/config.json" or self.path == "/"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body) if found else 0))
        if found:
            self.send_header("ETag", '"config"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        return body if found else b""

    def log_message(self, *arguments: object) -> None:
        """Keep the test quiet."""


def test_with_a_hub_the_models_configuration_is_read_there(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    resources = {"stages": 2, "gpus_per_stage": 1, "gpu": "H100", "tflops": 100.0}
    study = write_study(model={"source": "some/mistral"}, resources=resources)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        hub = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "COLUMNS": "160",
        }
        done = subprocess.run(
            [sys.executable, "-c", "from ray_app.cli import main; main()", "plan", str(study),
             "--outline", "--store", str(tmp_path)],
            env=clean | hub, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr
    output = " ".join(done.stdout.split())
    assert "model MistralForCausalLM, 4 layers, " in output
    assert f"measures from its configuration, hub:{COMMIT}" in output
    assert "No samples were drawn: --outline was given." in output
    assert "stage 1: layers 2-3, " in output
    assert "100 TFLOP/s a stage (resources.tflops)" in output
