"""Translates the parameters of a `/score` request to a `Sampling`, as the Azure images do.

The `loi` image translates names and drops what it does not know; the `fms` image hands them to an
OpenAI-style engine unchanged, so that `max_new_tokens` and `do_sample` do nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .engines.base import InvalidPromptError, Sampling

# Weakest first: each later name overwrites the ones before.
_LENGTH_NAMES = {"loi": ("max_tokens", "max_new_tokens", "max_gen_len"), "fms": ("max_tokens",)}


class BadParameterError(InvalidPromptError):
    """A parameter has a value that it cannot have."""


class _Known(BaseModel):
    model_config = ConfigDict(extra="ignore")

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)


def score_sampling(parameters: Mapping[str, Any], dialect: str, default_length: int) -> Sampling:
    """The sampling that `parameters` ask for; BadParameterError for a value that cannot be."""
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in _LENGTH_NAMES[dialect]:
        if name in given:
            given["max_tokens"] = given[name]
    if dialect == "loi":
        _translate(given)
    try:
        known = _Known.model_validate(given)
    except ValidationError as error:
        faults = [f"{e['loc'][0]}: {e['msg']}" for e in error.errors(include_input=False)]
        raise BadParameterError(f"bad parameters: {'; '.join(faults)}") from None
    stop = [known.stop] if isinstance(known.stop, str) else known.stop or []
    return Sampling(
        max_new_tokens=known.max_tokens or default_length,
        temperature=known.temperature,
        top_p=known.top_p,
        top_k=None if known.top_k is None else max(0, known.top_k),
        presence_penalty=known.presence_penalty,
        frequency_penalty=known.frequency_penalty,
        stop=tuple(stop),
        stop_token_ids=tuple(known.stop_token_ids or ()),
        ignore_eos=known.ignore_eos,
        seed=known.seed,
    )


def _translate(given: dict[str, Any]) -> None:
    if given.get("do_sample") is False:
        given["temperature"] = 0.0
    eos = given.get("eos_token_id")
    if eos is not None and "stop_token_ids" not in given:
        given["stop_token_ids"] = eos if isinstance(eos, list) else [eos]
