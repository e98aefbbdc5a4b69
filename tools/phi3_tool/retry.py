"""When a failed attempt is worth another one, and how long to wait before it.

Pure arithmetic: full jitter, the server's own wish up to a ceiling, and never past the deadline.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

#: Longest wait that a server may ask of us, in seconds.
RETRY_AFTER_CEILING = 30.0
#: Longest wait of our own choosing, in seconds.
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

        `remaining` is what is left of the call's deadline: a wait that would eat it whole is
        not begun, so that the caller hears the real failure and hears it at once.
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
        return wait if wait < remaining else None


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The wait a server asks for: milliseconds, seconds or an HTTP date; None if it asks none."""
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
