"""Ray Serve: the application as a deployment with replicas, on this machine or a cluster."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from ray_app.service.app import create_app
from ray_app.service.ray_jobs import RayRunner
from ray_app.service.settings import ServiceSettings
from ray_app.service.watch import Watch
from storage import ActlakeError

__all__ = ["APPLICATION", "Service", "build", "serving"]

APPLICATION = "actlake"
"""Name of the Serve application."""

_SECONDS_TO_APPEAR = 30.0


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
) -> Iterator[Callable[[], None]]:
    """Serve inside the block, on the cluster that RAY_ADDRESS names (see `own_ray`).

    Args:
        settings: of the application.
        host: address to bind to.
        port: port to bind to.
        check: raises ActlakeError if that cluster has ended; nothing is taken down there then.

    Yields:
        What raises ActlakeError if `check` does, or if the application is no longer there.

    Raises:
        ActlakeError: from `check`; or if that cluster cannot be joined, runs Serve already, or
            serves at another address than this.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        check()
        raise ActlakeError(
            f"cannot join the Ray that RAY_ADDRESS names: {' '.join(str(error).split())[:300]} "
            "Start it, or unset RAY_ADDRESS for a Ray of the service's own."
        ) from error
    try:
        _refuse_another_serve()
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=LoggingConfig(log_level="WARNING"),
        )
        with Watch(host, port, APPLICATION) as watch:

            def check_both() -> None:
                check()
                watch.check()

            try:
                serve.run(build(settings), name=APPLICATION, route_prefix="/")
                _wait_for(watch, host, port)
                yield check_both
            finally:
                check_both()  # Serve waits without end for a Ray that is dead.
                serve.delete(APPLICATION)
                if not serve.status().applications:
                    serve.shutdown()
    finally:
        ray.shutdown()


def _refuse_another_serve() -> None:
    """Serve has one set of addresses for a cluster, and one application at ``/``."""
    running = serve.status()
    if running.proxies or running.applications:
        raise ActlakeError(
            "Serve already runs on the Ray that RAY_ADDRESS names (applications: "
            f"{', '.join(running.applications) or 'none'}), and would keep its own address: end it "
            "with `serve shutdown`, add the store to its config file (docs/service.md), or unset "
            "RAY_ADDRESS."
        )


def _wait_for(watch: Watch, host: str, port: int) -> None:
    """Wait until the application is at its address, as it soon is once Serve says that it runs."""
    end = time.monotonic() + _SECONDS_TO_APPEAR
    while not watch.sees():
        if time.monotonic() > end:
            raise ActlakeError(
                f"Serve runs, but not at {host}:{port} of this machine: start the service on the "
                "head of the cluster that RAY_ADDRESS names."
            )
        time.sleep(0.2)
