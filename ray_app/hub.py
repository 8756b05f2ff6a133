"""The Hugging Face hub: asked once whether it answers, so that nobody waits for retries.

The libraries that load models and datasets ask six times over half a minute, and say so in a dozen
lines, before they turn to their caches. With the hub known to be out of reach they turn to them at
once.
"""

import os
import ssl
import urllib.error
import urllib.request
from functools import cache

from huggingface_hub import constants

from storage import ActlakeError

__all__ = ["OutOfReachError", "why_unreachable"]

_TIMEOUT_SECONDS = 10.0


class OutOfReachError(ActlakeError):
    """Something is not on this machine, and the hub that may have it cannot be asked."""


@cache
def why_unreachable() -> str | None:
    """Why the hub cannot be asked, or None if it can.

    If it does not answer, this process and those it starts work offline from now on, with what
    their caches hold.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    reason = _failure_of_one_request(constants.ENDPOINT)
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    return reason


def _failure_of_one_request(url: str) -> str | None:
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - the hub's own address
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        error.close()  # Whatever it answers, it answers.
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # The hub is there; certificates are for the libraries to judge.
        text = getattr(reason, "strerror", None) or str(reason)
        return f"{url} does not answer: {text}"
