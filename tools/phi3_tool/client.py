"""Phi3Client: asks a Phi-3 endpoint, plain or streaming, with pooling, deadlines and retries.

Talks to the one endpoint it was made for; reads proxy and CA settings from the environment once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Optional, Tuple

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from . import __version__
from .connection import ENTRA, Address, ConnectionSettings, parse_address
from .credentials import BearerAuth, Credential, entra_tokens
from .errors import (
    ConfigurationError,
    EndpointTimeoutError,
    Phi3Error,
    RequestRejectedError,
    ServiceError,
    UnreadableAnswerError,
    one_line,
)
from .failures import LOCAL_REASON, Failure, Retry, RetryBudget, failure_of
from .transport import (
    Deadline,
    Poster,
    body_pieces,
    deadline_applies,
    read_up_to,
    system_reason,
)
from .wire import (
    OPENAI_PARAMETERS,
    Answer,
    Message,
    build_request,
    read_answer,
    read_events,
    read_lines,
    read_pieces,
)

log = logging.getLogger(__name__)

MAX_REQUEST_ID = 100  # Azure answers 431 beyond it
# Far beyond any chat answer; keeps a server that never stops from filling our memory.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
_MAX_ERROR_BYTES = 64 * 1024
# An error's body may add words to its status; nobody waits long for them.
_ERROR_BODY_SECONDS = 1.0
# For the line end and [DONE] after the last piece, so that the connection can be reused.
_AFTER_LAST_PIECE_SECONDS = 0.25
# Asks for one deployment, whatever the traffic rules say; answers carry it as well.
_DEPLOYMENT = "azureml-model-deployment"
_WELL_KNOWN = OPENAI_PARAMETERS | {"max_new_tokens", "do_sample"}
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
    """What a broken line means. `answering`: a 200 had already begun to arrive."""
    # Returned, not raised: raised inside the handler it would drag along the lower exception, which
    # holds the request and with it the key.
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
                f"The endpoint sent nothing for {limits.read:g} s: raise `read_timeout`, or"
                " lower max_new_tokens"
            )
        )
    if answering:
        return Failure(
            UnreadableAnswerError(
                "The answer was cut off: the connection broke before its end; try again, and "
                "check the deployment's log if it happens again"
            )
        )
    why = one_line(system_reason(error) or type(error).__name__)
    if isinstance(error, requests.exceptions.SSLError) and "certificate" in str(error).lower():
        return Failure(
            ServiceError(
                f"The certificate of {address.shown} is not trusted ({why}): check the host"
                " name, or point REQUESTS_CA_BUNDLE at your company's CA certificates"
            )
        )
    fix = (
        "start the local endpoint with `phi3 up`, or see `phi3 status`"
        if address.is_loopback
        else "check the host name, the network and the proxy"
    )
    failure = ServiceError(f"No connection to {address.shown} ({why}): {fix}")
    broken = isinstance(error, (requests.exceptions.ConnectionError, ConnectionError))
    return Failure(failure, Retry.BOUNDED if broken else Retry.NEVER)


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse(faults: list[str]) -> None:
    """Raise one error that names all faults, if there are any."""
    if faults:
        raise ConfigurationError.from_faults("The endpoint cannot be used", faults)


@dataclass(frozen=True)
class ChatReply:
    """One answer and how it came about; `seconds` covers all attempts and the waits between."""

    text: str
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    model: str | None = None
    deployment: str | None = None
    request_id: str = ""
    attempts: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class _Arrival:
    """A 200: with its whole body, or still open where the caller streams."""

    response: requests.Response
    reading: Deadline
    # Not in the repr: a server may quote our own headers back at us.
    body: bytes | None = field(repr=False)

    def header(self, name: str) -> str | None:
        value: str | None = self.response.headers.get(name)
        return value


class Phi3Client:
    """A client of one endpoint. Share it between threads; close it, or use it in a `with`.

    `dialect` is guessed from the URL's path. Times are in seconds; `deadline` bounds a whole
    call with its retries (and a whole stream). `token_provider` returns a fresh Entra token, as
    azure-identity's `get_bearer_token_provider(credential, "https://ml.azure.com/.default")`.
    Keyword parameters of `chat` and `stream`: temperature, top_p, max_new_tokens, stop, seed, …
    """

    def __init__(
        self,
        endpoint: str,
        key: str | None = None,
        *,
        token_provider: Callable[[], str] | None = None,
        deployment: str | None = None,
        dialect: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 180.0,
        deadline: float = 240.0,  # above the 180 s that Azure lets one request take
        max_retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        self._limits = Limits(connect_timeout, read_timeout, deadline, max_retries, backoff)
        faults = check_limits(self._limits, deployment)
        try:
            self._address = parse_address(endpoint, dialect)
        except ConfigurationError as error:
            faults.insert(0, error.message)
        try:
            self._credential = Credential(key, token_provider)
        except ConfigurationError as error:
            faults.append(error.message)
        refuse(faults)
        if not self._credential.is_set and not self._address.is_loopback:
            refuse(["the key is missing: give `key` or `token_provider`"])
        self._deployment = deployment
        self._closed = threading.Event()
        self._pid = os.getpid()  # a forked child gets a pool of its own, see _poster
        self._pooled = Poster(self._address)

    @classmethod
    def from_connection(cls, connection: object, **overrides: Any) -> Phi3Client:
        """A client for a Prompt flow connection, a mapping, or ready ConnectionSettings.

        With `auth: entra` in it and no key, azure-identity gives the tokens.
        """
        settings = ConnectionSettings.from_connection(connection)
        options: dict[str, Any] = {
            "deployment": settings.deployment,
            "dialect": settings.dialect,
            **overrides,
        }
        if settings.auth == ENTRA:
            options.setdefault("token_provider", entra_tokens())
        return cls(settings.endpoint, settings.key or None, **options)

    @property
    def endpoint(self) -> str:
        """The URL asked, without its query."""
        return self._address.shown

    @property
    def dialect(self) -> str:
        """The endpoint's dialect: "score" or "openai"."""
        return self._address.dialect

    def chat(
        self, messages: Sequence[Message], *, request_id: str | None = None, **parameters: Any
    ) -> ChatReply:
        """The answer to the last message; raises a Phi3Error if there is none."""
        started = time.monotonic()
        call = self._new_call(messages, parameters, request_id, stream=False)
        arrival = self._deliver(call)
        answer = self._read(arrival, call)
        return ChatReply(
            text=answer.text,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            model=answer.model,
            deployment=arrival.header(_DEPLOYMENT) or self._deployment,
            request_id=call.request_id,
            attempts=call.attempts,
            seconds=time.monotonic() - started,
        )

    def stream(
        self, messages: Sequence[Message], *, request_id: str | None = None, **parameters: Any
    ) -> Generator[str, None, None]:
        """The answer in pieces as they come; in the score dialect, all of it as one piece.

        The question is sent at once: errors before the first piece are raised here, not by the
        generator. Closing the generator closes the connection.
        """
        streams = self._address.dialect == "openai"
        call = self._new_call(messages, parameters, request_id, stream=streams)
        arrival = self._deliver(call)
        if arrival.body is not None:
            text = self._read(arrival, call).text
            return (piece for piece in (text,) if piece)
        pieces = self._pieces(arrival, call)
        # Started here, so that closing it reaches its `finally` even if it is never iterated.
        next(pieces)
        return pieces

    def close(self) -> None:
        """Close pooled connections and wake up calls that wait for their next attempt."""
        self._closed.set()
        self._pooled.close()

    def __enter__(self) -> Phi3Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        deployment = f", deployment={self._deployment!r}" if self._deployment else ""
        return f"Phi3Client({self.endpoint!r}, dialect={self.dialect!r}{deployment})"

    def _new_call(
        self,
        messages: Sequence[Message],
        parameters: dict[str, Any],
        request_id: str | None,
        *,
        stream: bool,
    ) -> Call:
        if self._closed.is_set():
            raise ConfigurationError("This client is closed: create a new one")
        body = build_request(self._address.dialect, messages, parameters, stream)
        try:
            encoded = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RequestRejectedError(f"A parameter cannot be sent as JSON: {error}") from None
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream, application/json" if stream else "application/json",
            # Compression would gain nothing on short texts and hold back streamed pieces.
            "Accept-Encoding": "identity",
            "User-Agent": f"phi3-tool/{__version__}",
            "x-ms-client-request-id": checked_request_id(request_id),
        }
        if self._deployment:
            headers[_DEPLOYMENT] = self._deployment
        if self._address.dialect == "openai" and not set(parameters) <= _WELL_KNOWN:
            # Of Azure's images only the older one needs it; all take it.
            headers["extra-parameters"] = "pass-through"
        return Call(
            body=encoded,
            headers=headers,
            request_id=headers["x-ms-client-request-id"],
            deployment=self._deployment,
            stream=stream,
            deadline=Deadline(self._limits.deadline, self._limits.read),
            budget=RetryBudget(self._limits.max_retries, self._limits.backoff),
        )

    def _deliver(self, call: Call) -> _Arrival:
        """Attempts until one succeeds or none is left."""
        auth = self._credential.auth()
        while True:
            call.attempts += 1
            outcome = self._attempt(call, auth)
            if isinstance(outcome, _Arrival):
                return outcome
            if outcome.error.status == 401 and self._credential.renewable and not call.renewed:
                # Once per call: a token that is another one than the rejected.
                call.renewed = True
                fresh = self._credential.auth()
                if fresh != auth:
                    auth = fresh
                    continue
            wait = call.budget.next_wait(
                outcome.retry, outcome.retry_after, call.deadline.remaining
            )
            if wait is None or self._closed.is_set():
                raise call.dress(outcome.error, self._credential)
            log.info(
                "attempt %d of request %s failed (%s); next in %.2f s",
                call.attempts,
                call.request_id,
                type(outcome.error).__name__,
                wait,
            )
            if self._closed.wait(wait):
                raise call.dress(outcome.error, self._credential)

    def _attempt(self, call: Call, auth: BearerAuth) -> _Arrival | Failure:
        response: requests.Response | None = None
        # Of this attempt alone: an error's body shortens it.
        reading = Deadline(call.deadline.remaining, self._limits.read)
        try:
            with deadline_applies(reading):
                response = self._poster().post(
                    call.body,
                    call.headers,
                    auth,
                    (reading.limit(self._limits.connect), reading.limit()),
                )
            if response.status_code != 200:
                # Its status is what counts: a body that is cut off or never comes adds no more
                # than words, and must not turn a 401 into a timeout.
                reading.shorten(_ERROR_BODY_SECONDS)
                words = bytearray()
                try:
                    read_up_to(_MAX_ERROR_BYTES, response, words)
                except (requests.RequestException, HTTPError, OSError):
                    log.debug("the body of a status %d was cut off", response.status_code)
                response.close()
                return failure_of(
                    response.status_code,
                    response.headers,
                    words.decode("utf-8", "replace"),
                    self._credential.quote,
                )
            # foundation-model-serve answers a streamed question in one JSON body.
            if call.stream and "json" not in response.headers.get("Content-Type", ""):
                return _Arrival(response, reading, None)
            body = bytes(read_up_to(MAX_ANSWER_BYTES, response))
            response.close()
        except (requests.RequestException, HTTPError, OSError) as error:
            if response is not None:
                response.close()
            return transport_failure(
                error, call, self._address, self._limits, answering=response is not None
            )
        if len(body) > MAX_ANSWER_BYTES:
            return Failure(
                UnreadableAnswerError("The answer does not end: it is not a chat answer")
            )
        return _Arrival(response, reading, body)

    def _read(self, arrival: _Arrival, call: Call) -> Answer:
        outcome = self._answer_in(arrival)
        if isinstance(outcome, Answer):
            return outcome
        outcome.status = 200
        raise call.dress(outcome, self._credential)

    def _answer_in(self, arrival: _Arrival) -> Answer | Phi3Error:
        """Errors are returned, so that the raw body is in no frame of their traceback."""
        try:
            payload = json.loads(arrival.body or b"")
        except (ValueError, RecursionError):
            return UnreadableAnswerError(
                "The endpoint's answer is not JSON (or was cut off): check that the URL is the"
                " scoring URI, not a web page"
            )
        try:
            return read_answer(
                self._address.dialect,
                payload,
                reason=arrival.header(LOCAL_REASON),
                quote=self._credential.quote,
            )
        except Phi3Error as error:
            return error.with_traceback(None)

    def _pieces(self, arrival: _Arrival, call: Call) -> Generator[str, None, None]:
        # Raised after the `finally`, outside the handlers: an error raised inside one would carry
        # the lower exception, which holds the request and with it the key.
        failure: Phi3Error | None = None
        response = arrival.response
        try:
            yield ""  # taken by `stream`, see there
            body = body_pieces(response)
            yield from read_pieces(read_events(read_lines(body)), self._credential.quote)
            # Past the last piece, so that the connection can be reused; failing is no error.
            arrival.reading.shorten(_AFTER_LAST_PIECE_SECONDS)
            try:
                for _ in range(_MAX_ERROR_BYTES // 1024):
                    if next(body, None) is None:
                        break
            except (requests.RequestException, HTTPError, OSError):
                log.debug("the connection of a finished stream is not reused")
        except Phi3Error as error:
            failure = error.with_traceback(None)
        except (requests.RequestException, HTTPError, OSError) as error:
            broken = transport_failure(error, call, self._address, self._limits, answering=True)
            failure = broken.error
        finally:
            response.close()
        if failure is not None:
            failure.status = 200
            raise call.dress(failure, self._credential)

    def _poster(self) -> Poster:
        # A forked child must not write into its parent's open connections.
        if self._pid != os.getpid():
            self._pooled, self._pid = Poster(self._address), os.getpid()
        return self._pooled


# Each keeps a pool of open connections.
_MAX_CLIENTS = 16
_Identity = Tuple[int, str, str, Optional[str], Optional[str], Optional[str]]
_clients: OrderedDict[_Identity, Phi3Client] = OrderedDict()
_clients_lock = threading.Lock()


def client_for(settings: ConnectionSettings) -> Phi3Client:
    """One client per endpoint, key and process, so that its connections are used again."""
    key_hash = hashlib.sha256(settings.key.encode()).hexdigest()
    identity = (
        os.getpid(),
        settings.endpoint,
        key_hash,
        settings.deployment,
        settings.dialect,
        settings.auth,
    )
    with _clients_lock:
        client = _clients.get(identity)
        if client is None:
            client = _clients[identity] = Phi3Client.from_connection(settings)
            if len(_clients) > _MAX_CLIENTS:
                # Not closed: another thread may be in the middle of a call.
                _clients.popitem(last=False)
        _clients.move_to_end(identity)
        return client
