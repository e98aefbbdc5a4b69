"""Requests, replies, errors and the routing table of the rehearsed Azure. Reads and writes nothing.

A service module declares its calls with `@route(method, host, path)` of cloud.py; whatever no
route fits is answered with 501, naming method and path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

Json = dict[str, Any]

ARM = "management.azure.com"
REGIONAL = "{region}.api.azureml.ms"
GROUP = "/subscriptions/{sub}/resourceGroups/{rg}"
ML = "Microsoft.MachineLearningServices"
WORKSPACE = f"{GROUP}/providers/{ML}/workspaces/{{ws}}"
# `{name}`, `{name*}` or `{name:a|b}`; see Router.route.
_ARGUMENT = re.compile(r"\{(\w+)(\*|:[^}]*)?\}")


@dataclass
class Request:
    """One HTTP request; `args` are the parts of host and path that the route names."""

    method: str
    host: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    args: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path without the query, decoded."""
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        """The query; names in lower case, because Azure ignores case in them."""
        pairs = parse_qsl(urlsplit(self.target).query, keep_blank_values=True)
        return {name.lower(): value for name, value in pairs}

    def json(self) -> Json:
        """The body as an object. Raises AzureError (400) if it is not one."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise AzureError(400, "InvalidRequestContent", "The request content was invalid.")
        return value

    def id(self, template: str, **more: str) -> str:
        """The resource id that `template` and the route's arguments make."""
        return _ARGUMENT.sub(r"{\1}", template).format(**{**self.args, **more})


@dataclass
class Reply:
    """One HTTP answer: a dictionary becomes JSON, an iterator is sent piece by piece."""

    status: int = 200
    body: Json | list[Any] | bytes | Iterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)


class AzureError(Exception):
    """A refusal, in the form in which Azure Resource Manager writes it."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: list[Json] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.details, self.headers = details or [], headers or {}

    def error(self) -> Json:
        """The inner object: code, message, and details if there are any."""
        # A shortage of quota is a BadRequest outside, and OutOfQuota in the details.
        more: Json = {"details": self.details} if self.details else {}
        return {"code": self.code, "message": self.message, **more}

    def reply(self) -> Reply:
        """The answer that carries this error."""
        return Reply(self.status, {"error": self.error()}, self.headers)


def asset_id(text: object) -> str:
    """An asset's id as ARM writes it: `azureml:/subscriptions/…` loses its scheme."""
    value = str(text or "")
    return value if value.startswith("azureml://") else value.removeprefix("azureml:")


def not_found(what: str, name: str) -> AzureError:
    """404 as the resource manager says it."""
    return AzureError(404, "ResourceNotFound", f"The {what} '{name}' was not found.")


def bad(message: str, code: str = "UserError", **more: Any) -> AzureError:
    """400: the request asks for what is not allowed."""
    return AzureError(400, code, message, **more)


# A type of its own, so that this module need not know cloud.py, which imports it.
State = TypeVar("State")
Handler = Callable[[State, Request], Reply]


@dataclass
class Route(Generic[State]):
    """One call that is answered. `audience` is whom the bearer token must be for; "" is anybody."""

    method: str
    host: re.Pattern[str]
    path: re.Pattern[str]
    handler: Handler[State]
    audience: str
    locked: bool


class Router(Generic[State]):
    """The calls that are answered, each by a function of the state and the request."""

    def __init__(self) -> None:
        self._routes: list[Route[State]] = []

    def route(
        self,
        method: str,
        host: str,
        path: str,
        *,
        audience: str = "management",
        locked: bool = True,
    ) -> Callable[[Handler[State]], Handler[State]]:
        """Answer `method` on `host` and `path` with the decorated function.

        `{name}` stands for one part of host or path, `{name*}` for any rest, `{name:a|b}` for one
        of these. `locked` handlers run one at a time and what they change is saved after them; the
        others see to that themselves.
        """

        def register(handler: Handler[State]) -> Handler[State]:
            patterns = _pattern(host, "."), _pattern(path, "/")
            self._routes.append(Route(method, *patterns, handler, audience, locked))
            return handler

        return register

    def find(self, request: Request) -> tuple[Route[State], dict[str, str]] | None:
        """The first route that fits, with its arguments."""
        path = request.path.rstrip("/") or "/"
        for route in self._routes:
            host = route.method == request.method and route.host.fullmatch(request.host)
            rest = host and route.path.fullmatch(path)
            if host and rest:
                return route, {**host.groupdict(), **rest.groupdict()}
        return None


def _pattern(template: str, separator: str) -> re.Pattern[str]:
    text, end = "", 0
    for match in _ARGUMENT.finditer(template):
        name, kind = match.groups()
        own = f"[^{separator}]+"
        if kind:
            own = ".+" if kind == "*" else "|".join(map(re.escape, kind[1:].split("|")))
        text += re.escape(template[end : match.start()]) + f"(?P<{name}>{own})"
        end = match.end()
    # Azure ignores case in paths, and its SDKs differ (resourceGroups, resourcegroups).
    return re.compile(text + re.escape(template[end:]), re.IGNORECASE)
