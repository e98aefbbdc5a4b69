"""What is sent to a Phi-3 endpoint and what comes back: pure functions, no I/O.

In the order of a question's way: Prompt flow's chat_history to role messages, trimmed to the
model's context; messages to the body of a request; a body to an answer; a stream to pieces of
text. An endpoint speaks one of two dialects, `score` (Azure's own) or `openai`.

Builds strictly (a faulty request is refused before it is sent) and reads tolerantly (every answer
shape that the Azure images are known to give). Standard library only.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from .errors import (
    ConfigurationError,
    ModelError,
    RequestRejectedError,
    UnreadableAnswerError,
    one_line,
)

log = logging.getLogger(__name__)

Dialect = Literal["score", "openai"]
Message = Mapping[str, str]
Quote = Callable[[str], str]

DIALECTS: tuple[Dialect, ...] = ("score", "openai")
ROLES = ("system", "user", "assistant")

# What every OpenAI-shaped route of Azure's images knows. Anything else is a 400 on its
# /chat/completions unless the header extra-parameters lets it pass.
OPENAI_PARAMETERS = frozenset(
    (
        "model",
        "temperature",
        "top_p",
        "max_tokens",
        "stop",
        "seed",
        "n",
        "response_format",
        "frequency_penalty",
        "presence_penalty",
        "tools",
        "tool_choice",
    )
)
# What the client sets itself: a parameter of that name would replace the conversation.
_OURS = ("messages", "stream", "input_data", "input_string")

_EXPECTED = {
    "score": 'expected {"output": "text"}',
    "openai": 'expected {"choices": [{"message": {"content": "text"}}]}',
}
_SHORTEN = "shorten the conversation, lower max_new_tokens, or check the deployment's log"

#: What a chat template adds around each message: role, line ends, end-of-turn.
TOKENS_AROUND_MESSAGE = 5
#: Phi-3-mini-4k's; a connection may carry its own model's under configs.context_length.
DEFAULT_CONTEXT_LENGTH = 4096
#: Starts the note at the end of an incomplete streamed answer; the model never sees the note.
BROKE_OFF = "\n\n[The answer was cut off. "
#: Starts the list of sources under an answer from documents; the model never sees it either.
SOURCES = "\n\nSources:\n"
# Only such a list at the very end: a model's own "Sources:" is part of what it said.
_SOURCES_NOTE = re.compile(re.escape(SOURCES) + r"(?:\[\d+\] .+(?:\n|$))+\Z")

Turn = tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """An endpoint's answer, in either dialect."""

    text: str
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    model: str | None = None


# ---- the conversation: turns of Prompt flow, role messages


def rough_tokens(text: str) -> int:
    """A cautious guess without a tokenizer."""
    # English has about four bytes to a token, other European languages and code about three.
    return math.ceil(len(text.encode("utf-8", "replace")) / 3)


def budget(
    context_length: int | None,
    input_data: str,
    system_prompt: str,
    max_new_tokens: int,
    max_history_tokens: int = 0,
) -> int:
    """Tokens that the whole prompt may have; `context_length` None: the model's is not stated."""
    room = (context_length or DEFAULT_CONTEXT_LENGTH) - max_new_tokens
    if max_history_tokens <= 0:
        return room
    always = (
        rough_tokens(input_data or "") + rough_tokens(system_prompt) + 2 * TOKENS_AROUND_MESSAGE
    )
    wanted = always + max_history_tokens
    # Without a stated context the caller's word counts: the model may well be a 128k one.
    return wanted if context_length is None else min(room, wanted)


