"""What every request passes before a route sees it: host, token, size; and headers of answers."""

import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_app.service.auth import is_token
from ray_app.service.metrics import Metrics
from ray_app.service.settings import ServiceSettings

__all__ = ["Walls", "error_body"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def error_body(kind: str, message: str) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"kind": kind, "message": message}}


class Walls:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.perf_counter()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(scope, MutableHeaders(scope=message))
            await send(message)

        bounded = _Bounded(receive, self._settings.max_body_bytes)
        try:
            refusal = self._refusal(Headers(scope=scope), scope)
            if refusal is None:
                await self._app(scope, bounded, sending)
            else:
                await refusal(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.observe(scope["method"], route, status, time.perf_counter() - begun)

    def _refusal(self, headers: Headers, scope: Scope) -> JSONResponse | None:
        """The answer to a request that must not reach a route."""
        if not self._is_our_host(headers.get("host", "")):
            message = (
                "the header Host must be a name of this service: start it with --allow-host NAME "
                "if it is reached by another."
            )
            return JSONResponse(error_body("refused", message), 421)
        if not _is_open(scope["path"]) and not self._is_authorised(headers):
            message = "a valid token is needed: send the header Authorization: Bearer TOKEN."
            bearer = {"WWW-Authenticate": "Bearer"}
            return JSONResponse(error_body("unauthorized", message), 401, bearer)
        return None

    def _is_our_host(self, host: str) -> bool:
        name = host[: host.rfind(":")] if host.rpartition(":")[2].isdecimal() else host
        return "*" in self._settings.hosts or name.lower() in self._settings.hosts

    def _is_authorised(self, headers: Headers) -> bool:
        given = headers.getlist("authorization")
        scheme, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        return scheme.lower() == "bearer" and is_token(token, self._settings.token_sha256)


def _is_open(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/static/")


def _add_headers(scope: Scope, headers: MutableHeaders) -> None:
    for name, value in _HEADERS.items():
        headers[name] = value
    # A browser keeps the parts of the page, but asks whether they are still those of this version.
    is_static = scope["path"].startswith("/static/")
    headers["Cache-Control"] = "no-cache" if is_static else "no-store"


class _Bounded:
    """Receives a body, whatever length it says that it has, up to a number of bytes."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._received = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._max_bytes:
            raise HTTPException(413, f"a request may have {self._max_bytes} bytes, found more")
        return message
