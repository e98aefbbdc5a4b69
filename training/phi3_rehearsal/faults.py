"""Injected faults: which call or resource they happen to, how, and how often.

Reads and writes faults.json in the rehearsal's folder, where a running rehearsal sees them.

    PUT */onlineEndpoints/* 429 retry-after=1 times=2    this answer instead of the service's
    PUT */jobs/* reset                                   the connection breaks, nothing was done
    PUT */jobs/* reset-after                             it was done, the answer is lost
    GET */operationsStatus/* lost times=1                a poll that finds nothing (404)
    * */deployments/* failed code=…                      the operation or the job fails
    * */computes/* slow seconds=5                        it takes longer
    POST */deployments/green empty times=99 share=25     bad answers, once it has 25 % or more
    POST */deployments/green 500 times=99 named=no       errors, but for requests by header none
"""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from .processes import UsageError, write_atomically
from .wire import AzureError, Json, Request

# Code and message that Azure Resource Manager sends with each status.
_CODES = {
    400: ("BadRequest", "The request is invalid."),
    401: ("ExpiredAuthenticationToken", "The access token has expired."),
    403: ("AuthorizationFailed", "The client does not have authorization to perform the action."),
    404: ("ResourceNotFound", "The resource was not found."),
    408: ("RequestTimeout", "The request timed out."),
    409: ("Conflict", "Another operation is in progress on the resource."),
    429: ("TooManyRequests", "The request is being throttled."),
    500: ("InternalServerError", "An internal error occurred."),
    502: ("BadGateway", "Bad gateway."),
    503: ("ServiceUnavailable", "The service is not available."),
    504: ("GatewayTimeout", "The gateway did not answer in time."),
}
# Kinds that happen to the work on a resource; the others happen to one call.
_ON_RESOURCES = ("failed", "slow", "quota")
# What a deployment answers with status 200 instead of its model's text: how the image
# foundation-model-inference and its successor show a failure, and what a broken model says.
ANSWERS: dict[str, Json] = {
    "empty": {"output": ""},
    "nothing": {},
    "none": {"output": "None"},
    "error": {"output": None, "error": {"status_code": 500, "body": "the engine has failed"}},
    "garbled": {"output": "\ufffd\ufffd\u0000\ufffd"},
    "parrot": {"output": "I am glad to help you with that"},
}
_KINDS = ("reset", "reset-after", "lost", *_ON_RESOURCES, *ANSWERS)
# What may follow a fault: the field that it sets, and its type.
_OPTIONS: dict[str, tuple[str, Callable[[str], object]]] = {
    "times": ("left", int),
    "seconds": ("seconds", float),
    "share": ("share", int),
    "named": ("named", lambda text: {"yes": True, "no": False}[text]),
    "retry-after": ("retry_after", str),
    "code": ("code", str),
    "message": ("message", str),
}


@dataclass
class Fault:
    """One fault. `left` counts down to 0."""

    method: str
    path: str
    kind: str
    left: int = 1
    retry_after: str | None = None
    seconds: float = 0.0
    share: int = 0  # percent of the traffic from which on it happens
    named: bool = True  # also to requests that name the deployment by header
    code: str | None = None
    message: str | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `METHOD PATH KIND [name=value …]`; raises UsageError."""
        try:
            words = shlex.split(text)
        except ValueError:  # a quotation mark without its partner
            words = []
        if len(words) < 3 or (words[2] not in _KINDS and not words[2].isdigit()):
            kinds = ", ".join(_KINDS)
            raise UsageError(
                f"{text!r} is not a fault: expected METHOD PATH KIND [name=value …], where PATH "
                f"may contain * and KIND is an HTTP status or one of {kinds}"
            )
        fault = cls(words[0].upper(), words[1], words[2])
        for word in words[3:]:
            name, _, value = word.partition("=")
            try:
                field, convert = _OPTIONS[name]
                setattr(fault, field, convert(value))
            except (KeyError, ValueError):
                raise UsageError(
                    f"{word!r}: expected times=N, seconds=S, share=PERCENT, named=no, "
                    "retry-after=S, code=… or message=…"
                ) from None
        return fault

    def as_typed(self) -> str:
        """The fault as it is typed."""
        more: dict[str, object] = {
            "times": self.left,
            "seconds": self.seconds,
            "share": self.share,
            "named": "" if self.named else "no",
            "retry-after": self.retry_after,
            "code": self.code,
            "message": self.message,
        }
        words = [f"{name}={value}" for name, value in more.items() if value]
        return shlex.join([self.method, self.path, self.kind, *words])

    def fits(self, method: str, path: str) -> bool:
        """Whether it is still to happen to this call or resource."""
        named = self.method in ("*", method)
        return self.left > 0 and named and fnmatch.fnmatch(path.lower(), self.path.lower())

    def error(self) -> AzureError:
        """The answer instead of the service's."""
        status = 404 if self.kind == "lost" else int(self.kind)
        code, message = _CODES.get(status, ("InjectedFault", "An injected fault."))
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        return AzureError(status, self.code or code, self.message or message, headers=headers)


