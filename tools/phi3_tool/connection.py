"""Endpoint, key and options out of a Prompt flow connection, a mapping, or the environment.

Reads PHI3_ENDPOINT, PHI3_KEY, PHI3_DEPLOYMENT, PHI3_DIALECT, PHI3_CONTEXT_LENGTH, PHI3_AUTH; writes
nothing.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit, urlunsplit

from .credentials import Credential, clean_secret, entra_tokens
from .errors import ConfigurationError
from .wire import DIALECTS, Dialect, guess_dialect

# Deliberately narrow: two URL parsers must never disagree about where a key goes.
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


@dataclass(frozen=True)
class Address:
    """A checked endpoint. `shown` is the URL without its query, fit for logs and messages."""

    url: str
    shown: str
    dialect: Dialect
    is_loopback: bool


def parse_address(endpoint: object, dialect: str | None = None) -> Address:
    """The checked form of an endpoint URL; ConfigurationError says what is wrong with it."""
    if not isinstance(endpoint, str) or not endpoint.strip():
        raise ConfigurationError("the endpoint URL is missing")
    text = endpoint.strip()
    # requests would percent-encode them, other clients read them in their own way.
    if not text.isascii() or not text.isprintable() or any(c in text for c in " \\<>\"'`{}"):
        raise ConfigurationError(
            "the endpoint URL contains spaces or characters that a URL cannot have"
        )
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ConfigurationError("the endpoint is not a valid URL") from None
    host = (parts.hostname or "").lower()
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise ConfigurationError(
            "the endpoint must be a full URL such as "
            "https://<name>.<region>.inference.ml.azure.com/score"
        )
    # requests would take it for basic authentication, and every message would show it.
    if "@" in parts.netloc:
        raise ConfigurationError("the endpoint URL must not carry a user name or password")
    if not _HOST_AND_PORT.fullmatch(parts.netloc) or port == 0:
        raise ConfigurationError("the endpoint URL has no usable host and port")
    loopback = is_loopback(host)
    if parts.scheme.lower() == "http" and not loopback:
        raise ConfigurationError(
            f"the endpoint is plain http to {host}: a key is sent only over https, or over http "
            f"to this machine; use the https URL"
        )
    path = parts.path.rstrip("/")
    spoken: Dialect
    if dialect is None:
        spoken = guess_dialect(text)
    else:
        if dialect not in DIALECTS:
            raise ConfigurationError(f"dialect is {dialect!r}, but must be 'score' or 'openai'")
        spoken = dialect
        # A proxy may rename paths; one that does name a dialect must not contradict the setting.
        named = path.endswith(("score", "chat/completions", "v1"))
        if not path or (named and guess_dialect(text) != spoken):
            fitting = "/score" if spoken == "score" else "/v1/chat/completions"
            raise ConfigurationError(
                f"dialect is {spoken!r}, but the endpoint URL does not fit it: it should end with"
                f" {fitting}"
            )
    # What OpenAI's SDK calls base_url: people copy it from there.
    if spoken == "openai" and path.endswith("/v1"):
        path += "/chat/completions"
    scheme = parts.scheme.lower()
    return Address(
        url=urlunsplit((scheme, parts.netloc, path, parts.query, "")),
        shown=urlunsplit((scheme, parts.netloc, path, "", "")),
        dialect=spoken,
        is_loopback=loopback,
    )


def in_dialect(endpoint: str, dialect: Dialect) -> str:
    """The endpoint's URL for the other dialect; unchanged where the path is an unusual one.

    Our own endpoint, and Azure's images that speak both, answer on either path.
    """
    parts = urlsplit(endpoint)
    path = parts.path.rstrip("/")
    for ending in ("/v1/chat/completions", "/chat/completions", "/v1", "/score"):
        if path.endswith(ending):
            if (ending == "/score") == (dialect == "score"):
                return endpoint
            other = "/score" if dialect == "score" else "/v1/chat/completions"
            return urlunsplit(parts._replace(path=path[: -len(ending)] + other))
    return endpoint


def same_endpoint(url: str, other: str) -> bool:
    """Whether two URLs point to the same endpoint, possibly in another dialect."""
    return in_dialect(url, "score") == in_dialect(other, "score")


def is_loopback(host: str) -> bool:
    """Whether a host name or address literal can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


