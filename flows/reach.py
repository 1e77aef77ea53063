"""Whether a server answers: one of our own on this machine, or a Prefect server that others own."""

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

LOOPBACK = "127.0.0.1"
"""Where servers of our own listen."""
_PATIENCE = 2
"""Seconds that a server has to answer."""
_NOBODY_BEHIND = (502, 503, 504)
"""Answers of a proxy that does not reach the server."""


def answers(url: str) -> bool:
    """Whether a page of a server of our own answers with 200; no proxy is asked for it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_PATIENCE) as answer:
            return answer.status == 200
    except (OSError, ValueError, HTTPException):
        return False


def reach_directly(host: str = LOOPBACK) -> None:
    """Have every client of this process and of its children reach a host without the proxy that others go through."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if known.strip() != "*" and host not in known.split(","):
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{known},{host}" if known else host


@contextmanager
def asking(url: str) -> Iterator["SyncPrefectClient"]:
    """Yield a client that asks a Prefect API once each time, and otherwise as Prefect's settings tell all its clients.

    Only so are proxies, certificates and headers the same as in the run that is to come. It must stay in one thread.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client({"timeout": _PATIENCE}, sync_client=True) as client,
    ):
        yield client


def refusal(url: str) -> Exception | None:
    """Return why Prefect's clients get no good answer from an API; None where they do."""
    try:
        with asking(url) as client:
            return client.api_healthcheck()
    # A URL that is none, a certificate file that is not there: whatever it is, every client would end in it.
    except Exception as error:
        return error


def is_absent(client: "SyncPrefectClient") -> bool:
    """Whether nobody answers for an API; one that is too busy to answer is there."""
    import httpx

    error = client.api_healthcheck()
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _NOBODY_BEHIND
    silent = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.TimeoutException)
    return silent and not _came_from(error, ssl.SSLError)


def _came_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None
