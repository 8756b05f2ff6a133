"""``actlake serve``: a store over HTTP until Ctrl-C."""

import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import click
import psutil

from ray_app.service.auth import default_token_path, read_or_make_token, token_digest
from ray_app.service.own_ray import own_ray
from ray_app.service.settings import ServiceSettings
from storage import ActlakeError, open_store

_LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""How orchestrators, Ctrl-C and a terminal that closes stop the service."""
_SECONDS_BETWEEN_CHECKS = 1.0


def serve(
    store_path: str,
    *,
    host: str,
    port: int,
    allowed: tuple[str, ...],
    replicas: int,
    slots: int,
    memory_mb: int,
    studies: Path | None,
    token_file: Path | None,
) -> None:
    """Serve a store; returns when the process is interrupted."""
    store = open_store(store_path)
    root = store.files.root
    if studies is not None and not studies.is_dir():
        raise ActlakeError(f"--studies must be a folder of study files, found {studies}.")
    _check_free(host, port)
    path = token_file or default_token_path(root)
    token, is_new = read_or_make_token(path)
    settings = ServiceSettings(
        store=root,
        token_sha256=token_digest(token),
        hosts=sorted({*_LOOPBACK, *allowed, *([] if _is_wildcard(host) else [host])}),
        replicas=replicas,
        slots=slots,
        memory_mb=memory_mb,
        studies=None if studies is None else studies.resolve(),
        job_folder=Path.cwd(),
    )
    _warn_of_memory(settings)
    with (
        suppress(KeyboardInterrupt),
        _interrupted_by_signals(),
        own_ray() as check_ray,
        _serving(settings, host, port, check_ray) as check,
    ):
        _stop_on_signals()  # Ray has set handlers of its own.
        _announce(root, path, token if is_new else None, host, port)
        _wait(check)


def _warn_of_memory(settings: ServiceSettings) -> None:
    """Warn if all queries together may take more memory than this machine has."""
    total = psutil.virtual_memory().total
    if settings.memory_bound > total:
        click.echo(
            f"warning: queries may take {settings.memory_bound >> 20} MiB together, this machine "
            f"has {total >> 20}: give fewer --slots or --replicas, or less --memory-mb.",
            err=True,
        )


def _wait(check: Callable[[], None]) -> None:
    """Wait for a signal, or for the end of what is served, which `check` raises."""
    try:
        while True:
            check()
            time.sleep(_SECONDS_BETWEEN_CHECKS)
    except KeyboardInterrupt:
        with suppress(OSError):  # The terminal may be what has gone.
            click.echo("stopping", err=True)
        raise


def _announce(root: str, path: Path, new_token: str | None, host: str, port: int) -> None:
    """Say where the service is, and a token that is new."""
    shown = "127.0.0.1" if _is_wildcard(host) else host
    click.echo(f"store {root}")
    if new_token is not None:
        click.echo(f"open  http://{shown}:{port}/#token={new_token}")
        click.echo(f"This is the only time that the token is shown; it is kept in {path}.")
    else:
        click.echo(f"open  http://{shown}:{port}/ (the token is in {path})")
    if not _is_loopback(host):
        click.echo(
            f"warning: bound to {host}, so whoever reaches it can try tokens, and traffic is "
            "not encrypted: put a proxy with TLS in front.",
            err=True,
        )


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let the signals that end the service be KeyboardInterrupt inside the block."""
    before = {number: signal.getsignal(number) for number in _STOPPING}
    _stop_on_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_on_signals() -> None:
    for number in _STOPPING:
        # nohup has a closed terminal ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _serving(
    settings: ServiceSettings, host: str, port: int, check: Callable[[], None]
) -> AbstractContextManager[Callable[[], None]]:
    """See `deployment.serving`; loads Ray only now."""
    from ray_app.service import deployment

    return deployment.serving(settings, host=host, port=port, check=check)


def _check_free(host: str, port: int) -> None:
    """Say at once that a port is taken; Serve would say so in a log."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ActlakeError(
                f"cannot bind to {host}:{port}: {error.strerror}. Give another --port or --host."
            ) from error


def _is_wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::")  # noqa: S104 - asks whether it is, binds to nothing


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
