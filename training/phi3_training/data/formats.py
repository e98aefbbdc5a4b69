"""The chat formats that are read, told apart by their keys, and turned into messages.

messages, prompt/completion, input/output, alpaca (instruction/input/output) and sharegpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .conversation import CARRIED, Message
from .faults import Problem
from .rules import ListShape, check_characters, check_list, check_order, check_text, wrong_type

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
        return None, (), [_unknown(f"the keys fit {names} alike")]
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
        return [Problem("wrong-type", what, 'write "accept": ["a text that a right answer has"]')]
    return [problem for text in texts for problem in check_characters("accept", text)]


def _read_list(name: str, shape: ListShape, row: Mapping[str, Any]) -> Read:
    if name == "sharegpt" and _has_roles(row[shape.key]):
        shape = ListShape("conversations", "role", "content", shape.aliases)
    messages, problems = check_list(shape, row[shape.key])
    if name == "sharegpt" and row.get("system") not in (None, ""):
        problems += check_text("system", row["system"], drop="key")
        messages.insert(0, Message("system", str(row["system"])))
    return name, tuple(messages), problems or check_order([m.role for m in messages])


def _has_roles(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "role" in first and "from" not in first


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
                return _unknown(f"{name} needs {missing!r} beside {here!r}, which is missing")
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return _unknown("a message that stands alone, with no conversation around it")
    keys = ", ".join(repr(key)[:40] for key in list(row)[:6]) or "no keys at all"
    return _unknown(f"'messages' is missing and no other format fits (found {keys})")


def _unknown(what: str) -> Problem:
    return Problem("unknown-format", f"the format cannot be told: {what}", _EXPECTED)
