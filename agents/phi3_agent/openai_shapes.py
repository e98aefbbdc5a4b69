"""OpenAI's chat-completions and Responses shapes: requests read, answers and events built.

Pure functions. What a request asks for and a Phi-3 cannot do is refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi3_tool.errors import RequestRejectedError
from phi3_tool.wire import from_messages

# Their names for the framework's options. Everything else either changes nothing here (user,
# metadata, …) or is in _REFUSED.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    # Chat completions' newer name, and the Responses API's.
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "stop": "stop",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
}
_REFUSED = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "audio", "prompt")
_ROLES = {"developer": "system"}  # OpenAI's newer name
_TEXT_PARTS = ("text", "input_text", "output_text")

RoleMessages = list[dict[str, str]]


@dataclass(frozen=True)
class Asked:
    """A request in either shape: messages in roles, options, and how the answer is wanted."""

    messages: RoleMessages
    options: dict[str, Any]
    stream: bool = False
    previous: str | None = None
    store: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


def read_chat(body: object) -> Asked:
    """A chat-completions request; raises RequestRejectedError that names every fault."""
    request = _object(body)
    faults = _refused(request)
    if request.get("n") not in (None, 1):
        faults.append("n must be 1: the endpoint gives one answer")
    # Refused, not ignored: a client that asks for JSON would try to parse the answer.
    if _wants_format(request.get("response_format")):
        faults.append("response_format cannot be used: the endpoint answers in plain text")
    messages = _messages(request.get("messages"), faults)
    _refuse(faults)
    return Asked(messages, _options(request), bool(request.get("stream")))


def read_responses(body: object) -> Asked:
    """A Responses request; raises RequestRejectedError that names every fault."""
    request = _object(body)
    faults = _refused(request)
    if request.get("conversation") is not None:
        faults.append("conversation cannot be used: continue with previous_response_id")
    if request.get("background"):
        faults.append("background cannot be used: ask with stream instead")
    if _wants_format((request.get("text") or {}).get("format")):
        faults.append("text.format cannot be used: the endpoint answers in plain text")
    given = request.get("input")
    if isinstance(given, str):
        # Responses takes a text alone as one user message.
        given = [{"role": "user", "content": given}]
    messages = _messages(given, faults)
    instructions = request.get("instructions")
    if isinstance(instructions, str) and instructions.strip():
        # First, as a system prompt: Phi-3's template has it nowhere else.
        messages.insert(0, {"role": "system", "content": instructions})
    # Checked here, looked up in serve.py: an unknown one is an error with a code of its own.
    previous = request.get("previous_response_id")
    if previous is not None and not isinstance(previous, str):
        faults.append("previous_response_id must be text")
    _refuse(faults)
    return Asked(
        messages,
        _options(request),
        bool(request.get("stream")),
        previous,
        request.get("store") is not False,
        {"instructions": instructions, "previous_response_id": previous},
    )


def stored(messages: RoleMessages, instructions: object) -> list[dict[str, Any]]:
    """Messages as turns to keep; a system message of the input goes with the first turn.

    `instructions` of a request are its own and are not kept, as in OpenAI's API.
    """
    system = [
        m["content"]
        for i, m in enumerate(messages)
        if m["role"] == "system" and not (i == 0 and m["content"] == instructions)
    ]
    turns = [dict(turn) for turn in from_messages(m for m in messages if m["role"] != "system")]
    if system and turns:
        turns[0] = {
            "inputs": {**turns[0]["inputs"], "system_prompt": "\n\n".join(system)},
            "outputs": turns[0]["outputs"],
        }
    return turns


def system_of(turns: Iterable[Mapping[str, Any]]) -> RoleMessages:
    """The system messages that `stored` kept, in their order."""
    texts = [(turn.get("inputs") or {}).get("system_prompt") for turn in turns]
    return [{"role": "system", "content": text} for text in texts if isinstance(text, str) and text]


def new_id(kind: str) -> str:
    """`chatcmpl-…`, `resp_…`, `msg_…`."""
    return f"{kind}{uuid.uuid4().hex}"


def completion(text: str, model: str, finish: str, usage: Mapping[str, Any]) -> dict[str, Any]:
    """A whole chat completion."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    shown = {
        "prompt_tokens": usage.get("input_token_count") or 0,
        "completion_tokens": usage.get("output_token_count") or 0,
        "total_tokens": usage.get("total_token_count") or 0,
    }
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": shown,
    }


