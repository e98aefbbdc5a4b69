"""Phi3ChatClient: phi3_tool's client as a chat client of Agent Framework.

Retries, deadlines and the wire are phi3_tool's. What the framework adds to a call and the endpoint
cannot take (tools, response formats, images) is refused by name, never silently dropped.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

from agent_framework import (
    BaseChatClient,
    ChatMiddlewareLayer,
    ChatOptions,
    ChatResponse,
    ChatResponseUpdate,
    Content,
    FunctionInvocationLayer,
    Message,
    UsageDetails,
)
from agent_framework.exceptions import (
    ChatClientException,
    ChatClientInvalidAuthException,
    ChatClientInvalidRequestException,
    ChatClientInvalidResponseException,
)
from agent_framework.observability import ChatTelemetryLayer

from phi3_tool.client import ChatReply, client_for
from phi3_tool.connection import ConnectionSettings, settings_of
from phi3_tool.errors import (
    AuthenticationError,
    ConfigurationError,
    EndpointNotFoundError,
    ModelError,
    Phi3Error,
    RequestRejectedError,
    UnreadableAnswerError,
)
from phi3_tool.wire import budget, fit

#: The flow's own default of max_new_tokens; what it leaves of the context is the history's.
MAX_NEW_TOKENS = 256
#: asyncio's own pool has cpu + 4 threads: 32 questions at once would wait for each other.
THREADS = 128

# The framework's name of each option that is sent, and the endpoint's; in the flow's order, since
# the request's bytes follow it.
_SENT = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_new_tokens",
    "stop": "stop",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "do_sample": "do_sample",
}
# Options that would change the answer, but that no Phi-3 endpoint knows.
_REFUSED = ("tools", "response_format", "logit_bias", "reasoning")

# The first that fits, so the base class is last.
_MAPPED: tuple[tuple[type[Phi3Error], type[ChatClientException]], ...] = (
    (AuthenticationError, ChatClientInvalidAuthException),
    (RequestRejectedError, ChatClientInvalidRequestException),
    (ConfigurationError, ChatClientInvalidRequestException),
    (EndpointNotFoundError, ChatClientInvalidRequestException),
    (ModelError, ChatClientInvalidResponseException),
    (UnreadableAnswerError, ChatClientInvalidResponseException),
    # Throttled, timed out, out of service: the request may well succeed later.
    (Phi3Error, ChatClientException),
)

# One for all clients of the process; a thread is made when it is first needed.
_POOL = ThreadPoolExecutor(THREADS, thread_name_prefix="phi3-agent")


class Phi3ChatOptions(ChatOptions[None], total=False):
    """The framework's options, and greedy decoding by name."""

    do_sample: bool


def in_framework(error: Phi3Error) -> ChatClientException:
    """The framework's exception for an error of phi3_tool; `phi3_error` finds the error again."""
    kind = next(theirs for ours, theirs in _MAPPED if isinstance(error, ours))
    # Not as `inner_exception`: str() would then show a tuple of both.
    mapped = kind(str(error), log_level=None)
    mapped.__cause__ = error.with_traceback(None)
    return mapped


def phi3_error(error: BaseException | None) -> Phi3Error | None:
    """The phi3_tool error that an exception of the framework came from, if it came from one."""
    while error is not None:
        if isinstance(error, Phi3Error):
            return error
        error = error.__cause__
    return None


def text_of(message: Message) -> str:
    """A message's text; raises RequestRejectedError where it holds anything else."""
    # Not `message.text`, which joins the parts with a space.
    # Named once each: a message with three images is one fault.
    other = sorted({content.type for content in message.contents if content.type != "text"})
    if other:
        raise RequestRejectedError(
            f"A {message.role} message holds {', '.join(other)}: a Phi-3 endpoint takes text only"
        )
    return "".join(content.text or "" for content in message.contents)


def answer_text(messages: Sequence[Message]) -> str:
    """The text of a response's messages, with its white space."""
    # `ChatResponse.text` strips it.
    return "".join(
        content.text or ""
        for message in messages
        for content in message.contents
        if content.type == "text"
    )


def role_messages(messages: Sequence[Message], instructions: object = None) -> list[dict[str, str]]:
    """The framework's messages as the endpoint takes them, instructions first.

    Instructions and system messages that come first are one system message, as Phi-3's template
    has one; blank ones are left out.
    """
    given = [instructions] if isinstance(instructions, str) else list(instructions or ())  # type: ignore[call-overload]
    sent = [{"role": str(message.role), "content": text_of(message)} for message in messages]
    first = next((i for i, message in enumerate(sent) if message["role"] != "system"), len(sent))
    system = [text for text in (*given, *(m["content"] for m in sent[:first])) if text.strip()]
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return head + sent[first:]


