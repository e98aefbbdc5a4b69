"""Conversation and Message: what all chat formats become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
