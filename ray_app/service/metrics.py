"""What a replica counts, as Prometheus text."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ray_app.service.pool import Pool

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0)


class Metrics:
    """Counters of one replica, which its process id tells from others."""

    def __init__(self, pool: Pool) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "actlake_http_requests",
            "Requests by route and status.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "actlake_http_seconds",
            "Seconds until a request was answered.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        for name, text, read in (
            ("waiting", "Questions that wait for a process.", lambda: pool.waiting),
            ("busy", "Query processes that work.", lambda: pool.busy),
            ("restarts", "Query processes that were replaced.", lambda: pool.restarts),
        ):
            Gauge(f"actlake_queries_{name}", text, registry=self._registry).set_function(read)
        Gauge("actlake_replica_info", "1.", ["pid"], registry=self._registry).labels(
            str(os.getpid())
        ).set(1)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request that was answered."""
        known = method if method in ("GET", "POST", "DELETE", "HEAD") else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All counters as Prometheus reads them."""
        return generate_latest(self._registry)
