"""Workflows that mirror the flows node by node: the same names, inputs, requests and answers.

Build one per request (under half a millisecond): an instance refuses two runs at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from agent_framework import (
    Agent,
    Executor,
    Message,
    Workflow,
    WorkflowBuilder,
    WorkflowContext,
    handler,
)
from typing_extensions import Never

from phi3_tool.errors import Phi3Error
from phi3_tool.grounding import (
    NOT_IN_DOCUMENTS,
    grounded,
    look_up,
    sources_note,
    standalone_question,
)
from phi3_tool.index import Hit, LookupResult, hits_of
from phi3_tool.wire import BROKE_OFF, budget, from_messages, to_messages

from .agent import create_agent
from .client import (
    MAX_NEW_TOKENS,
    Phi3ChatClient,
    answer_text,
    in_framework,
    phi3_error,
    role_messages,
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class FlowInputs:
    """The inputs of flows/phi3_chat, with its names and defaults."""

    input_data: str
    chat_history: list[Any] = field(default_factory=list)
    system_prompt: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class RagInputs(FlowInputs):
    """The inputs of flows/phi3_rag_chat."""

    index: str = ""
    query_type: str = "hybrid"
    top_k: int = 4
    min_score: float = 0.0


@dataclass(frozen=True)
class _Looked:
    """What travels between the nodes of the flow with documents."""

    inputs: RagInputs
    query: str
    passages: list[LookupResult] = field(default_factory=list)


@dataclass(frozen=True)
class _Prompt:
    """What the last node is given: the flow's inputs, the message, the passages in it."""

    inputs: FlowInputs
    text: str
    hits: list[Hit] = field(default_factory=list)


class Inputs(Executor):
    """Takes the flow's inputs, or a question alone."""

    def __init__(self) -> None:
        super().__init__(id="inputs")

    @handler
    async def inputs(self, given: FlowInputs, ctx: WorkflowContext[_Prompt]) -> None:
        """The flow's own inputs."""
        await ctx.send_message(_Prompt(given, given.input_data))

    @handler
    async def question(self, text: str, ctx: WorkflowContext[_Prompt]) -> None:
        """A question without history."""
        await ctx.send_message(_Prompt(FlowInputs(text), text))

    @handler
    async def conversation(self, messages: list[Message], ctx: WorkflowContext[_Prompt]) -> None:
        """The framework's own messages: what DevUI and `as_agent` send."""
        given = _inputs_of(messages)
        await ctx.send_message(_Prompt(given, given.input_data))


class Standalone(Executor):
    """What to look up for the question."""

    def __init__(self) -> None:
        super().__init__(id="standalone")

    @handler
    async def inputs(self, given: RagInputs, ctx: WorkflowContext[_Looked]) -> None:
        """The flow's own inputs."""
        query, _ = await _in_thread(
            lambda: standalone_question(given.input_data, given.chat_history)
        )
        await ctx.send_message(_Looked(given, query))

    @handler
    async def question(self, text: str, ctx: WorkflowContext[_Looked]) -> None:
        """A question without history."""
        await self.inputs(RagInputs(text), ctx)

    @handler
    async def conversation(self, messages: list[Message], ctx: WorkflowContext[_Looked]) -> None:
        """The framework's own messages."""
        given = _inputs_of(messages)
        await self.inputs(RagInputs(given.input_data, given.chat_history), ctx)


class Lookup(Executor):
    """The passages for the query."""

    def __init__(self, folder: Path) -> None:
        super().__init__(id="lookup")
        self._folder = folder

    @handler
    async def look(self, asked: _Looked, ctx: WorkflowContext[_Looked]) -> None:
        """Search the index."""
        given = asked.inputs
        passages = await _in_thread(
            lambda: look_up(
                asked.query,
                given.index,
                self._folder,
                query_type=given.query_type,
                top_k=given.top_k,
            )
        )
        await ctx.send_message(_Looked(given, asked.query, passages))


class BuildPrompt(Executor):
    """The message for the model: instruction, numbered passages that fit, question."""

    def __init__(self) -> None:
        super().__init__(id="build_prompt")

    @handler
    async def build(self, asked: _Looked, ctx: WorkflowContext[_Prompt]) -> None:
        """Leave out what fits badly, number the rest."""
        given = asked.inputs
        prompt = await _in_thread(
            lambda: grounded(given.input_data, asked.passages, given.min_score)
        )
        await ctx.send_message(_Prompt(given, prompt["text"], hits_of(prompt["passages"])))


