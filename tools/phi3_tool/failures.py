"""Turns an answer that is not a success into the right error, and says whether to try again.

The table is Azure's ("Troubleshoot online endpoints deployment and scoring", HTTP status codes).
"""

from __future__ import annotations

import enum
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from .errors import (
    AuthenticationError,
    ConfigurationError,
    EndpointNotFoundError,
    EndpointTimeoutError,
    ModelError,
    Phi3Error,
    RequestRejectedError,
    ServiceError,
    ThrottledError,
    UnreadableAnswerError,
    one_line,
)
from .wire import reported_failure

# Retries have full jitter: the wait is drawn from 0 to a ceiling that doubles, so that clients
# which failed together do not come back together. Both ceilings in seconds: of a wait that a server
# asks for, and of one that we choose.
RETRY_AFTER_CEILING = 30.0
BACKOFF_CEILING = 20.0


class Retry(enum.Enum):
    """Whether the same request may be sent again."""

    NEVER = "never"
    ONCE = "once"  # it already cost a whole request timeout
    BOUNDED = "bounded"


class RetryBudget:
    """Counts the retries of one call."""

    def __init__(
        self,
        max_retries: int,
        backoff: float,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._left = max_retries
        self._once_left = 1
        self._ceiling = backoff
        self._jitter = jitter

    def next_wait(self, retry: Retry, retry_after: float | None, remaining: float) -> float | None:
        """Seconds to wait before the next attempt, or None where there must be none.

        `remaining` is what is left of the call's deadline.
        """
        if retry is Retry.NEVER or self._left <= 0:
            return None
        if retry is Retry.ONCE:
            if self._once_left <= 0:
                return None
            self._once_left -= 1
        self._left -= 1
        wait = self._jitter(0.0, min(self._ceiling, BACKOFF_CEILING))
        self._ceiling *= 2
        if retry_after is not None:
            wait = min(retry_after, RETRY_AFTER_CEILING)
        # A wait that would use up the deadline is not begun: the caller hears the real failure now.
        return wait if wait < remaining else None


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The wait a server asks for: milliseconds, seconds or an HTTP date; None if it asks none."""
    # Azure documents none of these for managed endpoints; its own batch client reads the first and
    # last.
    for name in ("x-ms-retry-after-ms", "retry-after-ms"):
        milliseconds = _plain_number(headers.get(name))
        if milliseconds is not None:
            return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _plain_number(value)
    if seconds is not None or value is None:
        return seconds
    try:
        moment = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _plain_number(value: str | None) -> float | None:
    text = (value or "").strip()
    if not text.isascii() or not text.replace(".", "", 1).isdigit() or len(text) > 12:
        return None
    return float(text)


# A managed online endpoint wraps whatever its container answers other than 200 in a 424, and puts
# the container's own status and a reason into these headers.
INNER_STATUS = "ms-azureml-model-error-statuscode"
INNER_REASON = "ms-azureml-model-error-reason"
LOCAL_REASON = "x-phi3-reason"  # our own server's word on a failure that it answers with 200

# The container refuses the request itself: the same request fails again.
_REJECTED = (400, 413, 422)
_NOT_READY = ("model_not_ready", "too_few_model_instance")
# More than 2 x max_concurrent_requests_per_instance x instances are waiting.
_TOO_MANY = "too_many_pending_request"
# What Azure's own batch scoring repeats of the container's statuses; 408 is repeated once only.
_RETRYABLE_INNER = (429, 500, 504)


@dataclass(frozen=True)
class Failure:
    """One failed attempt."""

    error: Phi3Error
    retry: Retry = Retry.NEVER
    retry_after: float | None = None


def failure_of(
    status: int,
    headers: Mapping[str, str],
    body: str,
    quote: Callable[[str], str] = one_line,
) -> Failure:
    """The failure in a non-200 answer. `quote` makes a server's words fit to show."""
    lower = {name.lower(): value for name, value in headers.items()}
    said = quote(server_words(body))
    says = f" The endpoint says: {said}" if said else ""
    if status == 424:
        failure = _dependency_failure(lower, said, says, quote)
    elif 200 <= status < 300:
        failure = Failure(
            UnreadableAnswerError(
                f"The endpoint answered with status {status}, which has no answer: check that"
                " the URL is the scoring URI of a chat model"
            )
        )
    elif 300 <= status < 400:
        # Only the host: a redirect's query may carry what must not be shown.
        try:
            host = urlsplit(lower.get("location", "")).hostname or ""
        except ValueError:
            host = ""
        where = f" to {host[:100]}" if host.isascii() and host.isprintable() and host else ""
        failure = Failure(
            ConfigurationError(
                f"The endpoint redirects{where}, and a key is never sent after a redirect: put the"
                " final URL into the connection"
            )
        )
    else:
        failure = _plain_failure(status, says)
    failure.error.status = status
    return Failure(failure.error, failure.retry, retry_after_seconds(lower))


def server_words(body: str) -> str:
    """The human part of an error body: its message where it is JSON, else the text itself."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if isinstance(payload, dict):
        inside = next((payload[k] for k in ("error", "message", "detail") if payload.get(k)), "")
        return reported_failure(inside)[0]
    return payload if isinstance(payload, str) else ""


def _plain_failure(status: int, says: str) -> Failure:
    if status == 401:
        return Failure(
            AuthenticationError(
                "The endpoint does not accept the key or token: it may belong to another endpoint, "
                "or be regenerated or expired. Fetch it again and store it in the connection"
                f" (`phi3 connect`, or PHI3_KEY).{says}"
            )
        )
    if status == 403:
        return Failure(
            AuthenticationError(
                "The endpoint refuses this identity: it needs the permission to score (role "
                "AzureML Data Scientist) and a network that can reach the endpoint."
                f"{says}"
            )
        )
    if status in (404, 405):  # 404 also where no deployment has traffic
        return Failure(
            EndpointNotFoundError(
                "No deployment answers at this URL: check that its path is the scoring URI's, "
                "that the deployment's name is correct, and that a deployment has traffic"
                f" (or name one with `deployment`).{says}"
            )
        )
    if status == 408:
        return Failure(
            EndpointTimeoutError(
                "The model took longer than the endpoint's request timeout: raise"
                f" request_timeout_ms of the deployment, or lower max_new_tokens.{says}"
            ),
            Retry.ONCE,  # a second try costs another whole timeout, 180 s at most
        )
    if status == 429:
        return Failure(_throttled(says), Retry.BOUNDED)
    if status == 413:
        return Failure(
            RequestRejectedError(f"The request is too large: shorten the conversation.{says}")
        )
    if status < 500:
        return Failure(
            RequestRejectedError(
                "The endpoint rejected the request: check the messages' roles and the"
                f" parameters.{says}"
            )
        )
    # 502 to 504 are documented for Kubernetes endpoints alone; proxies in between send them as
    # well.
    retry = Retry.BOUNDED if status in (500, 502, 503, 504) else Retry.NEVER
    return Failure(
        ServiceError(
            "The service failed: try again later; if it keeps failing, check the deployment's "
            f"log.{says}"
        ),
        retry,
    )


def _dependency_failure(
    headers: Mapping[str, str], said: str, says: str, quote: Callable[[str], str]
) -> Failure:
    text = headers.get(INNER_STATUS, "").strip()
    inner = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else None
    reason = quote(headers.get(INNER_REASON, "")) or None
    # What Azure's gateway writes itself while no container is up yet; without a reason header.
    if reason is None and "no healthy upstream" in said.lower():
        reason = _NOT_READY[0]
    if inner in _REJECTED:
        error: Phi3Error = RequestRejectedError(
            "The model rejected the request: check the messages' roles and the parameters, and"
            f" that the conversation fits the model's context.{says}"
        )
        retry = Retry.NEVER
    elif reason == _TOO_MANY or inner == 429:
        error, retry = _throttled(says), Retry.BOUNDED
    elif reason in _NOT_READY:
        error = ModelError(
            "The model is not ready: wait until the deployment is up, or give it more"
            f" instances.{says}"
        )
        retry = Retry.BOUNDED
    else:
        error = ModelError(
            "The model failed while answering: check the deployment's log, or lower "
            f"max_new_tokens.{says}"
        )
        retry = Retry.BOUNDED if inner in _RETRYABLE_INNER else Retry.NEVER
        if inner == 408:
            retry = Retry.ONCE
    error.inner_status, error.reason = inner, reason
    return Failure(error, retry)


def _throttled(says: str) -> ThrottledError:
    return ThrottledError(
        "The endpoint has more requests than it can handle at once: send fewer at a time, or "
        f"raise max_concurrent_requests_per_instance or the instance count.{says}"
    )
