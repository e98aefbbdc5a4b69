"""One call to an endpoint: its state across attempts, its checks, and what a broken line means.

No input or output of its own; client.py drives it.
"""

from __future__ import annotations

import math
import re
import uuid
from dataclasses import dataclass, field

import requests
from urllib3.exceptions import ReadTimeoutError

from .address import Address
from .credentials import Credential
from .errors import (
    ConfigurationError,
    EndpointTimeoutError,
    Phi3Error,
    RequestRejectedError,
    ServiceError,
    UnreadableAnswerError,
    one_line,
)
from .failures import Failure
from .retry import Retry, RetryBudget
from .transport import Deadline

MAX_REQUEST_ID = 100  # Azure answers 431 beyond it
_DEPLOYMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Limits:
    """Seconds, and how often to try again."""

    connect: float
    read: float
    deadline: float
    max_retries: int
    backoff: float


@dataclass
class Call:
    """Everything about one question that outlives a single attempt."""

    body: bytes = field(repr=False)
    headers: dict[str, str]
    request_id: str
    deployment: str | None
    stream: bool
    deadline: Deadline
    budget: RetryBudget
    attempts: int = 0
    renewed: bool = False

    def dress(self, error: Phi3Error, credential: Credential) -> Phi3Error:
        """The error as it leaves the client: with this call's facts, and without the secret."""
        error.attempts = self.attempts
        error.request_id = self.request_id
        error.deployment = self.deployment
        error.args = (credential.scrub(error.message),)
        error.reason = error.reason and credential.scrub(error.reason)
        return error


def check_limits(limits: Limits, deployment: str | None) -> list[str]:
    """What is wrong with a client's settings; empty where nothing is."""
    times = (
        ("connect_timeout", limits.connect),
        ("read_timeout", limits.read),
        ("deadline", limits.deadline),
    )
    faults = [
        f"{name} must be a number of seconds above 0"
        for name, value in times
        if not _is_duration(value) or value <= 0
    ]
    if not _is_duration(limits.backoff) or limits.backoff < 0:
        faults.append("backoff must be a number of seconds of at least 0")
    if isinstance(limits.max_retries, bool) or not isinstance(limits.max_retries, int):
        faults.append("max_retries must be a whole number")
    elif limits.max_retries < 0:
        faults.append("max_retries must not be below 0")
    if deployment is not None and not _DEPLOYMENT_NAME.fullmatch(deployment):
        faults.append("deployment must be a name of letters, digits and dashes")
    return faults


def checked_request_id(request_id: str | None) -> str:
    """The caller's own id for a request, or a fresh one."""
    if request_id is None:
        return str(uuid.uuid4())
    if not re.fullmatch(rf"[\x21-\x7e]{{1,{MAX_REQUEST_ID}}}", request_id):
        raise RequestRejectedError(
            f"request_id must be 1 to {MAX_REQUEST_ID} plain letters, digits and signs"
        )
    return request_id


def transport_failure(
    error: Exception, call: Call, address: Address, limits: Limits, *, answering: bool
) -> Failure:
    """What a broken line means. `answering`: a 200 had already begun to arrive.

    Returns the failure rather than raising it: raised inside the handler, it would drag along
    the lower exception, which holds the request and with it the key.
    """
    if call.deadline.remaining <= 0:
        return Failure(
            EndpointTimeoutError(
                f"No complete answer within the deadline of {limits.deadline:g} s: raise"
                " `deadline`, or lower max_new_tokens"
            )
        )
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return Failure(
            EndpointTimeoutError(
                f"No connection to {address.shown} within {limits.connect:g} s: check the host"
                " name, the network and the proxy, or raise `connect_timeout`"
            ),
            Retry.BOUNDED,
        )
    if isinstance(error, (requests.exceptions.ReadTimeout, ReadTimeoutError)):
        return Failure(
            EndpointTimeoutError(
                f"Nothing came from the endpoint for {limits.read:g} s: raise `read_timeout`, or"
                " lower max_new_tokens"
            )
        )
    if answering:
        return Failure(
            UnreadableAnswerError(
                "The answer was cut short: the connection broke before its end; ask again, and"
                " look into the deployment's log if it happens again"
            )
        )
    return _unreachable(error, address)


def _unreachable(error: Exception, address: Address) -> Failure:
    why = one_line(_system_reason(error) or type(error).__name__)
    if isinstance(error, requests.exceptions.SSLError) and "certificate" in str(error).lower():
        return Failure(
            ServiceError(
                f"The certificate of {address.shown} is not trusted ({why}): check the host"
                " name, or point REQUESTS_CA_BUNDLE at your company's CA certificates"
            )
        )
    mend = (
        "start the local endpoint with `phi3 up`, or see `phi3 status`"
        if address.is_loopback
        else "check the host name, the network and the proxy"
    )
    failure = ServiceError(f"No connection to {address.shown} ({why}): {mend}")
    broken = isinstance(error, (requests.exceptions.ConnectionError, ConnectionError))
    return Failure(failure, Retry.BOUNDED if broken else Retry.NEVER)


def _system_reason(error: BaseException) -> str | None:
    """The operating system's word on it, wherever in the chain it sits."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        item = waiting.pop()
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, OSError) and item.strerror:
            return str(item.strerror)
        waiting += [item.__cause__, item.__context__, getattr(item, "reason", None), *item.args]
    return None


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse(faults: list[str]) -> None:
    """Raise one error that names all faults, if there are any."""
    if faults:
        raise ConfigurationError.from_faults("The endpoint cannot be used", faults)
