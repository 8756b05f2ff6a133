"""The watch over Serve's proxy, against a stand-in for the proxy."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ray_app.service.watch import Watch
from storage import ActlakeError


class Proxy(ThreadingHTTPServer):
    """Answers ``/-/routes`` with what it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.body = json.dumps({"/": "actlake"})


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Proxy)
        assert self.path == "/-/routes"
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body.encode())

    def log_message(self, *_: object) -> None:
        """Tests want no lines."""


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_sees_the_application_alone(proxy: Proxy, host: str) -> None:
    with Watch(host, proxy.server_port, "actlake") as watch:
        assert watch.sees()
        for body in ('{"/": "another"}', "{}", '["/"]', "Service unavailable"):
            proxy.body = body
            assert not watch.sees(), body
        proxy.body, proxy.status = '{"/": "actlake"}', 503
        assert not watch.sees()


def test_a_proxy_of_the_environment_is_not_asked(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Watch("127.0.0.1", proxy.server_port, "actlake") as watch:
        assert watch.sees()


def test_only_long_absence_is_an_end(proxy: Proxy) -> None:
    with Watch("127.0.0.1", proxy.server_port, "actlake", patience=0.2) as watch:
        proxy.status = 503
        time.sleep(0.3)
        watch.check()  # It was never there.
        proxy.status = 200
        watch.check()
        proxy.status = 503
        watch.check()
        time.sleep(0.3)
        proxy.status = 200
        watch.check()  # It was away, and came back.
        proxy.body = "{}"
        time.sleep(0.3)
        watch.check()  # Nobody looked meanwhile: it may have gone just now.
        time.sleep(0.3)
        with pytest.raises(ActlakeError, match="has not been at http:"):
            watch.check()


def test_nobody_there_is_no_error_of_its_own(proxy: Proxy) -> None:
    with Watch("127.0.0.1", proxy.server_port, "actlake") as watch:
        proxy.shutdown()
        proxy.server_close()
        assert not watch.sees()
        watch.check()
