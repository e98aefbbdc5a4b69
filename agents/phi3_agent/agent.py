"""Agents: the chat flow, and with documents the flow that answers from them, as `Agent`s.

An agent may be shared by many conversations at once; what belongs to one is in its session.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_framework import (
    Agent,
    ChatContext,
    ChatMiddleware,
    ChatResponse,
    ChatResponseUpdate,
    Content,
    Message,
    ResponseStream,
)

from phi3_tool.errors import Phi3Error
from phi3_tool.grounding import (
    NOT_IN_DOCUMENTS,
    Grounded,
    grounded,
    look_up,
    sources_note,
    standalone_question,
)
from phi3_tool.index import Hit, hits_of
from phi3_tool.wire import from_messages

from .client import MAX_NEW_TOKENS, Phi3ChatClient, answer_text, in_framework, role_messages
from .conversation import Conversations, TurnsProvider

#: The defaults of the flows' inputs.
DEFAULTS: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": MAX_NEW_TOKENS}


@dataclass(frozen=True)
class Documents:
    """The index to answer from, and the inputs of the flow's `lookup` and `build_prompt`.

    An empty `index` means $PHI3_INDEX, else index.sqlite in `folder`.
    """

    index: str = ""
    folder: Path = Path()
    query_type: str = "hybrid"
    top_k: int = 4
    min_score: float = 0.0

    def prompt(self, question: str, history: list[Any]) -> Grounded:
        """The flow's three nodes before the model: text for it, and the passages in it.

        Raises as `look_up` and `grounded` do.
        """
        query, _ = standalone_question(question, history)
        passages = look_up(
            query, self.index, self.folder, query_type=self.query_type, top_k=self.top_k
        )
        return grounded(question, passages, self.min_score)


class Grounding(ChatMiddleware):
    """Shows the model the passages that fit the question, and puts the sources under the answer.

    The session keeps the question as it was asked, not the passages.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def process(self, context: ChatContext, call_next: Callable[[], Awaitable[None]]) -> None:
        """Replace the question by the prompt; without a fitting passage the model is not asked."""
        try:
            sent = role_messages(list(context.messages))
            question = sent[-1]["content"] if sent else ""
            history = from_messages(sent[:-1])
            # In a thread: SQLite and the embedder block.
            prompt = await asyncio.to_thread(self._documents.prompt, question, history)
        except Phi3Error as error:
            raise in_framework(error) from error
        if not prompt["text"]:
            if context.stream:

                async def refusal() -> AsyncIterator[ChatResponseUpdate]:
                    text = [Content.from_text(NOT_IN_DOCUMENTS)]
                    yield ChatResponseUpdate(contents=text, role="assistant", finish_reason="stop")

                context.result = _stream(refusal())
            else:
                context.result = ChatResponse(
                    messages=[Message("assistant", [NOT_IN_DOCUMENTS])], finish_reason="stop"
                )
            return
        # The last message alone: the earlier turns were answered from other passages, which would
        # cost a 4k model its context.
        context.messages = [*context.messages[:-1], Message("user", [prompt["text"]])]
        await call_next()
        hits = hits_of(prompt["passages"])
        if isinstance(context.result, ResponseStream):
            context.result = _stream(_with_note(context.result, hits))
        elif context.result is not None:
            answer = answer_text(context.result.messages)
            context.result.messages = [Message("assistant", [answer + sources_note(answer, hits)])]


def create_agent(
    client: Phi3ChatClient | None = None,
    *,
    name: str = "phi3",
    instructions: str | None = None,
    conversations: Conversations | None = None,
    documents: Documents | None = None,
    **options: Any,
) -> Agent[Any]:
    """An agent that sends what the chat flow sends. `options` replace the flow's defaults.

    With `conversations` a session's turns are kept there; without, a run knows only the messages it
    is given. With `documents` it answers as the flow `phi3_rag_chat` does.
    """
    return Agent(
        client=client or Phi3ChatClient(),
        name=name,
        description="Phi-3, tuned on your own chats",
        instructions=instructions,
        default_options={**DEFAULTS, **options},
        # Without one, an agent of the framework would keep a history in memory itself.
        context_providers=[TurnsProvider(conversations)] if conversations else None,
        middleware=[Grounding(documents)] if documents else None,
    )


async def _with_note(
    updates: ResponseStream[ChatResponseUpdate, ChatResponse[Any]], hits: list[Hit]
) -> AsyncIterator[ChatResponseUpdate]:
    answer = ""
    async for update in updates:
        answer += update.text
        yield update
    note = sources_note(answer, hits)
    if note:
        yield ChatResponseUpdate(contents=[Content.from_text(note)], role="assistant")


def _stream(
    updates: AsyncIterator[ChatResponseUpdate],
) -> ResponseStream[ChatResponseUpdate, ChatResponse[Any]]:
    return ResponseStream(updates, finalizer=ChatResponse.from_updates)