def to_messages(
    chat_history: Sequence[Mapping[str, object]] | None,
    user_input: str | None,
    system_prompt: str | None = None,
    *,
    max_tokens: int | None = None,
    max_chars: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    input_key: str = "input_data",
    output_key: str = "answer",
) -> list[dict[str, str]]:
    """The conversation as role messages, ending in `user_input`.

    The budgets count everything that is sent. The oldest turns go first, always as a whole; the
    system message and the question always stay. Without `count_tokens` tokens are guessed.
    """
    user_input = required_question(user_input, input_key)
    # Its white space stays: it was trained with, and other tokens would be another prompt. A blank
    # one is left out, since an empty system message changes the tokens that the model sees.
    head: list[dict[str, str]] = []
    if system_prompt and system_prompt.strip():
        head = [{"role": "system", "content": system_prompt}]
    turns = [
        {"role": role, "content": text}
        for asked, answer in read_turns(chat_history, input_key, output_key)
        for role, text in (("user", asked), ("assistant", answer))
    ]
    return fit(
        [*head, *turns, {"role": "user", "content": user_input}],
        max_tokens=max_tokens,
        max_chars=max_chars,
        count_tokens=count_tokens,
    )


def fit(
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int | None = None,
    max_chars: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> list[dict[str, str]]:
    """Role messages cut to the budgets: the oldest turns go first, always as a whole.

    A turn begins with a user message. Leading system messages and everything from the last user
    message on stay. What fits is returned as it is.
    """
    sent = [dict(message) for message in messages]
    first = next((i for i, message in enumerate(sent) if message["role"] != "system"), len(sent))
    starts = [i for i in range(first, len(sent)) if sent[i]["role"] == "user"]
    if not starts:
        return sent
    # What comes before the first question (a greeting) belongs to the first turn.
    edges = [first, *starts[1:]]
    turns = [sent[begin:end] for begin, end in zip(edges, edges[1:])]  # noqa: B905, RUF007 - Python 3.9
    always = [*sent[:first], *sent[edges[-1] :]]
    counter = count_tokens or rough_tokens
    limits: list[tuple[int | None, Callable[[str], int]]] = [
        (max_chars, len),
        (max_tokens, lambda text: counter(text) + TOKENS_AROUND_MESSAGE),
    ]
    for limit, cost in limits:
        if limit is None:
            continue
        left = limit - sum(cost(message["content"]) for message in always)
        fitting = 0
        for turn in reversed(turns):
            left -= sum(cost(message["content"]) for message in turn)
            if left < 0:
                break
            fitting += 1
        surplus = len(turns) - fitting
        if surplus:
            log.info("left out %d of %d earlier turns to fit the budget", surplus, len(turns))
        turns = turns[surplus:]
    return [*sent[:first], *(message for turn in turns for message in turn), *sent[edges[-1] :]]


def required_question(value: str | None, input_key: str = "input_data") -> str:
    """The question itself; raises RequestRejectedError where there is none (None: a null cell)."""
    if value is None:
        raise RequestRejectedError(
            f"There is no question: the input {input_key} is null or missing. In `pf run create` "
            f"give its column with --column-mapping {input_key}='${{data.COLUMN}}'"
        )
    if not isinstance(value, str) or not value.strip():
        raise RequestRejectedError("The question is empty: type something to ask")
    return value


def from_messages(
    messages: Iterable[Mapping[str, str]],
    *,
    input_key: str = "input_data",
    output_key: str = "answer",
) -> list[dict[str, dict[str, str]]]:
    """Role messages as Prompt flow's chat_history; a question not answered yet is left out."""
    history: list[dict[str, dict[str, str]]] = []
    question: str | None = None
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content", "")
        if role == "user" and question is None:
            question = content
        elif role == "assistant" and question is not None:
            history.append({"inputs": {input_key: question}, "outputs": {output_key: content}})
            question = None
        elif role != "system" or index > 0:
            raise RequestRejectedError(
                f"Message {index} has the role {role!r}: user and assistant messages must alternate"
            )
    return history


def read_turns(
    chat_history: Sequence[Mapping[str, object]] | None,
    input_key: str = "input_data",
    output_key: str = "answer",
) -> list[Turn]:
    """(question, answer) of each finished turn; a turn that failed has no answer and is skipped."""
    if not chat_history:
        return []
    if isinstance(chat_history, (str, Mapping)) or not isinstance(chat_history, Sequence):
        raise RequestRejectedError("chat_history must be a list of turns")
    turns: list[Turn] = []
    for index, item in enumerate(chat_history):
        inputs = item.get("inputs") if isinstance(item, Mapping) else None
        outputs = item.get("outputs") if isinstance(item, Mapping) else None
        if not isinstance(inputs, Mapping) or not isinstance(outputs, (Mapping, type(None))):
            raise RequestRejectedError(
                f'chat_history[{index}] is not a turn: expected {{"inputs": {{"{input_key}": …}},'
                f' "outputs": {{"{output_key}": …}}}}'
            )
        question = _one_text(inputs, input_key)
        if question is None:
            raise RequestRejectedError(
                f"chat_history[{index}] has no text under inputs.{input_key}"
            )
        answer = (_one_text(outputs or {}, output_key) or "").partition(BROKE_OFF)[0]
        answer = _SOURCES_NOTE.sub("", answer)
        if answer and question.strip():
            turns.append((question, answer))
    return turns


def _one_text(values: Mapping[str, Any], key: str) -> str | None:
    """The text under the key; under another name where it is the only text there."""
    if key in values:
        return values[key] if isinstance(values[key], str) else None
    texts = [value for value in values.values() if isinstance(value, str)]
    return texts[0] if len(texts) == 1 else None


# ---- the request


def guess_dialect(url: str) -> Dialect:
    """The dialect of the URL's path; ConfigurationError if the path does not show it."""
    path = urlsplit(url).path.rstrip("/")
    if path.endswith("/score"):
        return "score"
    if path.endswith(("/chat/completions", "/v1")):
        return "openai"
    shown = f"its path is {path!r}" if path else "it has a host and no path"
    raise ConfigurationError(
        f"the endpoint URL should end with /score or with /v1/chat/completions, but {shown}"
        " (copy the scoring URI; or set dialect to 'score' or 'openai' where a proxy renames paths)"
    )


def build_request(
    dialect: str,
    messages: Sequence[Message],
    parameters: Mapping[str, object] | None = None,
    stream: bool = False,
) -> dict[str, Any]:
    """The JSON body for one question; RequestRejectedError where no endpoint would take it."""
    clean = _check_messages(messages)
    settings = {name: value for name, value in (parameters or {}).items() if value is not None}
    faults = [f"{name} cannot be given as a parameter" for name in _OURS if name in settings]
    length: object = settings.pop("max_new_tokens", None)
    if "max_tokens" in settings:  # OpenAI's name for the same
        same = settings.pop("max_tokens")
        if length not in (None, same):
            faults.append("max_new_tokens and max_tokens differ: give one of them")
        length = same if length is None else length
    if length is not None and (
        not isinstance(length, int) or isinstance(length, bool) or length < 1
    ):
        faults.append("max_new_tokens must be a whole number of at least 1")
    if "temperature" in settings and not _is_number(settings["temperature"], 0, math.inf):
        faults.append("temperature must be a number of at least 0")
    if "top_p" in settings and not _is_number(settings["top_p"], 0, 1):
        faults.append("top_p must be a number between 0 and 1")
    if faults:
        raise RequestRejectedError("The request cannot be sent: " + "; ".join(faults))
    if dialect == "openai":
        body: dict[str, Any] = {"messages": clean, **settings}
        if length is not None:
            body["max_tokens"] = length
        # Greedy decoding has no name of its own in this dialect, and do_sample is dropped there.
        if body.pop("do_sample", True) is False:
            body["temperature"] = 0
        if stream:
            body["stream"] = True
        return body
    if dialect != "score":
        raise ConfigurationError(f"dialect is {dialect!r}, but must be 'score' or 'openai'")
    if stream:  # Azure's images force stream to false on /score
        raise RequestRejectedError("The score dialect cannot stream: use the openai dialect")
    if length is not None:
        # foundation-model-inference obeys only the first name, foundation-model-serve only the
        # second; each ignores the other one.
        settings.update(max_new_tokens=length, max_tokens=length)
    return {"input_data": {"input_string": clean, "parameters": settings}}


# ---- the answer


def read_answer(
    dialect: str, payload: object, *, reason: str | None = None, quote: Quote = one_line
) -> Answer:
    """The answer in a decoded 200 body of either dialect.

    `dialect` only words the message of an unknown shape. `reason` is the server's own word on
    why it failed, where it sent one. `quote` makes a server's words fit to show.
    ModelError for a failure dressed as 200.
    """
    why = quote(reason) if reason else None
    if isinstance(payload, dict):
        # foundation-model-serve: {"output": null, "error": {"status_code": …, "body": …}}, with
        # 200.
        if payload.get("error") and payload.get("output") is None and not payload.get("choices"):
            said, status = reported_failure(payload["error"])
            words = "; ".join(filter(None, (quote(said), why)))
            raise ModelError(
                "The model failed although the endpoint answered 200: "
                f"{words or 'no reason given'}",
                inner_status=status,
                reason=why,
            )
        if "choices" in payload:
            return _read_choices(payload, why, quote)
        if "output" in payload:
            return _read_output(payload, why)
    # foundation-model-inference answers a body that it cannot read, and a question that Content
    # Safety refuses, with 200 and {}.
    if not payload and (payload is None or isinstance(payload, (dict, list))):
        raise _no_answer("an empty answer", why)
    text = _text_in(payload) if isinstance(payload, list) else None
    if text is None:
        shape = _kind(payload)
        if isinstance(payload, dict):
            keys = quote(", ".join(repr(str(key)[:40]) for key in list(payload)[:5]))
            shape = f"an object with the keys {keys}"
        raise UnreadableAnswerError(
            f"The endpoint answered {shape}, which is not a known answer format "
            f"({_EXPECTED.get(dialect, _EXPECTED['score'])}): check that the URL is the"
            " scoring URI of a chat model"
        )
    return Answer(text)


def token_counts(usage: object) -> dict[str, int]:
    """The whole-number entries of a `usage` object; empty where there are none."""
    if not isinstance(usage, dict):
        return {}
    return {str(k): v for k, v in usage.items() if isinstance(v, int) and not isinstance(v, bool)}


def reported_failure(error: object) -> tuple[str, int | None]:
    """The words and the status in an `error` value of any known shape."""
    if isinstance(error, dict):
        status = next(
            (
                error[k]
                for k in ("status_code", "status", "code")
                if isinstance(error.get(k), int) and not isinstance(error[k], bool)
            ),
            None,
        )
        inside = next((error[k] for k in ("message", "body", "error", "code") if error.get(k)), "")
        words = reported_failure(inside)[0] if isinstance(inside, dict) else str(inside)
        return words, status
    return str(error), None


def _check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestRejectedError(
            'messages must be a list of {"role": …, "content": …}, not one value'
        )
    if not messages:
        raise RequestRejectedError("There is no message to send: give at least one user message")
    clean: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestRejectedError(
                f'Message {index} is not an object with "role" and "content"'
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestRejectedError(
                f"Message {index} has the role {role!r}: it must be one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise RequestRejectedError(
                f"Message {index}: content must be text, not {_kind(content)}"
            )
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise RequestRejectedError(
                f"Message {index}: content is invalid text (half a character at position "
                f"{error.start})"
            ) from None
        clean.append({"role": str(role), "content": content})
    # As the MLflow image's predictor asserts; vLLM's images leave it to the chat template.
    late = [i for i, message in enumerate(clean) if message["role"] == "system" and i > 0]
    if late:
        raise RequestRejectedError(
            f"Message {late[0]} is a system message: a system message can only come first"
        )
    if clean[-1]["role"] != "user":
        raise RequestRejectedError(
            f"The last message has the role {clean[-1]['role']!r}: it must be the user's question"
        )
    return clean


def _is_number(value: object, low: float, high: float) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and low <= value <= high


def _read_output(payload: dict[str, Any], reason: str | None) -> Answer:
    usage = token_counts(payload.get("usage"))
    text = _text_in(payload["output"])
    if payload["output"] is None or payload["output"] == []:
        raise _no_answer("no output", reason)
    if text is None:
        raise UnreadableAnswerError(
            f"The endpoint's output is {_kind(payload['output'])}, not text: check that the URL"
            " is the scoring URI of a chat model"
        )
    # foundation-model-inference turns its own missing answer (a prompt beyond the context, a
    # refused parameter) into this word, and sends no usage with it.
    if text == "None" and not usage.get("completion_tokens"):
        raise _no_answer('{"output": "None"}', reason)
    return Answer(
        text, _optional_text(payload, "finish_reason"), usage, _optional_text(payload, "model")
    )


def _read_choices(payload: dict[str, Any], reason: str | None, quote: Quote) -> Answer:
    choices = payload["choices"]
    if not isinstance(choices, list) or (choices and not isinstance(choices[0], dict)):
        raise UnreadableAnswerError(
            f"The endpoint's choices are {_kind(choices)}, not a list of answers"
        )
    if not choices:
        raise _no_answer("an empty list of choices", reason)
    first = choices[0]
    finish = _optional_text(first, "finish_reason")
    text = message_text(first.get("message")) if "message" in first else first.get("text")
    if finish == "error" or (text is None and finish is not None):
        shown = quote(finish or "")
        raise _no_answer(f"finish_reason {shown!r} and no text", reason or shown)
    if not isinstance(text, str):
        raise UnreadableAnswerError("The endpoint's first choice has no text")
    return Answer(
        text, finish, token_counts(payload.get("usage")), _optional_text(payload, "model")
    )


def message_text(message: object) -> str | None:
    """The text of an OpenAI message or stream delta: a string, or a list of text parts."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _text_in(value: object) -> str | None:
    """The text in `"text"`, `["text", …]`, `[{"0": "text"}]` and one list around these."""
    # Lists come from text generation and from the plain MLflow image, whose tables become records.
    for _ in range(2):
        if isinstance(value, list) and value:
            value = value[0]
    if isinstance(value, dict):
        value = value.get("0", value.get("output"))
    return value if isinstance(value, str) else None


def _no_answer(what: str, reason: str | None) -> ModelError:
    why = f" Its reason: {reason}." if reason else ""
    return ModelError(
        f"The model gave no answer: the endpoint sent {what}, which is how it reports a "
        f"failure.{why} Fix: {_SHORTEN}",
        reason=reason,
    )


def _optional_text(payload: Mapping[str, object], name: str) -> str | None:
    value = payload.get(name)
    return value if isinstance(value, str) else None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "no text")


# ---- the stream: server-sent events, bytes in, events out, text pieces out

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
            raise UnreadableAnswerError(
                "The stream contains a line that does not end: it is not a chat answer"
            )
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r").decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """Events out of lines. An event cut off before its blank line still counts if it has data."""
    # The HTML standard drops such an event; here it may be the one with the finish_reason.
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
    # Servers that speak this dialect loosely leave out [DONE]; a finish_reason then ends the
    # answer.
    finished = False
    for event in events:
        if event.data.strip() == "[DONE]":
            return
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            chunk = None
        if chunk is None and event.name != "error":
            raise UnreadableAnswerError(
                "The stream contains an event that is not JSON (or was cut off): check that the URL"
                " is an OpenAI-compatible chat route"
            )
        # The status was 200 when the first byte went out: a later failure comes as an event "error"
        # (Azure's older image) or as an `error` object among the data (other servers).
        reported = chunk.get("error") if isinstance(chunk, dict) else None
        if event.name == "error" or reported:
            words, status = reported_failure(reported or chunk or event.data)
            raise ModelError(
                "The model failed in the middle of its answer: "
                f"{quote(words) or 'no reason given'}",
                inner_status=status,
            )
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list):
            raise UnreadableAnswerError("The stream contains an event without choices")
        if not choices or not isinstance(choices[0], dict):
            continue  # a chunk that only carries usage
        finish = choices[0].get("finish_reason")
        if finish == "error":
            raise ModelError("The model failed in the middle of its answer", reason="error")
        finished = finished or finish is not None
        piece = message_text(choices[0].get("delta"))
        if piece:
            yield piece
    if not finished:
        raise UnreadableAnswerError(
            "The streamed answer was cut off: the connection ended before the answer did; try "
            "again, and check the deployment's log if it happens again"
        )