class Faults:
    """The faults of one rehearsal, shared with the commands through a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def add(self, text: str) -> Fault:
        """Add a fault; raises UsageError when the text is none."""
        fault = Fault.parse(text)
        with self._lock:
            self._write([*self._read(), fault])
        return fault

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._path.unlink(missing_ok=True)

    def pending(self) -> list[Fault]:
        """Those that are still to happen."""
        return [fault for fault in self._read() if fault.left > 0]

    def of_call(self, request: Request) -> Fault | None:
        """The fault that is to happen to this call; it counts down by one."""
        path = request.host + request.path
        others = {*_ON_RESOURCES, *ANSWERS}
        return self._take(lambda f: f.kind not in others and f.fits(request.method, path))

    def answer(self, arm_id: str, share: int, *, named: bool) -> tuple[int, Json] | None:
        """Status and body that a deployment answers with instead of its model.

        It has `share` percent of the traffic; `named`: the request names it by its header.
        """
        fault = self._take(
            lambda f: (
                (f.kind in ANSWERS or (f.kind.isdigit() and "/deployments/" in f.path.lower()))
                and share >= f.share
                and (f.named or not named)
                and f.fits("POST", arm_id)
            )
        )
        if fault is None:
            return None
        if fault.kind in ANSWERS:
            return 200, ANSWERS[fault.kind]
        return int(fault.kind), {"error": fault.error().error()}

    def slowness(self, arm_id: str, kind: str) -> float:
        """Seconds by which an operation on the resource (or the job) takes longer."""
        fault = self._of_resource(arm_id, kind, "slow")
        return fault.seconds if fault else 0.0

    def failure(self, arm_id: str, kind: str) -> Json | None:
        """The error with which the operation (or the job) ends, if it is to fail."""
        fault = self._of_resource(arm_id, kind, "failed", "quota")
        if fault is None:
            return None
        if fault.kind == "quota":
            code, message = "OutOfQuota", "Not enough quota available."
        else:
            code, message = "InternalServerError", "The operation failed (injected)."
        return {"code": fault.code or code, "message": fault.message or message}

    def _of_resource(self, arm_id: str, kind: str, *faults: str) -> Fault | None:
        method = "DELETE" if kind == "delete" else "PUT"  # the call that begins the operation
        return self._take(lambda f: f.kind in faults and f.fits(method, arm_id))

    def _take(self, chosen: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            faults = self._read()
            for fault in faults:
                if chosen(fault):
                    fault.left -= 1
                    self._write([f for f in faults if f.left > 0])
                    return fault
        return None

    def _read(self) -> list[Fault]:
        if not self._path.is_file():
            return []
        return [Fault(**entry) for entry in json.loads(self._path.read_text(encoding="utf-8"))]

    def _write(self, faults: list[Fault]) -> None:
        write_atomically(self._path, json.dumps([asdict(f) for f in faults], indent=1))


def from_environment() -> list[str]:
    """The faults of $PHI3_REHEARSAL_FAULTS, one per line or separated by semicolons."""
    text = os.environ.get("PHI3_REHEARSAL_FAULTS", "")
    return [line.strip() for line in text.replace(";", "\n").splitlines() if line.strip()]
