"""The two conditions of a workflow that are rehearsed, and literal text beside them.

As in "Workflow Definition Language schema" (learn.microsoft.com/azure/logic-apps): a text that
begins with @ or holds @{ is an expression, @@ stands for a literal @. Every other expression is
answered with 501.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .wire import AzureError, Json, bad

_DUE = re.compile(r"@greaterOrEquals\(ticks\(utcNow\(\)\), ?ticks\('([^']+)'\)\)")
# A quote inside of quotes is doubled.
_TAGGED = re.compile(r"@equals\(body\('([^']+)'\)\?\['tags'\]\?\['([^']+)'\], ?'((?:[^']|'')*)'\)")
_EXPRESSION = re.compile(r"^@(?!@)|(?<!@)@\{")


@dataclass(frozen=True)
class Condition:
    """What an If asks: whether a time has come, or whether a read resource has a tag."""

    due: float | None = None  # seconds since 1970
    read: str = ""  # the action that read the resource
    tag: tuple[str, str] = ("", "")

    @classmethod
    def of(cls, expression: object) -> Condition:
        """Read it. Raises AzureError: 501 for another expression, 400 for a time that is none."""
        text = expression if isinstance(expression, str) else ""
        if match := _DUE.fullmatch(text):
            try:
                when = dt.datetime.fromisoformat(match[1].replace("Z", "+00:00"))
            except ValueError:
                raise bad(f"'{match[1]}' is no timestamp.", "InvalidTemplate") from None
            zoned = when if when.tzinfo else when.replace(tzinfo=dt.timezone.utc)
            return cls(due=zoned.timestamp())
        if match := _TAGGED.fullmatch(text):
            return cls(read=match[1], tag=(match[2], match[3].replace("''", "'")))
        raise AzureError(501, "NotRehearsed", f"The condition {expression}")

    def holds(self, now: float, bodies: Mapping[str, Json]) -> bool:
        """Whether it is true now; `bodies`: what each action has read."""
        if self.due is not None:
            return now >= self.due
        name, value = self.tag
        return (bodies.get(self.read, {}).get("tags") or {}).get(name) == value


def check_literal(value: Any) -> None:
    """Raise AzureError (501) where a text anywhere in `value` is an expression."""
    if isinstance(value, dict):
        for item in value.values():
            check_literal(item)
    elif isinstance(value, list):
        for item in value:
            check_literal(item)
    elif isinstance(value, str) and _EXPRESSION.search(value):
        raise AzureError(501, "NotRehearsed", f"The expression {value}")


def literal(value: Any) -> Any:
    """`value` as it is sent: with @ for @@ at the beginning of a text and before a brace."""
    if isinstance(value, dict):
        return {name: literal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):
        text = value[1:] if value.startswith("@@") else value
        return text.replace("@@{", "@{")
    return value
