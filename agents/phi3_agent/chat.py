"""`phi3 agent chat`: one question, or a conversation in the terminal that streams."""

from __future__ import annotations

import asyncio
import sys
import uuid
from typing import Any

from agent_framework import Agent, AgentSession

from phi3_tool.errors import Phi3Error

from .client import phi3_error


async def _say(agent: Agent[Any], question: str, session: AgentSession) -> None:
    async for update in agent.run(question, stream=True, session=session):
        sys.stdout.write(update.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def talk(agent: Agent[Any], question: str | None, session_id: str) -> int:
    """Ask once, or until an empty line; raises what the agent raises for a single question."""
    # One session for the whole conversation: the framework keeps its turns under this id.
    session = agent.create_session(session_id=session_id or str(uuid.uuid4()))
    if question is not None:
        asyncio.run(_say(agent, question, session))
        return 0
    sys.stderr.write("Type a question; an empty line, Ctrl-C or Ctrl-D ends the conversation.\n")
    while True:
        try:
            typed = input("You: ").strip()
        except (EOFError, KeyboardInterrupt):
            typed = ""
        if not typed:
            return 0
        sys.stdout.write("Model: ")
        try:
            asyncio.run(_say(agent, typed, session))
        except Exception as error:
            failure: Phi3Error | None = phi3_error(error)
            if failure is None:
                raise
            # The conversation stays as it was: the same question can be asked again.
            sys.stdout.write("\n")
            sys.stderr.write(f"Error: {failure}\n")
