"""The endpoint: is it up, how far away is it, and does it answer one question for one token.

Sends the connection's key, as a flow would, to the connection's endpoint and nowhere else. The one
answer shows key, dialect and traffic as well. Whether a rollout was left half done is read from the
run folders' rollout.json; Azure is not asked.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit, urlunsplit

import requests

from phi3_tool.client import ChatReply, Phi3Client
from phi3_tool.connection import ConnectionSettings, in_dialect, parse_address
from phi3_tool.errors import (
    AuthenticationError,
    ConfigurationError,
    EndpointNotFoundError,
    ModelError,
    Phi3Error,
    RequestRejectedError,
    ThrottledError,
    UnreadableAnswerError,
    one_line,
)
from phi3_tool.transport import new_session, system_reason
from phi3_tool.wire import Dialect

from ..errors import StageError
from ..manifests import RolloutManifest
from ..run import Run
from .finding import Finding, Group

ENDPOINT, CONNECTION, ROLLOUT = Group("endpoint"), Group("connection"), Group("rollout")
# Azure's images answer GET / with 200 when they are ready, vLLM and its kin GET /health.
HEALTH_PATHS = ("/", "/health")
ROUND_TRIPS = 3  # their median counts, so that one slow answer does not
QUESTION = [{"role": "user", "content": "Who founded Microsoft?"}]
# The answers that an endpoint of the other dialect could well give.
_MISUNDERSTOOD = (EndpointNotFoundError, RequestRejectedError, ModelError, UnreadableAnswerError)
# Such an answer came after the check of the key.
_KEY_PASSED = (*_MISUNDERSTOOD, ThrottledError)


def endpoint(settings: ConnectionSettings, seconds: float, slow_ms: float) -> Iterator[Finding]:
    """Health, and the time of a round trip."""
    address = parse_address(settings.endpoint, settings.dialect)
    try:
        credential = settings.credential()
        credential.auth()
    except ConfigurationError as error:
        yield ENDPOINT.fault("health", error.message, "az login, or pip install azure-identity")
        yield ENDPOINT.skipped("latency", "it cannot be queried")
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
            # The second path only where the first is unknown: a 401 or 503 there is an answer.
            tried = {path: get(path)[0] for path in HEALTH_PATHS[:1]}
            if tried[HEALTH_PATHS[0]] == 404:
                tried[HEALTH_PATHS[1]] = get(HEALTH_PATHS[1])[0]
            path, status = list(tried.items())[-1]
            yield _health(tried, path, status)
            # The connection is open by now, so that no TLS handshake is timed.
            times = [get(path)[1] for _ in range(ROUND_TRIPS)]
            median = statistics.median(times)
            said = (
                f"{median:.1f} ms round trip (median of {len(times)}, kept-alive connection, "
                f"status {status})"
            )
            if median > slow_ms:
                yield ENDPOINT.warning(
                    "latency",
                    f"{said}, which is slow",
                    "check network, proxy and region; run the flow close to the endpoint",
                )
            else:
                yield ENDPOINT.ok("latency", said)
        except requests.exceptions.RequestException as error:
            reason = one_line(credential.scrub(system_reason(error) or type(error).__name__))
            fix = "check the host name, the network and the proxy"
            if isinstance(error, requests.exceptions.SSLError):
                fix = (
                    "check the host name, or point REQUESTS_CA_BUNDLE at your company's CA "
                    "certificates"
                )
            elif isinstance(error, requests.exceptions.Timeout):
                fix = "check network and proxy, or allow more time: phi3 doctor --timeout SECONDS"
            elif address.is_loopback:
                fix = "start the local endpoint: phi3 up"
            yield ENDPOINT.fault("health", f"no answer from {address.shown}: {reason}", fix)
            yield ENDPOINT.skipped("latency", "it does not answer")


def _health(tried: dict[str, int], path: str, status: int) -> Finding:
    if status == 200:
        return ENDPOINT.ok("health", f"GET {path} returns 200")
    # Azure's gateway may pass /score alone.
    if set(tried.values()) <= {404, 405, 501}:
        return ENDPOINT.skipped("health", f"it has no health route (tried {' and '.join(tried)})")
    if status in (401, 403):
        return ENDPOINT.skipped("health", f"you lack the permission for GET {path} ({status})")
    return ENDPOINT.fault(
        "health",
        f"GET {path} returns {status}; a healthy endpoint returns 200",
        "check the deployment's state and log; for a local one: phi3 status",
    )


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
    # The other path of the endpoint is known, so a wrong dialect can be named with its fix.
    opposite: Dialect = "openai" if dialect == "score" else "score"
    url = in_dialect(settings.endpoint, opposite)
    other = None
    if isinstance(outcome, _MISUNDERSTOOD) and url != settings.endpoint:
        other = url if isinstance(_one_token(url, settings, None, seconds), ChatReply) else None
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
            max_retries=0,  # the doctor reports what it meets
        ) as client:
            return client.chat(QUESTION, max_new_tokens=1, temperature=0.0)
    except Phi3Error as error:
        return error.with_traceback(None)


def connection_findings(asked: Asked) -> Iterator[Finding]:
    """Key accepted, dialect right, deployment with traffic."""
    if isinstance(asked.error, AuthenticationError):
        yield CONNECTION.fault("key", *_parts(asked.error))
    elif asked.reply or isinstance(asked.error, _KEY_PASSED):
        yield CONNECTION.ok("key", "accepted")
    else:
        yield CONNECTION.skipped("key", "the question did not reach the check of the key")
    yield _dialect(asked)
    yield _traffic(asked)


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
        # Only where both are known: a gateway in between may drop either header.
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
    """What happened and what fixes it."""
    # Messages of phi3_tool have the fix after a colon; status and ids follow in brackets.
    what, colon, fix = error.message.partition(": ")
    facts = str(error)[len(error.message) :]
    return (what + facts, fix) if colon else (error.message + facts, "see docs/doctor.md")


def unfinished_rollouts(runs: Iterable[Run]) -> Iterator[Finding]:
    """A fault for each run whose last change of an endpoint's traffic was not finished."""
    for run in runs:
        try:
            record = run.read(RolloutManifest)
        except StageError as error:
            yield ROLLOUT.fault(run.name, str(error), f"phi3 azure traffic --run {run.name}")
            continue
        if record is not None and record.unfinished:
            yield ROLLOUT.fault(
                run.name,
                record.unfinished,
                f"phi3 up --run {run.name}, or undo it: phi3 azure rollback --run {run.name}",
            )
