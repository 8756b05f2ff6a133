"""``actlake serve``: a store over HTTP until Ctrl-C."""

import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ray_app.service.auth import default_token_path, read_or_make_token, token_digest
from ray_app.service.own_ray import own_ray
from ray_app.service.settings import ServiceSettings
from storage import ActlakeError, open_store

_LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


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
    with own_ray(), _serving(settings, host, port) as wait:
        shown = "127.0.0.1" if _is_wildcard(host) else host
        click.echo(f"store {root}")
        if is_new:
            click.echo(f"open  http://{shown}:{port}/#token={token}")
            click.echo(f"This is the only time that the token is shown; it is kept in {path}.")
        else:
            click.echo(f"open  http://{shown}:{port}/ (the token is in {path})")
        if not _is_loopback(host):
            click.echo(
                f"warning: bound to {host}, so whoever reaches it can try tokens, and traffic is "
                "not encrypted: put a proxy with TLS in front.",
                err=True,
            )
        # Orchestrators stop with SIGTERM; it ends the block as Ctrl-C does.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        try:
            wait()
        except KeyboardInterrupt:
            click.echo("stopping", err=True)


@contextmanager
def _serving(settings: ServiceSettings, host: str, port: int) -> Iterator[Callable[[], None]]:
    """Serve inside the block, which is given what waits for the end; loads Ray only now."""
    from ray_app.service import deployment

    with deployment.serving(settings, host=host, port=port):
        yield deployment.wait


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
