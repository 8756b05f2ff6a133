"""The hub is asked once: without it, errors come at once and say why."""

import http.server
import os
import threading
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from ray_app.hub import OutOfReachError, why_unreachable
from ray_app.models.loading import locate_model
from ray_app.study import ModelSettings

# Port 1 of this machine refuses every connection.
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask anew in each test, and leave the libraries as they were."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    why_unreachable.cache_clear()
    yield
    why_unreachable.cache_clear()


def test_a_hub_that_refuses_is_out_of_reach_for_this_process_and_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    assert why_unreachable() == f"{NOWHERE} does not answer: Connection refused"
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_host_without_an_address_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    reason = why_unreachable()
    assert reason is not None
    assert reason.startswith("http://hub.invalid does not answer: ")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_hub_that_answers_anything_is_in_reach(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Keep the test quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert why_unreachable() is None
        server.shutdown()
    assert not constants.HF_HUB_OFFLINE


def test_a_user_who_works_offline_is_not_asked_for_a_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "never asked")
    assert why_unreachable() == "HF_HUB_OFFLINE is set"


def test_a_model_that_only_the_hub_has_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    with pytest.raises(OutOfReachError) as caught:
        locate_model(ModelSettings(source="nobody/nothing-7b"))
    assert str(caught.value) == (
        "model.source 'nobody/nothing-7b' is no folder or file here and not in the local cache, "
        f"and the hub cannot be asked for it ({NOWHERE} does not answer: Connection refused): "
        "check the id and the network, or give a local folder."
    )