class Chat(Executor):
    """Asks the endpoint, through an agent without a memory of its own.

    In a streamed run each piece is an output of its own; the pieces joined are the answer.
    """

    def __init__(self, client: Phi3ChatClient, *, documents: bool) -> None:
        super().__init__(id="integrate_with_promptflow")
        self._client = client
        self._agent: Agent[Any] = create_agent(client)  # the history is among the inputs
        self._documents = documents

    @handler
    async def ask(self, prompt: _Prompt, ctx: WorkflowContext[Never, str]) -> None:
        """Yield the answer."""
        # No passage fits: the model would answer from memory, so it is not asked.
        if self._documents and not prompt.text:
            await ctx.yield_output(NOT_IN_DOCUMENTS)
            return
        given = prompt.inputs
        context = self._client.settings.context_length
        room = budget(context, prompt.text, given.system_prompt, given.max_new_tokens)
        sent = await _in_thread(
            lambda: to_messages(
                given.chat_history, prompt.text, given.system_prompt, max_tokens=room
            )
        )
        # Ready-made: the agent's own history would be cut in another way than the flow's.
        messages = [Message(message["role"], [message["content"]]) for message in sent]
        # Prompt flow turns the inputs into the types that the flow declares: `0` and `0.0` are
        # other bytes on the wire.
        options = {
            "temperature": float(given.temperature),
            "top_p": float(given.top_p),
            "max_tokens": int(given.max_new_tokens),
        }
        answer = ""
        if not ctx.is_streaming():
            response = await self._agent.run(messages, options=options)
            answer = answer_text(response.messages)
            await ctx.yield_output(answer + sources_note(answer, prompt.hits))
            return
        try:
            async for update in self._agent.run(messages, stream=True, options=options):
                if update.text:
                    answer += update.text
                    await ctx.yield_output(update.text)
        except Exception as error:
            failure = phi3_error(error)
            if failure is None or not answer:
                raise
            # As the flow ends it: what came is already on somebody's screen.
            answer += f"{BROKE_OFF}{failure}]"
            await ctx.yield_output(f"{BROKE_OFF}{failure}]")
        # After the last piece, as the flow does; `read_turns` takes it off again.
        note = sources_note(answer, prompt.hits)
        if note:
            await ctx.yield_output(note)


def create_workflow(client: Phi3ChatClient | None = None) -> Workflow:
    """The mirror of flows/phi3_chat; give it FlowInputs, a question or messages."""
    inputs, chat = Inputs(), Chat(client or Phi3ChatClient(), documents=False)
    builder = WorkflowBuilder(name="phi3_chat", start_executor=inputs, output_from=[chat])
    return builder.add_edge(inputs, chat).build()


def create_rag_workflow(client: Phi3ChatClient | None = None, folder: Path = Path()) -> Workflow:
    """The mirror of flows/phi3_rag_chat; index.sqlite is looked for in `folder`."""
    standalone, lookup, build = Standalone(), Lookup(folder), BuildPrompt()
    chat = Chat(client or Phi3ChatClient(), documents=True)
    builder = WorkflowBuilder(name="phi3_rag_chat", start_executor=standalone, output_from=[chat])
    return builder.add_chain([standalone, lookup, build, chat]).build()


async def run_flow(workflow: Workflow, inputs: FlowInputs) -> str:
    """The flow's output `answer`; raises the framework's exceptions."""
    result = await workflow.run(inputs)
    return cast(str, result.get_outputs()[0])


async def stream_flow(workflow: Workflow, inputs: FlowInputs) -> AsyncIterator[str]:
    """The same, piece by piece."""
    async for event in workflow.run(inputs, stream=True):
        # Others report each executor's start and end.
        if event.type == "output":
            yield cast(str, event.data)


def _inputs_of(messages: list[Message]) -> FlowInputs:
    """Messages as the flow's inputs: system prompt, history, question."""
    # A turn that was not answered is left out by from_messages, as the flow leaves it out.
    sent = role_messages(messages)
    system = sent.pop(0)["content"] if sent and sent[0]["role"] == "system" else ""
    question = sent.pop()["content"] if sent else ""
    return FlowInputs(question, list(from_messages(sent)), system)


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Run shared code of phi3_tool; its errors leave in the framework's tree."""
    try:
        # SQLite, numpy and requests block; the loop serves other questions meanwhile.
        return await asyncio.to_thread(work)
    except Phi3Error as error:
        raise in_framework(error) from error
