"""Conversation and Message: what all chat formats become."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .faults import Problem

ROLES = ("system", "user", "assistant")
CARRIED = ("prompt", "prompt_id", "accept")  # accept: texts of which one makes an answer right


@dataclass(frozen=True)
class Message:
    """One message; `role` is one of ROLES."""

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """As it is written in JSON lines."""
        return {"role": self.role, "content": self.content}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Message:
        """The reverse of `to_dict`."""
        return cls(role=value["role"], content=value["content"])


@dataclass(frozen=True)
class Conversation:
    """A checked conversation, the place it was read from, and what is carried along with it."""

    messages: tuple[Message, ...]
    source: Path
    line: int
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it is written in JSON lines; what is carried comes after the messages."""
        return {"messages": [message.to_dict() for message in self.messages], **self.extra}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], source: Path, line: int) -> Conversation:
        """The reverse of `to_dict`, for rows that were checked before."""
        messages = tuple(Message.from_dict(message) for message in value["messages"])
        extra = {key: value[key] for key in CARRIED if key in value}
        return cls(messages, source, line, extra)

    @property
    def turns(self) -> int:
        """How many questions it holds."""
        return sum(message.role == "user" for message in self.messages)


# What a conversation must look like: types, roles, content and order. Every fault is reported.

# C0 and C1 controls but tab and line ends (U+0085 is one), and halves of surrogate pairs, which
# UTF-8 cannot hold.
UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_KINDS = {dict: "an object", list: "an array", str: "text", bool: "true/false", type(None): "null"}


@dataclass(frozen=True)
class ListShape:
    """How a format spells a list of messages; `aliases` maps its role names to ours."""

    key: str
    role: str
    content: str
    aliases: Mapping[str, str] = field(default_factory=dict)


def check_list(shape: ListShape, turns: Any) -> tuple[list[Message], list[Problem]]:
    """The messages of a list and every problem in it but their order."""
    if not isinstance(turns, list):
        return [], [wrong_type(shape.key, turns, "a list of messages")]
    if not turns:
        what = f"{shape.key!r} is an empty list"
        return [], [Problem("no-messages", what, "write at least a question and its answer")]
    messages, problems = [], []
    for number, turn in enumerate(turns):
        found = _check_message(shape, f"{shape.key}[{number}]", turn)
        if isinstance(found, Message):
            messages.append(found)
        else:
            problems += found
    return messages, problems


def _check_message(shape: ListShape, place: str, turn: Any) -> Message | list[Problem]:
    if not isinstance(turn, dict):
        expected = f'an object with "{shape.role}" and "{shape.content}"'
        return [wrong_type(place, turn, expected)]
    # The common case first: this runs for every message of every row.
    role, content = turn.get(shape.role), turn.get(shape.content)
    problems = _check_role(shape, place, turn) if role not in ROLES else []
    if shape.content not in turn:
        what = f"{place} has no {shape.content!r}"
        problems.append(Problem("missing-content", what, "add the text of the message"))
    else:
        drop = "system message" if role == "system" else "conversation"
        problems += check_text(f"{place}.{shape.content}", content, drop=drop)
    if problems:
        return problems
    return Message(shape.aliases.get(str(role), str(role)), str(content))


def _check_role(shape: ListShape, place: str, turn: Mapping[str, Any]) -> list[Problem]:
    role = turn.get(shape.role)
    known = dict.fromkeys([*shape.aliases, *ROLES])
    if shape.role not in turn:
        what = f"{place} has no {shape.role!r}"
        return [Problem("missing-role", what, f"add one of {', '.join(known)}")]
    if not isinstance(role, str):
        return [wrong_type(f"{place}.{shape.role}", role, "text")]
    if role in known:
        return []
    near = role.strip().lower()
    fix = f"write {near!r}" if near in known else f"known roles: {', '.join(known)}"
    return [Problem("unknown-role", f"{place} has the unknown role {role[:40]!r}", fix)]


def check_text(place: str, value: Any, *, drop: str = "conversation") -> list[Problem]:
    """The problems of a text: wrong type, nothing in it, characters that cannot be trained on.

    `drop` is what may be left out instead of writing the text.
    """
    if not isinstance(value, str):
        return [wrong_type(place, value, "text")]
    if not value or value.isspace():
        how = "blank" if value else "empty"
        fix = f"write its text, or remove the {drop}"
        return [Problem("empty-content", f"{place} is {how}", fix)]
    return check_characters(place, value)


def check_characters(place: str, value: str) -> list[Problem]:
    """The first character of a text that has no place in training data."""
    if value.isascii() and value.replace("\n", "").isprintable():
        return []  # nearly every text, in a fraction of the time
    unfit = UNFIT.search(value)
    if unfit is None:
        return []
    code = ord(unfit.group())
    name = "half of a surrogate pair" if code >= 0xD800 else "the control character"
    what = f"{place} holds {name} U+{code:04X} at character {unfit.start() + 1}"
    return [Problem("control-character", what, "remove it")]


def check_order(roles: Sequence[str]) -> list[Problem]:
    """The order that Phi-3's template knows: [system,] user, assistant, user, … assistant."""
    problems = []
    start = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[start:], start=start):
        if role == "system":
            what = f"message {number + 1} is a system message"
            problems.append(_order(what, "move it to the start, or remove it"))
        elif number == start and role != "user":
            article = "an" if role == "assistant" else "a"
            what = f"it starts with {article} {role} message"
            problems.append(_order(what, "start with a user message"))
        elif number > start and role == roles[number - 1]:
            what = f"messages {number} and {number + 1} are both {role} messages"
            problems.append(
                _order(what, "join them, or add the message that is missing between them")
            )
    if len(roles) == start:
        problems.append(_order("it has only a system message", "add a question and its answer"))
    elif roles[-1] == "user":
        fix = "end with an assistant message, which is what the model learns"
        problems.append(_order("it ends with a user message", fix))
    return problems


