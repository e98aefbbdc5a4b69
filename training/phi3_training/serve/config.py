"""The server's settings, as one JSON file holds them. Never a key.

Read by `python -m phi3_training.serve`; written by `process.start`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..engine import EngineName, Origin
from ..errors import UsageError
from .asgi import App, Receive, Scope, Send, respond

# Makes the endpoint misbehave on purpose, so that a client's error handling can be tried out.
# Written NAME[:DETAIL…][*TIMES]: `empty`, `none`, `error`, `text`, `cut`, `delay:SECONDS`,
# `424:INNER_STATUS[:REASON]`, or a front-door status such as `429[:RETRY_AFTER]` or `503`.

_DRESSED = {
    "empty": {},
    "none": {"output": "None"},
    "error": {"output": None, "error": {"status_code": 400, "body": "a forced error"}},
}
_STATUSES = (401, 403, 404, 408, 413, 429, 500, 502, 503, 504)
_PLAIN = ("text", "cut", *_DRESSED, *map(str, _STATUSES))
_NAMES = (*_PLAIN, "delay:SECONDS", "424:INNER_STATUS")
_FORM = re.compile(
    rf"(?P<name>{'|'.join(_PLAIN)}|delay(?=:[\d.]+)|424(?=:\d{{3}}))"
    r"(?P<details>(?::[\w.]+)*)(?:\*(?P<times>\d+))?"
)


@dataclass
class Quirk:
    """One forced behaviour and how often it still happens (None: always)."""

    name: str
    details: tuple[str, ...]
    left: int | None

    @classmethod
    def parse(cls, text: str) -> Quirk:
        """Read one quirk; raises ValueError saying what is known."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a quirk; expected NAME[:DETAIL][*TIMES] with NAME one of "
                f"{', '.join(_NAMES)}, e.g. 424:500:model_error*2"
            )
        details = match["details"].split(":")[1:]
        return cls(match["name"], tuple(details), int(match["times"]) if match["times"] else None)

    def take(self) -> bool:
        """Whether it happens this time."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


class Quirks:
    """Stands between the front door and the application; POST requests only."""

    def __init__(self, app: App, quirks: Sequence[str]) -> None:
        self._app = app
        self._quirks = [Quirk.parse(text) for text in quirks]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            for quirk in self._quirks:
                if quirk.take():
                    if quirk.name != "delay":
                        await _play(quirk, scope, send)
                        return
                    await anyio.sleep(float(quirk.details[0]))
        await self._app(scope, receive, send)


async def _play(quirk: Quirk, scope: Scope, send: Send) -> None:
    if quirk.name in _DRESSED:
        await respond(send, 200, json.dumps(_DRESSED[quirk.name]).encode(), "application/json")
    elif quirk.name == "text":
        await respond(send, 200, b"<html>a forced page</html>", "text/html")
    elif quirk.name == "cut":
        # Promises more than it sends and stops: the server closes the connection in mid-body.
        await respond(send, 200, b'{"output": "a forced', "application/json", cut_from=1000)
    elif quirk.name == "424":
        scope["phi3.reason"] = quirk.details[1] if len(quirk.details) > 1 else "model_error"
        body = json.dumps({"error": {"message": "a forced error"}}).encode()
        await respond(send, int(quirk.details[0]), body, "application/json")
    else:
        scope["phi3.bare"] = True
        extra = [("retry-after", quirk.details[0])] if quirk.details else []
        await respond(send, int(quirk.name), b"", "text/plain", headers=extra)


Positive = Annotated[int, Field(ge=1)]


class ServerConfig(BaseModel):
    """One server. Limits carry the names that Azure ML gives them."""

    # "model_" is a prefix that pydantic reserves by default.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    engine: EngineName = "auto"
    model_dir: Path | None = None
    onnx_dir: Path | None = None
    model_name: str = "phi3"
    num_threads: int | None = None
    upstream_url: str | None = None
    upstream_model: str | None = None
    # Named adapters over `base_dir`; `adapter_dir` is the run's own, which needs no name.
    base_dir: Path | None = None
    adapter_dir: Path | None = None
    adapters: dict[str, Path] = {}

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    status_file: Path | None = None
    deployment: str = "local"
    dialect: Literal["loi", "fms"] = "loi"

    max_concurrent_requests_per_instance: Positive = 32
    request_timeout_ms: Annotated[int, Field(ge=100, le=180_000)] = 60_000
    max_request_bytes: Annotated[int, Field(ge=1024)] = 1_500_000
    max_new_tokens: Positive = 256
    drain_seconds: Annotated[int, Field(ge=0)] = 30
    # A connection without a request in progress is closed then. Longer than clients keep an idle
    # one, so that they close first.
    idle_seconds: Positive = 75
    cors_origins: tuple[Origin, ...] = ()
    quirks: tuple[str, ...] = ()

    @field_validator("quirks")
    @classmethod
    def _known_quirks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            Quirk.parse(text)
        return value

    @classmethod
    def from_file(cls, path: Path) -> ServerConfig:
        """Read the settings; raises UsageError naming each fault."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror})") from None
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise UsageError(f"{path} has faults: {'; '.join(faults)}") from None

    def to_json(self) -> str:
        """What `from_file` reads."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
