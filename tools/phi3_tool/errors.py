"""Every error phi3_tool raises; each says what happened and what fixes it.

Phi3Error
├── ConfigurationError      endpoint or key missing, malformed, or plain http to another host
├── AuthenticationError     401, 403
├── EndpointNotFoundError   404, 405: wrong path, no such deployment, or none with traffic
├── RequestRejectedError    400, 413, 422, also inside a 424; and what we refuse to send
├── ThrottledError          429, and a 424 for too many pending requests, after the retries
├── EndpointTimeoutError    408, our own timeouts, the deadline
├── ModelError              any other 424; a failure dressed as 200
├── ServiceError            5xx, no connection, after the retries
└── UnreadableAnswerError   not JSON, cut off, an undocumented shape
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Characters: a proxy's whole error page would push everything else off the screen.
QUOTE_LIMIT = 300


def one_line(text: str) -> str:
    """Another party's words made fit for a message: one line of at most 300 characters."""
    # Control characters too: another party's words must not move the cursor of a terminal.
    flat = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()
    return flat if len(flat) <= QUOTE_LIMIT else flat[: QUOTE_LIMIT - 1] + "…"


class Phi3Error(Exception):
    """Base of the tree. `str()` is the message to show; the attributes are for programs."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        inner_status: int | None = None,
        reason: str | None = None,
        request_id: str | None = None,
        deployment: str | None = None,
        attempts: int = 0,
    ) -> None:
        # Only the message goes to args: that keeps every error picklable across worker processes.
        super().__init__(message)
        self.status = status
        self.inner_status = inner_status
        self.reason = reason
        self.request_id = request_id
        self.deployment = deployment
        self.attempts = attempts

    @property
    def message(self) -> str:
        """The sentence alone, without status, ids and attempts."""
        return str(self.args[0])

    def __str__(self) -> str:
        facts = [
            f"{name} {value}"
            for name, value in (
                ("status", self.status),
                ("inner status", self.inner_status),
                ("reason", self.reason),
                ("deployment", self.deployment),
                ("request id", self.request_id),
            )
            if value is not None
        ]
        # The usual single attempt is no fact worth a word.
        if self.attempts > 1:
            facts.append(f"after {self.attempts} attempts")
        return f"{self.message} [{', '.join(facts)}]" if facts else self.message

    def facts(self) -> dict[str, object]:
        """Everything as plain values, to travel between processes; `from_facts` reads it."""
        return {"kind": type(self).__name__, "message": self.message, **vars(self)}

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> Phi3Error:
        """The error that `facts` describes; an unknown kind becomes a plain Phi3Error."""
        # By name: the other process may have another version of this class.
        kinds = {kind.__name__: kind for kind in Phi3Error.__subclasses__()}
        kind = kinds.get(str(facts.get("kind")), Phi3Error)
        return kind(
            str(facts.get("message")),
            status=facts.get("status"),
            inner_status=facts.get("inner_status"),
            reason=facts.get("reason"),
            request_id=facts.get("request_id"),
            deployment=facts.get("deployment"),
            attempts=int(facts.get("attempts") or 0),
        )


class ConfigurationError(Phi3Error):
    """The endpoint, the key or another setting is missing or unusable."""

    faults: tuple[str, ...] = ()

    @classmethod
    def from_faults(cls, what: str, faults: Iterable[str]) -> ConfigurationError:
        """One error that names every fault at once."""
        named = tuple(faults)
        if len(named) == 1:
            error = cls(f"{what}: {named[0]}")
        else:
            error = cls(f"{what}:" + "".join(f"\n  - {fault}" for fault in named))
        error.faults = named
        return error


class AuthenticationError(Phi3Error):
    """The endpoint does not accept the key or token."""


class EndpointNotFoundError(Phi3Error):
    """Nothing serves this path: wrong URL, no such deployment, or none with traffic."""


class RequestRejectedError(Phi3Error):
    """The request itself is at fault; sending it again would not help."""


class ThrottledError(Phi3Error):
    """The endpoint is busier than it may be, and stayed so through the retries."""


class EndpointTimeoutError(Phi3Error):
    """No complete answer in time."""


class ModelError(Phi3Error):
    """The endpoint was reached, but its model failed."""


class ServiceError(Phi3Error):
    """The service failed or could not be reached, and stayed so through the retries."""


class UnreadableAnswerError(Phi3Error):
    """An answer that cannot be read: not JSON, cut off, or of an unknown shape."""
