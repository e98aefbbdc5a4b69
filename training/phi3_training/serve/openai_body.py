"""The body of a chat completion request: what is known, what is refused, what it asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .engines.base import Sampling

Penalty = Annotated[float, Field(ge=-2, le=2)]
# Standard fields that change nothing here; every OpenAI client may send them.
_HARMLESS = frozenset({"user", "n", "logprobs", "store", "metadata", "service_tier", "seed"})


class TextPart(BaseModel):
    """A piece of a message's content; only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; `developer` is OpenAI's newer name for `system`."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Role and content as the model's chat template knows them."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class StreamOptions(BaseModel):
    """What a stream shall carry beside the text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request; `extra="allow"` keeps unknown fields for `unsupported` to judge."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def conversation(self) -> list[dict[str, str]]:
        """The messages for the engine."""
        return [message.plain() for message in self.messages]

    def sampling(self, default_length: int) -> Sampling:
        """How the answer is to be chosen. Vendor fields of vLLM are understood as well."""
        extra = self.model_extra or {}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or default_length,
            temperature=self.temperature,
            top_p=self.top_p or None,
            top_k=extra["top_k"] if isinstance(extra.get("top_k"), int) else None,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=tuple(stop),
            ignore_eos=extra.get("ignore_eos") is True,
            seed=self.seed,
        )


def unsupported(asked: ChatRequest, extras: str) -> str | None:
    """Why a valid request cannot be served, or None. `extras` is the extra-parameters header."""
    if asked.tools or asked.tool_choice not in (None, "none"):
        return "tools are not supported by this model's endpoint"
    kind = (asked.response_format or {}).get("type", "text")
    if kind != "text":
        return "response_format other than text is not supported by this model's endpoint"
    unknown = sorted(set(asked.model_extra or ()) - _HARMLESS)
    if unknown and extras == "error":
        names = ", ".join(unknown)
        return (
            f"extra parameters are not allowed when extra-parameters is not set or set to "
            f"'error': {names}"
        )
    return None
