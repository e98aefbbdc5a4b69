"""One question to the endpoint, for one token, and what its answer tells of key, dialect, traffic.

Sends the connection's key, as a flow would, to the connection's endpoint and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit, urlunsplit

from phi3_tool.client import ChatReply, Phi3Client
from phi3_tool.connection import ConnectionSettings, parse_address
from phi3_tool.errors import (
    AuthenticationError,
    EndpointNotFoundError,
    ModelError,
    Phi3Error,
    RequestRejectedError,
    ThrottledError,
    UnreadableAnswerError,
)

from .finding import Finding, Group

CONNECTION = Group("connection")
ENDPOINT = Group("endpoint")
QUESTION = [{"role": "user", "content": "Who founded Microsoft?"}]
SIBLING = {"score": "/v1/chat/completions", "openai": "/score"}
# The answers that an endpoint of the other dialect could well give.
_MISUNDERSTOOD = (EndpointNotFoundError, RequestRejectedError, ModelError, UnreadableAnswerError)
# Such an answer came after the check of the key.
_KEY_PASSED = (*_MISUNDERSTOOD, ThrottledError)


@dataclass(frozen=True)
class Asked:
    """An answer, or why there was none; `other`: the URL of the other dialect, if that answered."""

    settings: ConnectionSettings
    dialect: str
    reply: ChatReply | None = None
    error: Phi3Error | None = None
    other: str | None = None


def ask(settings: ConnectionSettings, seconds: float) -> Asked:
    """Request one token; if that is not understood, try the other dialect's path."""
    dialect = parse_address(settings.endpoint, settings.dialect).dialect
    outcome = _one_token(settings.endpoint, settings, settings.dialect, seconds)
    if isinstance(outcome, ChatReply):
        return Asked(settings, dialect, reply=outcome)
    other = None
    if isinstance(outcome, _MISUNDERSTOOD):
        url = _beside(settings.endpoint, dialect)
        found = url and _one_token(url, settings, None, seconds)
        other = url if isinstance(found, ChatReply) else None
    return Asked(settings, dialect, error=outcome, other=other)


def _one_token(
    url: str, settings: ConnectionSettings, dialect: str | None, seconds: float
) -> ChatReply | Phi3Error:
    try:
        with Phi3Client.from_connection(
            replace(settings, endpoint=url, dialect=dialect),
            connect_timeout=min(5.0, seconds),
            read_timeout=seconds,
            deadline=seconds,
            max_retries=0,
        ) as client:
            return client.chat(QUESTION, max_new_tokens=1, temperature=0.0)
    except Phi3Error as error:
        return error.with_traceback(None)


def _beside(endpoint: str, dialect: str) -> str | None:
    """The other dialect's usual path on the same host; None for an unusual path."""
    parts = urlsplit(endpoint)
    path = parts.path.rstrip("/")
    for known in ("/v1/chat/completions", "/chat/completions", "/v1", "/score"):
        if path.endswith(known):
            return urlunsplit(parts._replace(path=path[: -len(known)] + SIBLING[dialect]))
    return None


def connection_findings(asked: Asked) -> Iterator[Finding]:
    """Key accepted, dialect right, deployment with traffic."""
    yield _key(asked)
    yield _dialect(asked)
    yield _traffic(asked)


def _key(asked: Asked) -> Finding:
    if isinstance(asked.error, AuthenticationError):
        return CONNECTION.fault("key", *_parts(asked.error))
    if asked.reply or isinstance(asked.error, _KEY_PASSED):
        return CONNECTION.ok("key", "accepted")
    return CONNECTION.skipped("key", "the question did not reach the check of the key")


def _dialect(asked: Asked) -> Finding:
    source = "as the connection says" if asked.settings.dialect else "guessed from the path"
    if asked.other:
        return CONNECTION.fault(
            "dialect",
            f"{asked.dialect} ({source}) is not understood there, but {asked.other} answers",
            f"pf connection update --name NAME --set configs.endpoint={asked.other}"
            " (or PHI3_ENDPOINT)",
        )
    if asked.reply:
        return CONNECTION.ok("dialect", f"{asked.dialect} ({source}): the answer was understood")
    if isinstance(asked.error, UnreadableAnswerError):
        said, fix = _parts(asked.error)
        return CONNECTION.fault("dialect", f"{asked.dialect} ({source}): {said}", fix)
    return CONNECTION.skipped("dialect", "no answer to check it with")


def _traffic(asked: Asked) -> Finding:
    wanted = asked.settings.deployment
    if asked.reply:
        named = asked.reply.deployment
        if wanted and named and named != wanted:
            return CONNECTION.fault(
                "deployment",
                f"requested {wanted}, but {named} answered",
                f"look for {wanted} among the endpoint's deployments, or remove it from the "
                f"connection",
            )
        return CONNECTION.ok("deployment", f"{named} answered" if named else "there is one")
    if isinstance(asked.error, EndpointNotFoundError) and not asked.other:
        which = f"no deployment {wanted}" if wanted else "no deployment with traffic"
        said, fix = _parts(asked.error)
        return CONNECTION.fault("deployment", f"{which} at this address: {said}", fix)
    return CONNECTION.skipped("deployment", "none answered")


def token_finding(asked: Asked) -> Finding:
    """Whether the endpoint generated one token, and how long it took."""
    if asked.reply:
        return ENDPOINT.ok("one token", f"answered in {1000 * asked.reply.seconds:.0f} ms")
    if asked.error is None:
        return ENDPOINT.skipped("one token", "it was not queried")
    return ENDPOINT.fault("one token", *_parts(asked.error))


def _parts(error: Phi3Error) -> tuple[str, str]:
    """What happened and what fixes it: our messages have the fix after a colon."""
    what, colon, fix = error.message.partition(": ")
    facts = str(error)[len(error.message) :]
    return (what + facts, fix) if colon else (error.message + facts, "see docs/doctor.md")
