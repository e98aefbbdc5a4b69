"""The endpoint itself: does it say that it is well, and how far away is it.

Asks its health page a few times over one connection, with the connection's key.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import requests

from phi3_tool.connection import ConnectionSettings, parse_address
from phi3_tool.entra import credential_of
from phi3_tool.errors import ConfigurationError, one_line
from phi3_tool.transport import new_session

from .finding import Finding, Group

HERE = Group("endpoint")
PATHS = ("/", "/health")  # Azure's images have the first, vLLM and its kin the second
TIMES = 3


def endpoint(settings: ConnectionSettings, seconds: float, slow_ms: float) -> Iterator[Finding]:
    """Health, and the time of a round trip."""
    address = parse_address(settings.endpoint, settings.dialect)
    try:
        credential = credential_of(settings)
        credential.auth()
    except ConfigurationError as error:
        yield HERE.fault("health", error.message, "az login, or pip install azure-identity")
        yield HERE.skipped("latency", "it cannot be queried")
        return
    with new_session(address) as session:

        def get(path: str) -> tuple[int, float]:
            url = urlunsplit(urlsplit(address.url)._replace(path=path, query=""))
            started = time.monotonic()
            answer = session.get(
                url, auth=credential.auth(), timeout=seconds, allow_redirects=False
            )
            return answer.status_code, 1000 * (time.monotonic() - started)

        try:
            tried = {path: get(path)[0] for path in PATHS[:1]}
            if tried[PATHS[0]] == 404:
                tried[PATHS[1]] = get(PATHS[1])[0]
            path, status = list(tried.items())[-1]
            yield _health(tried)
            yield _latency([get(path)[1] for _ in range(TIMES)], status, slow_ms)
        except requests.exceptions.RequestException as error:
            reason = one_line(credential.scrub(_reason(error)))
            yield HERE.fault(
                "health",
                f"no answer from {address.shown}: {reason}",
                _fix(error, address.is_loopback),
            )
            yield HERE.skipped("latency", "it does not answer")


def _health(tried: dict[str, int]) -> Finding:
    path, status = list(tried.items())[-1]
    if status == 200:
        return HERE.ok("health", f"GET {path} returns 200")
    if set(tried.values()) <= {404, 405, 501}:
        return HERE.skipped("health", f"it has no health route (tried {' and '.join(tried)})")
    if status in (401, 403):
        return HERE.skipped("health", f"you lack the permission for GET {path} ({status})")
    return HERE.fault(
        "health",
        f"GET {path} returns {status}; a healthy endpoint returns 200",
        "check the deployment's state and log; for a local one: phi3 status",
    )


def _latency(taken: list[float], status: int, slow_ms: float) -> Finding:
    middle = statistics.median(taken)
    said = (
        f"{middle:.1f} ms round trip (median of {len(taken)}, kept-alive connection, status "
        f"{status})"
    )
    if middle > slow_ms:
        return HERE.warning(
            "latency",
            f"{said}, which is slow",
            "check network, proxy and region; run the flow close to the endpoint",
        )
    return HERE.ok("latency", said)


def _reason(error: BaseException) -> str:
    """The innermost word on it: the outer ones repeat pools and addresses."""
    inner: BaseException | None = error
    said = type(error).__name__
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            said = str(inner.strerror)
        nested = [
            a for a in (*inner.args, getattr(inner, "reason", None)) if isinstance(a, BaseException)
        ]
        inner = nested[0] if nested else inner.__cause__ or inner.__context__
    return said


def _fix(error: Exception, loopback: bool) -> str:
    if isinstance(error, requests.exceptions.SSLError):
        return "check the host name, or point REQUESTS_CA_BUNDLE at your company's CA certificates"
    if isinstance(error, requests.exceptions.Timeout):
        return "check network and proxy, or allow more time: phi3 doctor --timeout SECONDS"
    if loopback:
        return "start the local endpoint: phi3 up"
    return "check the host name, the network and the proxy"
