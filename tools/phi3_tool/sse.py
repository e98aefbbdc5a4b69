"""Server-sent events of a streamed chat answer: bytes in, events out, text pieces out.

Standard library only; knows nothing of sockets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import ModelError, UnreadableAnswerError, one_line
from .wire import Quote, message_text, reported_failure

#: No event of a chat answer comes near this; without a bound a server could fill our memory.
MAX_LINE = 4 * 1024 * 1024


@dataclass(frozen=True)
class Event:
    """One event: its name (mostly "message") and its data."""

    name: str
    data: str


def read_lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Whole lines out of pieces cut anywhere, also inside a character or a line end."""
    rest = b""
    for piece in pieces:
        rest += piece
        if len(rest) > MAX_LINE and b"\n" not in rest:
            raise UnreadableAnswerError("The stream holds an endless line: it is no chat answer")
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r").decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """Events out of lines. An event cut off before its blank line still counts if it has data."""
    name = "message"
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield Event(name, "\n".join(data))
            name, data = "message", []
            continue
        label, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if label == "data":
            data.append(value)
        elif label == "event":
            name = value
    if data:
        yield Event(name, "\n".join(data))


def read_pieces(events: Iterable[Event], quote: Quote = one_line) -> Iterator[str]:
    """The text pieces of a streamed answer; an error where it fails or ends too early."""
    finished = False
    for event in events:
        if event.data.strip() == "[DONE]":
            return
        piece, finish = _read_chunk(event, quote)
        finished = finished or finish
        if piece:
            yield piece
    if not finished:
        raise UnreadableAnswerError(
            "The streamed answer was cut short: the connection ended before the answer did; ask"
            " again, and look into the deployment's log if it happens again"
        )


def _read_chunk(event: Event, quote: Quote) -> tuple[str, bool]:
    chunk = _decoded(event.data)
    if chunk is None and event.name != "error":
        raise UnreadableAnswerError(
            "The stream holds an event that is not JSON (or was cut short): check that the URL is"
            " an OpenAI-compatible chat route"
        )
    reported = chunk.get("error") if isinstance(chunk, dict) else None
    if event.name == "error" or reported:
        words, status = reported_failure(reported or chunk or event.data)
        raise ModelError(
            f"The model failed in the middle of its answer: {quote(words) or 'no reason given'}",
            inner_status=status,
        )
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    if not isinstance(choices, list):
        raise UnreadableAnswerError("The stream holds an event without choices")
    if not choices or not isinstance(choices[0], dict):
        return "", False  # a chunk that only carries usage
    text = message_text(choices[0].get("delta")) or ""
    finish = choices[0].get("finish_reason")
    if finish == "error":
        raise ModelError("The model failed in the middle of its answer", reason="error")
    return text, finish is not None


def _decoded(data: str) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