class ChunkWriter:
    """The chunks of one streamed chat completion, as server-sent events."""

    def __init__(self, model: str) -> None:
        self._about = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def piece(self, delta: Mapping[str, str], finish: str | None = None) -> str:
        """One chunk."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return sse({**self._about, "choices": [choice]})


class ResponseWriter:
    """One answer in the Responses shape: whole, or as its events."""

    def __init__(self, model: str, asked: Asked) -> None:
        self.id = new_id("resp_")
        self._message = new_id("msg_")
        self._created = int(time.time())
        self._model = model
        self._asked = asked
        self._number = -1

    def whole(self, text: str, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The finished response."""
        about = self._about("completed", [self._item("completed", [_part(text)])])
        if usage.get("total_token_count"):
            about["usage"] = {
                "input_tokens": usage.get("input_token_count") or 0,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage.get("output_token_count") or 0,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_token_count"],
            }
        return about

    def begin(self) -> str:
        """The events before the first piece."""
        begun = self._about("in_progress", [])
        return "".join(
            (
                self._event("response.created", response=begun),
                self._event("response.in_progress", response=begun),
                self._event(
                    "response.output_item.added",
                    output_index=0,
                    item=self._item("in_progress", []),
                ),
                self._event("response.content_part.added", **self._place(), part=_part("")),
            )
        )

    def piece(self, text: str) -> str:
        """One piece of the text."""
        place = self._place()
        return self._event("response.output_text.delta", **place, delta=text, logprobs=[])

    def end(self, text: str, usage: Mapping[str, Any]) -> str:
        """The events after the last piece."""
        # In the order of OpenAI's own stream: part, item, response.
        place, done = self._place(), self._item("completed", [_part(text)])
        return "".join(
            (
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=done),
                self._event("response.completed", response=self.whole(text, usage)),
            )
        )

    def failed(self, error: Mapping[str, Any]) -> str:
        """The event that replaces the rest."""
        about = self._about("failed", [])
        about["error"] = {"code": "server_error", "message": error["message"]}
        return self._event("response.failed", response=about)

    def _about(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": output,
            # Not used here, but the SDK's classes require them.
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "store": self._asked.store,
            **self._asked.facts,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **facts: Any) -> str:
        self._number += 1  # clients put events in order by it; it begins with 0
        return sse({"type": kind, "sequence_number": self._number, **facts}, kind)


def sse(data: Mapping[str, Any], name: str = "") -> str:
    """One server-sent event."""
    # Responses names each event; chat completions have data lines alone.
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _object(body: object) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise RequestRejectedError("The request must be a JSON object")
    return body


def _refused(request: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} cannot be used: a Phi-3 endpoint does not know it"
        for name in _REFUSED
        if request.get(name)
    ]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise RequestRejectedError("; ".join(faults))


def _wants_format(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("type") not in (None, "text")


def _options(request: Mapping[str, Any]) -> dict[str, Any]:
    return {
        ours: request[theirs]
        for theirs, ours in _OPTIONS.items()
        if request.get(theirs) is not None
    }


def _messages(given: object, faults: list[str]) -> RoleMessages:
    """Role messages; a text may be a string or a list of text parts."""
    if not isinstance(given, list) or not given:
        faults.append('expected a list of {"role", "content"} messages, or for input a text')
        return []
    messages: RoleMessages = []
    for number, item in enumerate(given):
        if not isinstance(item, Mapping) or item.get("type", "message") != "message":
            kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
            faults.append(f"item {number} is {kind}, not a message")
            continue
        content = item.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [
            part.get("text")
            for part in (parts if isinstance(parts, list) else [None])
            if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS
        ]
        is_text = isinstance(parts, list) and len(texts) == len(parts)
        if not is_text or not all(isinstance(text, str) for text in texts):
            faults.append(f"message {number} has content that is not text")
            continue
        role = str(item.get("role"))
        messages.append({"role": _ROLES.get(role, role), "content": "".join(map(str, texts))})
    return messages
