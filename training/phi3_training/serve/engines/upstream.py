"""The `upstream` engine: any server with OpenAI's chat API (vLLM, Ollama, Foundry Local, …).

Reads and writes the other server's `/chat/completions`; its key comes from PHI3_UPSTREAM_KEY.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx

from .base import (
    Chunk,
    EngineError,
    FinishReason,
    Message,
    Sampling,
    StopCutter,
    UpstreamError,
    UpstreamRefusalError,
)

logger = logging.getLogger(__name__)

_ROUTE = "/chat/completions"
_CONNECT_SECONDS = 5.0
# Ends of a turn that some servers show as text (Phi-3's and ChatML's): they end the answer here.
_TURN_ENDS = ("<|end|>", "<|endoftext|>", "<|im_end|>")


class Upstream:
    """Passes conversations on and streams the answers back; see `base.Engine`."""

    name = "upstream"
    context_length = 0

    def __init__(
        self,
        url: str,
        model: str | None,
        key: str | None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        # With or without the route: base URLs are written in both ways.
        self._url = url.rstrip("/").removesuffix(_ROUTE) + _ROUTE
        self._model = model
        self.active = 0
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # No read limit of its own: the request timeout of the endpoint ends a slow answer.
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport)

    async def stream(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]:
        """The other server's answer in its own chunks."""
        asked = {
            "model": self._model or "default",
            # An empty system prompt is no turn; the other server's template would write one.
            "messages": [
                {"role": m["role"], "content": m["content"]}
                for m in messages
                if m["role"] != "system" or m["content"].strip()
            ],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "presence_penalty": sampling.presence_penalty or None,
            "frequency_penalty": sampling.frequency_penalty or None,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
            "ignore_eos": sampling.ignore_eos or None,
            "seed": sampling.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = {name: value for name, value in asked.items() if value is not None}
        reading, cutter = _Reading(), StopCutter(_TURN_ENDS)
        self.active += 1
        try:
            async with self._client.stream("POST", self._url, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response, self._url)
                # httpx joins lines that were cut between two reads.
                async for line in response.aiter_lines():
                    arrived = reading.take(line)
                    if arrived and cutter.hit:  # the usage often comes after it, more text never
                        break
                    text = cutter.push(arrived)
                    if text:
                        yield Chunk(text, None, reading.prompt_tokens, reading.completion_tokens)
            yield reading.last(cutter.flush(), ended=cutter.hit)
        except httpx.HTTPError as error:
            raise UpstreamError(
                f"The server behind this endpoint cannot be reached or closed the connection "
                f"({type(error).__name__}); check that it runs and that serve.upstream_url is right"
            ) from None
        finally:
            self.active -= 1

    async def close(self) -> None:
        """Close the connections to the other server."""
        await self._client.aclose()


class _Reading:
    """What has been read of one answer's events."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._reason: str | None = None
        self._counted = False

    def take(self, line: str) -> str:
        """The text in one line of the event stream; raises UpstreamError for an error event."""
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            return ""
        try:
            event = json.loads(data)
        except ValueError:
            raise UpstreamError(
                "The server behind this endpoint sent an unreadable event"
            ) from None
        if not isinstance(event, dict) or "error" in event:
            raise UpstreamError("The server behind this endpoint reported an error in its stream")
        usage = event.get("usage")
        if isinstance(usage, Mapping):
            self._counted = True
            self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.completion_tokens = int(usage.get("completion_tokens") or 0)
        # The last event of usage has an empty list of choices.
        choice: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
        self._reason = choice.get("finish_reason") or self._reason
        text = str((choice.get("delta") or {}).get("content") or "")
        # Servers that send no usage: a piece of text is nearly always one token.
        if text and not self._counted:
            self.completion_tokens += 1
        return text

    def last(self, text: str, *, ended: bool) -> Chunk:
        """The closing chunk; an answer that was never finished is an error.

        `text` is what is left of the answer, `ended` whether it showed the end of its turn.
        """
        if self._reason is None and not ended:
            raise UpstreamError("The server behind this endpoint ended its answer half-way")
        reason: FinishReason = "length" if self._reason == "length" and not ended else "stop"
        return Chunk(text, reason, self.prompt_tokens, self.completion_tokens)


def _refusal(response: httpx.Response, url: str) -> EngineError:
    """What an answer other than 200 means for our caller."""
    status = response.status_code
    # In its own words: the fault is the caller's, and only the server knows which.
    if status in (400, 413, 422):
        try:
            error = response.json()["error"]
            said = str(error["message"] if isinstance(error, dict) else error)[:500]
        except (ValueError, KeyError, TypeError):
            said = f"status {status}"
        return UpstreamRefusalError(f"The server behind this endpoint refused: {said}")
    if status in (401, 403):
        return UpstreamError(
            f"The server behind this endpoint refuses its key ({status}); set PHI3_UPSTREAM_KEY"
        )
    if status == 404:
        return UpstreamError(
            f"The server behind this endpoint has no such model or no {_ROUTE}; "
            "check serve.upstream_url and serve.upstream_model"
        )
    if status in (429, 503):
        return UpstreamError(f"The server behind this endpoint is busy ({status})", 503)
    logger.warning("%s answered %d", httpx.URL(url).host, status)
    return UpstreamError(f"The server behind this endpoint failed ({status})")
