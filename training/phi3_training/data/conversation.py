"""Conversation and Message: what all chat formats become."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import faults
from .faults import Problem

ROLES = ("system", "user", "assistant")
CARRIED = ("prompt", "prompt_id", "accept")  # accept: texts of which one makes an answer right


@dataclass(frozen=True)
class Message:
    """One message; `role` is one of ROLES. An answer with `learn` False is only context."""

    role: str
    content: str
    learn: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As it is written in JSON lines; `weight` as in OpenAI's fine-tuning format."""
        weight = {} if self.learn else {"weight": 0}
        return {"role": self.role, "content": self.content, **weight}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Message:
        """The reverse of `to_dict`."""
        return cls(value["role"], value["content"], value.get("weight", 1) != 0)


@dataclass(frozen=True)
class Conversation:
    """A checked conversation, the place it was read from, and what is carried along with it."""

    messages: tuple[Message, ...]
    source: Path
    line: int
    extra: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
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
_UNFIT_BYTES = bytes([*range(9), 11, 12, *range(14, 32), 127])
_UNFIT_C1 = re.compile(rb"\xc2[\x80-\x84\x86-\x9f]")
_KINDS = {dict: "an object", list: "an array", str: "text", bool: "true/false", type(None): "null"}


def check_text(place: str, value: object, *, drop: str = "conversation") -> list[Problem]:
    """The problems of a text: wrong type, nothing in it, characters that cannot be trained on.

    `drop` is what may be left out instead of writing the text.
    """
    if not isinstance(value, str):
        return [wrong_type(place, value, "text")]
    if not value or value.isspace():
        how = "blank" if value else "empty"
        return [faults.EMPTY_CONTENT(place=place, how=how, drop=drop)]
    return check_characters(place, value)


def check_characters(place: str, value: str) -> list[Problem]:
    """The first character of a text that has no place in training data."""
    try:
        if not has_unfit_characters(value.encode()):  # the usual case, and the quick way
            return []
    except UnicodeEncodeError:
        pass  # half of a surrogate pair
    unfit = UNFIT.search(value)
    if unfit is None:
        return []
    code = ord(unfit.group())
    name = "half of a surrogate pair" if code >= 0xD800 else "the control character"
    return [faults.CONTROL_CHARACTER(place=place, name=name, code=code, at=unfit.start() + 1)]


def has_unfit_characters(text: bytes, nuls: int = 0) -> bool:
    """Whether a text in UTF-8 matches UNFIT; `nuls` zero bytes in it are separators.

    Dropping bytes from a copy takes a fifth of the time of searching for UNFIT.
    """
    if len(text) - len(text.translate(None, _UNFIT_BYTES)) != nuls:
        return True
    return has_c1_controls(text)


def has_c1_controls(text: bytes) -> bool:
    """Whether UTF-8 bytes hold a C1 control other than U+0085."""
    return b"\xc2" in text and _UNFIT_C1.search(text) is not None


def check_order(roles: Sequence[str]) -> list[Problem]:
    """The order that Phi-3's template knows: [system,] user, assistant, user, … assistant."""
    wrong: list[tuple[str, str]] = []
    start = 1 if roles[0] == "system" else 0
    # All faults of the order, not the first alone: a row is corrected once.
    for number, role in enumerate(roles[start:], start=start):
        if role == "system":
            what = f"message {number + 1} is a system message"
            wrong.append((what, "move it to the start, or remove it"))
        elif number == start and role != "user":
            article = "an" if role == "assistant" else "a"
            wrong.append((f"it starts with {article} {role} message", "start with a user message"))
        elif number > start and role == roles[number - 1]:
            what = f"messages {number} and {number + 1} are both {role} messages"
            wrong.append((what, "join them, or add the message that is missing between them"))
    if len(roles) == start:
        wrong.append(("it has only a system message", "add a question and its answer"))
    elif roles[-1] == "user":
        fix = "end with an assistant message, which is what the model learns"
        wrong.append(("it ends with a user message", fix))
    return [faults.ROLE_ORDER(what=what, fix=fix) for what, fix in wrong]


def wrong_type(place: str, value: object, expected: str) -> Problem:
    """A value of another type than expected; everything that is not named is a number in JSON."""
    kind = _KINDS.get(type(value), "a number")
    return faults.WRONG_TYPE(place=place, kind=kind, expected=expected)
