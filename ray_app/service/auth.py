"""The token that clients show: made once, kept in its owner's file, compared in constant time."""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

import platformdirs

from storage import ActlakeError

__all__ = ["TokenError", "default_token_path", "is_token", "read_or_make_token", "token_digest"]

_SHORTEST = 20


class TokenError(ActlakeError):
    """A token file cannot be used."""


def default_token_path(store_root: str) -> Path:
    """Where the token of a store is kept: in the state folder of the user.

    Args:
        store_root: absolute path or URL of the store.
    """
    digest = hashlib.sha256(store_root.encode()).hexdigest()[:12]
    return platformdirs.user_state_path("actlake") / f"token-{digest}"


def read_or_make_token(path: Path) -> tuple[str, bool]:
    """The token of a file, and whether it was made now.

    Raises:
        TokenError: if the file cannot be read or made, others than its owner may read it, or it
            holds no token.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_token(path), False
    except OSError as error:
        raise TokenError(
            f"cannot make the token file {path}: {error.strerror}. Give another with --token-file."
        ) from error
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token, True


def _read_token(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"cannot read the token file {path}: {error}.") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TokenError(
            f"the token file {path} must be its owner's alone, found mode "
            f"{stat.S_IMODE(mode):04o}: run chmod 600 {path}, or remove it if others have seen it."
        )
    if len(token) < _SHORTEST or len(token.split()) != 1:
        raise TokenError(
            f"the token file {path} must hold one word of at least {_SHORTEST} characters, found "
            f"{len(token)} character(s): remove the file and start again, which makes a new one."
        )
    return token


def token_digest(token: str) -> str:
    """SHA-256 of a token, in hexadecimal: what replicas are given."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_token(shown: str, digest: str) -> bool:
    """Whether what a client shows is the token of a digest, in a time that tells nothing."""
    return hmac.compare_digest(token_digest(shown), digest)
