"""A client of `actlake serve`: SQL from anywhere as Arrow or pandas, without this machine's Ray.

>>> from ray_app.client import Client
>>> client = Client("http://127.0.0.1:8600", token)  # doctest: +SKIP
>>> client.sql("select * from runs where run = $run", run="demo").df()  # doctest: +SKIP
"""

from typing import Any

import httpx2
import pyarrow as pa

from storage import ActlakeError

__all__ = ["Client", "Rows", "ServiceError"]

_SPARE_SECONDS = 90.0
"""How much longer than a query may take the client waits: it may stand in a queue first."""


class ServiceError(ActlakeError):
    """The service refused a request, or cannot be reached.

    `kind` is that of the HTTP contract, such as 'syntax' or 'busy'; 'unreachable' if there was no
    answer. `status` is the HTTP status, 0 if there was none.
    """

    def __init__(self, kind: str, message: str, status: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


class Rows:
    """The rows of one query."""

    def __init__(self, table: pa.Table, truncated: str, elapsed_ms: float) -> None:
        self.table = table
        """The rows as an Arrow table."""
        self.truncated = truncated
        """'no', or 'rows' or 'bytes' if there were more than an answer may have."""
        self.elapsed_ms = elapsed_ms
        """Milliseconds that the service took."""

    def df(self) -> Any:
        """The rows as a pandas DataFrame."""
        return self.table.to_pandas()

    def to_pylist(self) -> list[dict[str, Any]]:
        """The rows as dicts."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows


class Client:
    """Asks a service; may be used as a context manager, which closes its connections."""

    def __init__(self, url: str, token: str) -> None:
        """Nothing is asked yet.

        Args:
            url: of the service, such as ``http://127.0.0.1:8600``.
            token: what `actlake serve` showed at its first start.
        """
        self._http = httpx2.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=_SPARE_SECONDS
        )

    def sql(
        self,
        query: str,
        *,
        max_rows: int = 1_000_000,
        timeout_seconds: float = 30.0,
        **params: str | float | bool | None,
    ) -> Rows:
        """Answer one query.

        Args:
            query: one SELECT-like statement of DuckDB's SQL.
            max_rows: most rows; `Rows.truncated` says whether there are more.
            timeout_seconds: seconds after which the service stops the query.
            params: values of ``$name`` parameters.

        Raises:
            ServiceError: what the service says is wrong.
        """
        asked = {
            "query": query,
            "params": params,
            "format": "arrow",
            "max_rows": max_rows,
            "timeout_seconds": timeout_seconds,
        }
        answer = self._request("POST", "/api/sql", json=asked, wait=timeout_seconds)
        return Rows(
            pa.ipc.open_stream(answer.content).read_all(),
            answer.headers["X-Actlake-Truncated"],
            float(answer.headers["X-Actlake-Elapsed-Ms"]),
        )

    def get(self, path: str, **query: Any) -> Any:
        """The JSON of any GET route of the contract, such as ``/api/runs``.

        Raises:
            ServiceError: what the service says is wrong.
        """
        given = {name: value for name, value in query.items() if value is not None}
        return self._request("GET", path, params=given).json()

    def submit(self, action: str, study: str, **options: Any) -> dict[str, Any]:
        """Start a job; `options` are overrides, tokens and run of ``POST /api/jobs``.

        Raises:
            ServiceError: what the service says is wrong.
        """
        asked = {"action": action, "study": study, **options}
        job: dict[str, Any] = self._request("POST", "/api/jobs", json=asked).json()["job"]
        return job

    def cancel(self, job: str) -> dict[str, Any]:
        """End a job.

        Raises:
            ServiceError: what the service says is wrong.
        """
        ended: dict[str, Any] = self._request("DELETE", f"/api/jobs/{job}").json()["job"]
        return ended

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, method: str, path: str, *, wait: float = 0.0, **options: Any) -> Any:
        try:
            answer = self._http.request(method, path, timeout=wait + _SPARE_SECONDS, **options)
        except httpx2.HTTPError as error:
            raise ServiceError(
                "unreachable",
                f"the service at {self._http.base_url} does not answer ({error}): is it running?",
                0,
            ) from error
        if answer.is_success:
            return answer
        try:
            told = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            told = {"kind": "internal", "message": answer.text[:300] or answer.reason_phrase}
        raise ServiceError(told["kind"], told["message"], answer.status_code)