def _order(what: str, fix: str) -> Problem:
    return Problem("role-order", f"wrong order of roles: {what}", fix)


def wrong_type(place: str, value: Any, expected: str) -> Problem:
    found = _KINDS.get(type(value), "a number")
    return Problem("wrong-type", f"{place} is {found}", f"expected {expected}")


# The supported chat formats, detected from their keys, and converted to messages.
# messages, prompt/completion, input/output, alpaca (instruction/input/output) and sharegpt.

MESSAGES = ListShape("messages", "role", "content")
SHAREGPT = ListShape(
    "conversations",
    "from",
    "value",
    {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
)
_LISTS = {shape.key: shape for shape in (MESSAGES, SHAREGPT)}
LIST_KEYS = _LISTS.keys()
_NAMES = {"messages": "messages", "conversations": "sharegpt"}

# (format, key of the question, key of the answer); the first whose question key is there wins.
_PAIRS = (
    ("prompt/completion", "prompt", "completion"),
    ("alpaca", "instruction", "output"),
    ("input/output", "input", "output"),
)
_EXPECTED = (
    "expected 'messages' (a list of {\"role\", \"content\"}), 'prompt' + 'completion', "
    "'input' + 'output', 'instruction' + 'output', or 'conversations'"
)

Read = tuple[str | None, tuple[Message, ...], list[Problem]]


def read_row(row: Mapping[str, Any]) -> Read:
    """The row's format, its messages, and every problem; messages count only without problems."""
    for key, shape in _LISTS.items():
        if key in row:
            return _read_list(_NAMES[key], shape, row)
    pairs = [(name, ask, answer) for name, ask, answer in _PAIRS if ask in row and answer in row]
    if len({answer for _, _, answer in pairs}) > 1:
        names = " and ".join(name for name, _, _ in pairs)
        return None, (), [_unknown(f"the keys fit several formats: {names}")]
    if pairs:
        return _read_pair(*pairs[0], row)
    return None, (), [_no_format(row)]


def carried(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """What goes along with a row (CARRIED), unless its format gives the key a meaning."""
    extra = {key: row[key] for key in CARRIED if row.get(key) is not None}
    if not _LISTS.keys() & row.keys():
        extra.pop("prompt", None)
    problems = []
    for key, value in extra.items():
        if key == "accept":
            problems += _accept(value)
        elif isinstance(value, str):
            problems += check_characters(key, value)
        elif key == "prompt" or not isinstance(value, int):
            problems.append(wrong_type(key, value, "text"))
    return extra, problems


def _accept(value: Any) -> list[Problem]:
    texts: list[Any] = value if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        what = "'accept' is not a list of texts"
        fix = 'write "accept": ["a text that a correct answer contains"]'
        return [Problem("wrong-type", what, fix)]
    return [problem for text in texts for problem in check_characters("accept", text)]


def _read_list(name: str, shape: ListShape, row: Mapping[str, Any]) -> Read:
    turns = row[shape.key]
    first = turns[0] if isinstance(turns, list) and turns else None
    if name == "sharegpt" and isinstance(first, dict) and "role" in first and "from" not in first:
        shape = ListShape("conversations", "role", "content", shape.aliases)
    messages, problems = check_list(shape, turns)
    if name == "sharegpt" and row.get("system") not in (None, ""):
        problems += check_text("system", row["system"], drop="key")
        messages.insert(0, Message("system", str(row["system"])))
    return name, tuple(messages), problems or check_order([m.role for m in messages])


def _read_pair(name: str, ask: str, answer: str, row: Mapping[str, Any]) -> Read:
    problems = [*check_text(ask, row[ask]), *check_text(answer, row[answer])]
    messages = [Message("user", str(row[ask])), Message("assistant", str(row[answer]))]
    if name == "alpaca":
        problems += _alpaca_extras(row, messages)
    return name, tuple(messages), problems


def _alpaca_extras(row: Mapping[str, Any], messages: list[Message]) -> list[Problem]:
    """Alpaca's optional keys: `input` follows the instruction, `system` comes first."""
    problems = []
    if row.get("input") not in (None, ""):
        problems += check_text("input", row["input"], drop="key")
        messages[0] = Message("user", f"{row['instruction']}\n\n{row['input']}")
    if row.get("system") not in (None, ""):
        problems += check_text("system", row["system"], drop="key")
        messages.insert(0, Message("system", str(row["system"])))
    if row.get("history"):
        problems.append(
            Problem(
                "unknown-format",
                "'history' of an alpaca row is not read",
                "write the whole conversation as 'messages'",
            )
        )
    return problems


def _no_format(row: Mapping[str, Any]) -> Problem:
    for name, ask, answer in _PAIRS:
        for here, missing in ((ask, answer), (answer, ask)):
            if here in row and (here, missing) != ("output", "instruction"):
                return _unknown(f"{name} needs {missing!r} in addition to {here!r}")
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return _unknown("it is a single message, not a conversation")
    keys = ", ".join(repr(key)[:40] for key in list(row)[:6]) or "it has no keys"
    return _unknown(f"it has no 'messages' and fits no other format (keys: {keys})")


def _unknown(what: str) -> Problem:
    return Problem("unknown-format", f"unknown format: {what}", _EXPECTED)
