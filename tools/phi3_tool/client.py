"""Phi3Client: asks a Phi-3 endpoint, plain or streaming, with pooling, deadlines and retries.

Talks to the one endpoint it was made for; reads proxy and CA settings from the environment once.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import requests
from urllib3.exceptions import HTTPError

from . import __version__
from .address import parse_address
from .connection import ENTRA, ConnectionSettings
from .credentials import BearerAuth, Credential
from .entra import entra_tokens
from .errors import ConfigurationError, Phi3Error, RequestRejectedError, UnreadableAnswerError
from .exchange import Call, Limits, check_limits, checked_request_id, refuse, transport_failure
from .failures import LOCAL_REASON, Failure, failure_of
from .retry import RetryBudget
from .sse import read_events, read_lines, read_pieces
from .transport import Deadline, Poster, body_pieces, deadline_applies
from .wire import OPENAI_PARAMETERS, Answer, Message, build_request, read_answer

log = logging.getLogger(__name__)

#: Far beyond any chat answer; keeps a server that never stops from filling our memory.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
_MAX_ERROR_BYTES = 64 * 1024
_ERROR_BODY_SECONDS = 1.0
_AFTER_LAST_PIECE_SECONDS = 0.25
_DEPLOYMENT = "azureml-model-deployment"


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
        deadline: float = 240.0,
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
        self._pid = os.getpid()
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
        """What is spoken there: "score" or "openai"."""
        return self._address.dialect

    def chat(
        self, messages: Sequence[Message], *, request_id: str | None = None, **parameters: Any
    ) -> ChatReply:
        """The answer to the last of the messages; a Phi3Error where there is none."""
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
            return _one_piece(self._read(arrival, call).text)
        pieces = self._pieces(arrival, call)
        # Begun here, so that closing it reaches its `finally` even if nobody ever iterates.
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
            raise ConfigurationError("This client is closed: make a new one")
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
            renewed = self._renewed(call, outcome, auth)
            if renewed is not None:
                auth = renewed
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

    def _renewed(self, call: Call, failure: Failure, used: BearerAuth) -> BearerAuth | None:
        """A token other than the one refused, once per call; None where there is none."""
        if failure.error.status != 401 or not self._credential.renewable or call.renewed:
            return None
        call.renewed = True
        fresh = self._credential.auth()
        return fresh if fresh != used else None

    def _attempt(self, call: Call, auth: BearerAuth) -> _Arrival | Failure:
        response: requests.Response | None = None
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
                return self._failure_in(response, reading)
            if call.stream and "json" not in response.headers.get("Content-Type", ""):
                return _Arrival(response, reading, None)
            body = _read_up_to(response, MAX_ANSWER_BYTES)
            response.close()
        except (requests.RequestException, HTTPError, OSError) as error:
            _close(response)
            return transport_failure(
                error, call, self._address, self._limits, answering=response is not None
            )
        if len(body) > MAX_ANSWER_BYTES:
            return Failure(UnreadableAnswerError("The answer is endless: it is no chat answer"))
        return _Arrival(response, reading, body)

    def _failure_in(self, response: requests.Response, reading: Deadline) -> Failure:
        """The failure in a complete or incomplete error answer: its status is what counts."""
        reading.shorten(_ERROR_BODY_SECONDS)
        said = bytearray()
        try:
            for piece in body_pieces(response):
                said += piece
                if len(said) > _MAX_ERROR_BYTES:
                    break
        except (requests.RequestException, HTTPError, OSError):
            log.debug("the body of a status %d broke off", response.status_code)
        response.close()
        text = said.decode("utf-8", "replace")
        return failure_of(response.status_code, response.headers, text, self._credential.quote)

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
                "The endpoint's answer is not JSON (or was cut short): check that the URL is the"
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
        failure: Phi3Error | None = None
        response = arrival.response
        try:
            yield ""
            body = body_pieces(response)
            yield from read_pieces(read_events(read_lines(body)), self._credential.quote)
            _read_to_the_end(body, arrival.reading)
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


_WELL_KNOWN = OPENAI_PARAMETERS | {"max_new_tokens", "do_sample"}


def _one_piece(text: str) -> Generator[str, None, None]:
    if text:
        yield text


def _read_up_to(response: requests.Response, limit: int) -> bytes:
    """The body; one that is longer than the limit comes back as soon as it is seen to be."""
    body = bytearray()
    for piece in body_pieces(response):
        body += piece
        if len(body) > limit:
            break
    return bytes(body)


def _read_to_the_end(body: Iterator[bytes], reading: Deadline) -> None:
    """Past the last piece, so that the connection can be used again; in vain is no failure."""
    reading.shorten(_AFTER_LAST_PIECE_SECONDS)
    try:
        for _ in range(_MAX_ERROR_BYTES // 1024):
            if next(body, None) is None:
                return
    except (requests.RequestException, HTTPError, OSError):
        log.debug("the connection of a finished stream is not used again")


def _close(response: requests.Response | None) -> None:
    if response is not None:
        response.close()
