"""Prompt flow's chat_history to role messages and back, trimmed to a budget in whole turns."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import RequestRejectedError

log = logging.getLogger(__name__)

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