def parameters_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the request; raises RequestRejectedError for what no endpoint knows."""
    # All of them in one error, so that one correction is enough.
    refused = [name for name in _REFUSED if options.get(name)]
    # The framework always says "auto"; without tools that asks for nothing.
    choice = options.get("tool_choice")
    mode = choice.get("mode") if isinstance(choice, Mapping) else choice
    if mode not in (None, "auto", "none"):
        refused.append("tool_choice")
    if refused:
        raise RequestRejectedError(
            f"A Phi-3 endpoint cannot take {' and '.join(refused)}: remove it from the agent's "
            "options, and call functions in the workflow around the agent"
        )
    return {
        theirs: options[ours] for ours, theirs in _SENT.items() if options.get(ours) is not None
    }


class RawPhi3ChatClient(BaseChatClient[Phi3ChatOptions]):
    """The client without the framework's layers. `connection` as ConnectionSettings takes it.

    Without one, PHI3_ENDPOINT and PHI3_KEY are used (`eval "$(phi3 env)"`); where these are set
    they come first, as in the flows. History beyond the model's context is left out in whole turns.
    """

    OTEL_PROVIDER_NAME = "phi3"

    def __init__(
        self, connection: object = None, *, model: str = "phi-3", max_history_tokens: int = 0
    ) -> None:
        super().__init__()
        try:
            self._settings = settings_of(connection)
        except Phi3Error as error:
            raise in_framework(error) from error
        self._max_history_tokens = max_history_tokens
        self.model = model

    @property
    def settings(self) -> ConnectionSettings:
        """The endpoint that is asked."""
        return self._settings

    def service_url(self) -> str:
        """The endpoint without its query, for traces."""
        return self._settings.endpoint.partition("?")[0]

    def _inner_get_response(
        self,
        *,
        messages: Sequence[Message],
        stream: bool,
        options: Mapping[str, Any],
        **_kwargs: Any,
    ) -> Any:
        # A plain function: the base class's example is `async def`, and cannot stream (1.23:
        # "'coroutine' object has no attribute 'map'"). It returns an awaitable, or a stream.
        if stream:
            return self._build_response_stream(self._updates(messages, options))
        return self._response(messages, options)

    async def _response(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> ChatResponse[Any]:
        def ask() -> ChatReply:
            wire, parameters = self._request(messages, options)
            return client_for(self._settings).chat(wire, **parameters)

        # phi3_tool blocks, so in a thread: one client, with its retries and deadlines, for the flow
        # and the agent alike.
        try:
            reply = await asyncio.get_running_loop().run_in_executor(_POOL, ask)
        except Phi3Error as error:
            raise in_framework(error) from error.with_traceback(None)
        names = {
            "prompt_tokens": "input_token_count",
            "completion_tokens": "output_token_count",
            "total_tokens": "total_token_count",
        }
        # The framework's names; counts that it has no name for are left out.
        usage = {names[name]: count for name, count in reply.usage.items() if name in names}
        facts = {"attempts": reply.attempts, "seconds": reply.seconds}
        return ChatResponse(
            messages=[Message("assistant", [reply.text])],
            response_id=reply.request_id,
            model=reply.model or self.model,
            finish_reason=reply.finish_reason or "stop",  # type: ignore[arg-type]
            usage_details=UsageDetails(**usage) if usage else None,  # type: ignore[typeddict-item]
            additional_properties={**facts, "deployment": reply.deployment},
        )

    async def _updates(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> AsyncIterator[ChatResponseUpdate]:
        """One update per piece; whatever goes wrong is raised in the framework's tree."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        left = threading.Event()  # the reader has gone: no further piece is fetched for it

        def put(item: str | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def read() -> None:
            try:
                wire, parameters = self._request(messages, options)
                with closing(client_for(self._settings).stream(wire, **parameters)) as pieces:
                    for piece in pieces:
                        if left.is_set():
                            return
                        put(piece)
                put(None)
            except Exception as error:  # noqa: BLE001 - raised again below, where it can be seen
                put(error.with_traceback(None) if isinstance(error, Phi3Error) else error)

        loop.run_in_executor(_POOL, read)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Phi3Error):
                    raise in_framework(item)
                if isinstance(item, Exception):
                    raise item
                yield ChatResponseUpdate(
                    contents=[Content.from_text(item)], role="assistant", model=self.model
                )
            yield ChatResponseUpdate(contents=[], role="assistant", finish_reason="stop")
        finally:
            left.set()

    def _request(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Messages that fit, and parameters; raises RequestRejectedError."""
        parameters = parameters_of(options)
        # An agent's instructions come among the options, not as a message: a client that does not
        # look there drops the system prompt.
        wire = role_messages(messages, options.get("instructions"))
        if not wire or not wire[-1]["content"].strip():
            raise RequestRejectedError("The question is empty: type something to ask")
        system = wire[0]["content"] if wire[0]["role"] == "system" else ""
        length = parameters.get("max_new_tokens", MAX_NEW_TOKENS)
        context, question = self._settings.context_length, wire[-1]["content"]
        room = budget(context, question, system, length, self._max_history_tokens)
        return fit(wire, max_tokens=room), parameters


# The framework's layers in this order; without the first one Agent logs a warning.
class Phi3ChatClient(
    FunctionInvocationLayer[Phi3ChatOptions],
    ChatMiddlewareLayer[Phi3ChatOptions],
    ChatTelemetryLayer[Phi3ChatOptions],
    RawPhi3ChatClient,
):
    """A chat client of Agent Framework for a Phi-3 endpoint, with middleware and traces.

    `Phi3ChatClient(connection={"endpoint": …, "key": …})`, or without arguments from PHI3_ENDPOINT
    and PHI3_KEY. Keyword arguments only, as the framework's layers have it.
    """

    OTEL_PROVIDER_NAME = "phi3"
