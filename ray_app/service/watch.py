"""Whether Ray Serve's proxy is where the service says that it is, and has the application."""

import time

import httpx2

from storage import ActlakeError

__all__ = ["Watch"]

_SECONDS_FOR_ROUTES = 5.0
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - asks there, binds to nothing


class Watch:
    """Asks the proxy for its routes, which it answers itself, however busy the replicas are.

    Serve replaces a proxy that dies, so only some time without an answer says that it is gone.
    """

    def __init__(self, host: str, port: int, application: str, *, patience: float = 60.0) -> None:
        """Nothing is asked yet.

        Args:
            host: address that the proxy is bound to.
            port: its port.
            application: name of what is served at ``/``.
            patience: seconds that it may be away.
        """
        name = _WILDCARDS.get(host, host)
        self._address = f"http://{f'[{name}]' if ':' in name else name}:{port}"
        self._application = application
        self._patience = patience
        self._was_there = False
        self._missing_since: float | None = None
        """When it was looked for first and not there, since it was there last."""
        # A proxy of the environment leads elsewhere.
        self._http = httpx2.Client(
            base_url=self._address, timeout=_SECONDS_FOR_ROUTES, trust_env=False
        )

    def __enter__(self) -> "Watch":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._http.close()

    def sees(self) -> bool:
        """Whether the application is there now."""
        try:
            answer = self._http.get("/-/routes")
            routes = answer.json() if answer.is_success else None
        except (httpx2.HTTPError, ValueError):
            return False
        is_there = isinstance(routes, dict) and routes.get("/") == self._application
        self._was_there |= is_there
        return is_there

    def check(self) -> None:
        """Look once.

        Raises:
            ActlakeError: if it was there, and has been away for longer than it may be.
        """
        if self.sees() or not self._was_there:
            self._missing_since = None
            return
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since > self._patience:
            raise ActlakeError(
                f"the application {self._application!r} has not been at {self._address} for "
                f"{self._patience:g} seconds: its Ray has ended, or somebody has removed it from "
                "Serve. Start the service again."
            )
