"""What a conversation must look like: types, roles, content and order. Every breach is told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .conversation import ROLES, Message
from .faults import Problem

# C0 and C1 controls but tab and line ends, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
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
    mend = f"write {near!r}" if near in known else f"known roles: {', '.join(known)}"
    return [Problem("unknown-role", f"{place} has the unknown role {role[:40]!r}", mend)]


def check_text(place: str, value: Any, *, drop: str = "conversation") -> list[Problem]:
    """The problems of a text: wrong type, nothing in it, characters that cannot be trained on.

    `drop` is what may be left out instead of writing the text.
    """
    if not isinstance(value, str):
        return [wrong_type(place, value, "text")]
    if not value or value.isspace():
        how = "blank" if value else "empty"
        mend = f"write its text, or drop the {drop}"
        return [Problem("empty-content", f"{place} is {how}", mend)]
    return check_characters(place, value)


def check_characters(place: str, value: str) -> list[Problem]:
    """The first character of a text that has no place in training data."""
    if value.isascii() and value.replace("\n", "").isprintable():
        return []  # nearly every text, in a fraction of the time
    unfit = _UNFIT.search(value)
    return [_unfit_character(place, unfit)] if unfit else []


def _unfit_character(place: str, match: re.Match[str]) -> Problem:
    code = ord(match.group())
    name = "half of a surrogate pair" if code >= 0xD800 else "the control character"
    what = f"{place} holds {name} U+{code:04X} at character {match.start() + 1}"
    return Problem("control-character", what, "remove it")


def check_order(roles: Sequence[str]) -> list[Problem]:
    """The order that Phi-3's template knows: [system,] user, assistant, user, … assistant."""
    problems = []
    start = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[start:], start=start):
        if role == "system":
            what = f"message {number + 1} is a system message"
            problems.append(_order(what, "put it first, or drop it"))
        elif number == start and role != "user":
            problems.append(
                _order(f"it starts with {_an(role)} message", "start with a user message")
            )
        elif number > start and role == roles[number - 1]:
            what = f"messages {number} and {number + 1} are both {role} messages"
            problems.append(_order(what, "join them, or add what stood between them"))
    if len(roles) == start:
        problems.append(_order("it is a system message only", "add a question and its answer"))
    elif roles[-1] == "user":
        mend = "end with an assistant message, which is what is learnt"
        problems.append(_order("it ends with a user message", mend))
    return problems


def _order(what: str, mend: str) -> Problem:
    return Problem("role-order", f"wrong order of roles: {what}", mend)


def _an(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def wrong_type(place: str, value: Any, expected: str) -> Problem:
    found = _KINDS.get(type(value), "a number")
    return Problem("wrong-type", f"{place} is {found}", f"expected {expected}")
