"""Chats: read in any of the known formats, checked row by row, split and written into the run."""

from __future__ import annotations

from .check import CheckReport, FileReport, check, check_recipe, read_conversations, show
from .conversation import Conversation, Message
from .faults import Fault
from .prepare import prepare, question_of
from .sources import fingerprints

__all__ = [
    "CheckReport",
    "Conversation",
    "Fault",
    "FileReport",
    "Message",
    "check",
    "check_recipe",
    "fingerprints",
    "prepare",
    "question_of",
    "read_conversations",
    "show",
]