#: The names of each setting; the second names are those of promptflow-tools' open_model_llm.
_NAMES = {
    "endpoint": ("endpoint", "endpoint_url"),
    "key": ("key", "endpoint_api_key"),
    "deployment": ("deployment", "deployment_name"),
    "dialect": ("dialect", "api"),
    "context_length": ("context_length",),
}
#: The value of `auth` where there is no key: tokens of Microsoft Entra ID.
ENTRA = "entra"
_FIX = (
    "`phi3 connect` fills it in for the current run; by hand: `pf connection create --file"
    " connections/<template>.yaml --set configs.endpoint=<URL> secrets.key=<key>`"
)
_ENVIRONMENT = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_PLACEHOLDER = re.compile(
    r"<[^<>]*>|\$\{[^}]*\}|\{\{.*\}\}|\*{3,}"
    r"|your[-_ ].*|to_replace_with.*|change[-_ ]?me|placeholder",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ConnectionSettings:
    """A checked connection. The key is not part of its repr; with `auth` "entra" it is empty."""

    endpoint: str
    key: str = field(repr=False)
    deployment: str | None = None
    dialect: str | None = None
    context_length: int | None = None
    auth: str | None = None

    @classmethod
    def from_connection(
        cls, connection: object, environ: Mapping[str, str] | None = None
    ) -> ConnectionSettings:
        """Settings of a CustomConnection or a mapping; one error names all that is wrong.

        `${env:NAME}` values are looked up in the environment.
        """
        if isinstance(connection, ConnectionSettings):
            return connection
        configs: Mapping[str, object]
        secrets: Mapping[str, object] | None  # None where the two are not kept apart
        if connection is None or isinstance(connection, str):
            shown = "no connection was given" if not connection else "a connection's name was given"
            raise ConfigurationError(
                f"The connection cannot be used: {shown}, not a connection itself. Prompt flow"
                " fills it in where the node's input names a connection that `pf connection list`"
                " shows; `phi3 connect` creates one, and PHI3_ENDPOINT with PHI3_KEY need none"
            )
        if isinstance(connection, Mapping):
            parts = connection.get("configs"), connection.get("secrets")
        else:
            # Never connection.key: Prompt flow warns on the terminal at each such access.
            parts = getattr(connection, "configs", None), getattr(connection, "secrets", None)
        if isinstance(connection, Mapping) and not any(isinstance(p, Mapping) for p in parts):
            configs, secrets = connection, None
        else:
            configs, secrets = (part if isinstance(part, Mapping) else {} for part in parts)
        environment = os.environ if environ is None else environ
        faults: list[str] = []
        values: dict[str, str | None] = {}
        entra = ENTRA in {str(part.get("auth")).strip() for part in (configs, secrets or {})}
        for setting, names in _NAMES.items():
            if entra and setting == "key":
                continue
            values[setting] = _find(setting, names, configs, secrets, environment, faults)
        what = f"The connection cannot be used ({_FIX})"
        return cls._checked(values, faults, what, entra=entra)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> ConnectionSettings:
        """Settings of PHI3_ENDPOINT and PHI3_KEY, as `phi3 env` prints them."""
        environment = os.environ if environ is None else environ
        values = {
            setting: environment.get(f"PHI3_{setting.upper()}", "").strip() or None
            for setting in _NAMES
        }
        entra = environment.get("PHI3_AUTH", "").strip() == ENTRA and values["key"] is None
        needed = ("endpoint",) if entra else ("endpoint", "key")
        faults = [f"PHI3_{name.upper()} is not set" for name in needed if values[name] is None]
        what = 'The environment sets no usable endpoint (`eval "$(phi3 env)"` sets it)'
        return cls._checked(values, faults, what, entra=entra)

    def credential(self) -> Credential:
        """What signs a request to this endpoint: its key, or tokens where it has none."""
        if self.auth == ENTRA:
            return Credential(None, entra_tokens())
        return Credential(self.key, None)

    @classmethod
    def _checked(
        cls, given: Mapping[str, str | None], faults: list[str], what: str, *, entra: bool
    ) -> ConnectionSettings:
        endpoint, length = given["endpoint"], given["context_length"]
        key = "" if entra else given["key"]
        if endpoint is not None:
            try:
                parse_address(endpoint, given["dialect"])
            except ConfigurationError as error:
                faults.append(error.message)
        if key:
            try:
                key = clean_secret(key)
            except ConfigurationError as error:
                faults.append(error.message)
        if length is not None and not (length.isascii() and length.isdigit() and int(length) > 0):
            faults.append("context_length must be a whole number of tokens")
        if faults or endpoint is None or key is None:
            raise ConfigurationError.from_faults(what, faults)
        return cls(
            endpoint=endpoint,
            key=key,
            deployment=given["deployment"],
            dialect=given["dialect"],
            context_length=int(length) if length else None,
            auth=ENTRA if entra else None,
        )


def settings_of(connection: object, deployment: str = "") -> ConnectionSettings:
    """The endpoint that is meant: the environment's where it names one, else the connection's.

    Raises ConfigurationError where neither can be used.
    """
    # Both from the environment or neither: a stored key never goes to another endpoint.
    if environment_names_endpoint():
        settings = ConnectionSettings.from_environment()
    else:
        settings = ConnectionSettings.from_connection(connection)
    chosen = deployment.strip()
    return replace(settings, deployment=chosen) if chosen else settings


def environment_names_endpoint(environ: Mapping[str, str] | None = None) -> bool:
    """Whether PHI3_ENDPOINT is set, and so outranks any connection."""
    environment = os.environ if environ is None else environ
    return bool(environment.get("PHI3_ENDPOINT", "").strip())


def _find(
    setting: str,
    names: tuple[str, ...],
    configs: Mapping[str, object],
    secrets: Mapping[str, object] | None,
    environment: Mapping[str, str],
    faults: list[str],
) -> str | None:
    """The one value of a setting, or None with the fault noted where it should have one."""
    apart = secrets is not None
    place = secrets if setting == "key" and secrets is not None else configs
    given = {name: place[name] for name in names if _is_given(place.get(name))}
    if not given and apart and setting == "key" and any(_is_given(configs.get(n)) for n in names):
        faults.append(
            "the key is under configs, where Prompt flow stores it in clear text: move it to "
            "secrets"
        )
        return None
    if not given:
        if setting in ("endpoint", "key"):
            where = f" under {'secrets' if setting == 'key' else 'configs'}" if apart else ""
            faults.append(f"{setting} is missing: expected {' or '.join(names)}{where}")
        return None
    if len({str(value).strip() for value in given.values()}) > 1:
        faults.append(f"{' and '.join(given)} differ: keep one of them")
        return None
    # The names agree, so any of them will do.
    name, value = next(iter(given.items()))
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        faults.append(f"{name} must be text")
        return None
    text = str(value).strip()
    # Prompt flow's own commands look it up only when they serve a flow; when they test one, the
    # text arrives unchanged.
    variable = _ENVIRONMENT.fullmatch(text)
    if variable:
        text = environment.get(variable[1], "").strip()
        if not text:
            faults.append(f"{name} is not filled in: the variable {variable[1]} is not set")
            return None
    spot = (
        _PLACEHOLDER.search(text) if name.startswith("endpoint_url") or name == "endpoint" else None
    )
    if _PLACEHOLDER.fullmatch(text) or (spot and spot[0][0] in "<$"):
        faults.append(f"{name} is not filled in: it still contains the template's placeholder")
        return None
    return text


def _is_given(value: object) -> bool:
    return value is not None and str(value).strip() != ""
