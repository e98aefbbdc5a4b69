"""Conversations that outlive a run: Prompt flow's chat_history, in files or in memory.

A file holds what Prompt flow's `chat_history` holds, so it can be given to the flow, to
`phi3 batch` and to an agent alike. Read and written: FOLDER/<session id>.json, as clear text.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol, cast

from agent_framework import HistoryProvider, Message

from phi3_tool.errors import ConfigurationError, Phi3Error, RequestRejectedError
from phi3_tool.wire import from_messages, read_turns

from .client import answer_text, in_framework

Turns = list[Mapping[str, Any]]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
#: Conversations that are kept in memory; the least recently used is dropped first.
KEPT = 1000


class Conversations(Protocol):
    """Where turns are stored, by session id."""

    def read(self, session: str) -> Turns | None:
        """The turns, oldest first; None where the session is unknown."""
        ...

    def append(self, session: str, turns: Turns) -> None:
        """Add turns to the end; all of them or none."""
        ...


class MemoryConversations:
    """At most `kept` conversations, gone when the process ends."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._turns: OrderedDict[str, Turns] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, session: str) -> Turns | None:
        """The turns; None where the session is unknown or was dropped."""
        with self._lock:
            turns = self._turns.get(session)
            return None if turns is None else list(turns)

    def append(self, session: str, turns: Turns) -> None:
        """Add turns to the end."""
        with self._lock:
            self._turns[session] = [*self._turns.get(session, ()), *turns]
            self._turns.move_to_end(session)  # so the first one is the least recently used
            while len(self._turns) > self._kept:
                self._turns.popitem(last=False)


class FileConversations:
    """One file per conversation, readable by its owner alone, never half-written.

    Within a process, turns of one session are added one after the other; two processes that write
    to one session at once are not kept apart.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()

    def read(self, session: str) -> Turns | None:
        """The turns of a session; raises ConfigurationError for a file that is none of ours."""
        path = self._path(session)
        try:
            turns = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(turns, list):
                raise RequestRejectedError("it contains no list")
            read_turns(turns)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, Phi3Error) as error:
            raise ConfigurationError(
                f"The conversation {path} cannot be read ({error}): expected a list of turns as "
                "Prompt flow's chat_history; move the file away to begin a new one"
            ) from None
        return cast(Turns, turns)

    def append(self, session: str, turns: Turns) -> None:
        """Add turns to the session's file; raises ConfigurationError where it cannot be written."""
        path = self._path(session)
        with self._lock:
            text = json.dumps([*(self.read(session) or ()), *turns], ensure_ascii=False, indent=1)
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                # In the same folder, so that the rename is atomic: a reader never sees half a file.
                # Created with mode 0600; renamed over the old file when it is whole.
                with NamedTemporaryFile(
                    "w", encoding="utf-8", dir=self._folder, suffix=".part", delete=False
                ) as file:
                    file.write(text + "\n")
                os.replace(file.name, path)  # noqa: PTH105 - the name is text
            except OSError as error:
                raise ConfigurationError(
                    f"The conversation cannot be kept in {path}: {error}"
                ) from None

    def _path(self, session: str) -> Path:
        if not _NAME.fullmatch(session):
            raise ConfigurationError(
                f"The session id {session!r:.80} cannot name a file: use letters, digits, - and _, "
                "at most 128"
            )
        # The pattern above allows no dot and no slash: an id cannot lead out of the folder.
        return self._folder / f"{session}.json"


class TurnsProvider(HistoryProvider):
    """Gives an agent the turns of its session, and keeps the new one once it is answered.

    What only people see under an answer (sources, a note that it was cut off) is taken out of what
    the model gets, as the flows do. A run that fails leaves the conversation as it was.
    """

    def __init__(self, conversations: Conversations) -> None:
        super().__init__("phi3_turns")
        self._conversations = conversations

    async def get_messages(
        self, session_id: str | None, *, state: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Message]:
        """The finished turns of the session as user and assistant messages."""
        try:
            turns = read_turns(self._conversations.read(session_id) if session_id else None)
        except Phi3Error as error:
            raise in_framework(error) from error
        return [
            Message(role, [text])
            for asked, answer in turns
            for role, text in (("user", asked), ("assistant", answer))
        ]

    async def save_messages(
        self,
        session_id: str | None,
        messages: Sequence[Message],
        *,
        state: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the question and its answer."""
        if session_id is None:  # a run without a session is nobody's conversation
            return
        try:
            turns = from_messages(
                [{"role": str(m.role), "content": answer_text([m])} for m in messages]
            )
            self._conversations.append(session_id, list(turns))
        except Phi3Error as error:
            raise in_framework(error) from error
