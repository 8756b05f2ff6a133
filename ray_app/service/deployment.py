"""Ray Serve: the application as a deployment with replicas, on this machine or a cluster."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from ray_app.service.app import create_app
from ray_app.service.ray_jobs import RayRunner
from ray_app.service.settings import ServiceSettings

__all__ = ["APPLICATION", "Service", "build", "serving"]

APPLICATION = "actlake"
"""Name of the Serve application."""


@serve.deployment(name="store")
@serve.ingress()
class Service:
    """One replica: a shell around `create_app`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = ServiceSettings.model_validate(settings)

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve calls for the ASGI application of the replica."""
        runner = None if self._settings.studies is None else RayRunner()
        return create_app(self._settings, runner)


def build(settings: ServiceSettings) -> Any:
    """The Serve application, for `serve run ray_app.service.deployment:build` and config files.

    Args:
        settings: the arguments that a config file gives under ``args``.
    """
    return Service.options(  # type: ignore[attr-defined]
        num_replicas=settings.replicas,
        # Requests wait in the replica, which counts them; Serve need not hold them back.
        max_ongoing_requests=settings.slots + settings.max_waiting,
        # Captures take the CPUs that they ask for; the service lives beside them.
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
    ).bind(settings.model_dump(mode="json"))


@contextmanager
def serving(
    settings: ServiceSettings, *, host: str, port: int, check: Callable[[], None]
) -> Iterator[None]:
    """Serve inside the block, on the cluster that RAY_ADDRESS names (see `own_ray`).

    Args:
        settings: of the application.
        host: address to bind to.
        port: port to bind to.
        check: raises ActlakeError if that cluster has ended; nothing is taken down there then.

    Raises:
        ActlakeError: from `check`.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=LoggingConfig(log_level="WARNING"),
        )
        serve.run(build(settings), name=APPLICATION, route_prefix="/")
        try:
            yield
        finally:
            check()
            serve.delete(APPLICATION)
            if not serve.status().applications:
                serve.shutdown()
    finally:
        ray.shutdown()
