"""The trainer's side: the prompt inside a training row, and the tokens that end its answer.

Reads the folder of the model that was trained from.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import StageError
from ..finetune.rows import encode_rows
from ..prompt import ChatFormat
from .golden import ANSWER, Case
from .report import Difference, Vocabulary

_FORGED = "a message's text became a control token"


@dataclass(frozen=True)
class Trained:
    """One golden conversation as a training row: prompt, whole row, what ends the answer."""

    prompt: list[int]
    row: list[int]
    end: int | None
    refused: str | None = None


def trained(chat: ChatFormat, case: Case, names: Vocabulary) -> Trained:
    """The row that the trainer is given for the conversation and an answer, or its refusal."""
    messages = [*case.messages, {"role": "assistant", "content": ANSWER}]
    try:
        example = encode_rows(chat, [(case.name, messages)])[0].example
    except StageError as error:
        return Trained([], [], None, str(error))
    ids, mask = example.input_ids, example.assistant_mask
    # The answer is the last run of learnt tokens that begins with text; templates may write
    # something unlearnt between the end of the turn and the end of the text.
    begins = [
        i
        for i, learnt in enumerate(mask)
        if learnt and (i == 0 or not mask[i - 1]) and ids[i] not in names.controls
    ]
    start = begins[-1] if begins else len(ids)
    ends = [token for token in ids[start:] if token in names.controls]
    return Trained(ids[:start], ids, ends[0] if ends else None)


def forged(case: Case, ids: list[int], harmless: list[int], names: Vocabulary) -> Difference | None:
    """The control token that came out of a message's text, if one did."""
    has = [(i, token) for i, token in enumerate(ids) if token in names.controls]
    should = [token for token in harmless if token in names.controls]
    if [token for _, token in has] == should:
        return None
    at = next(
        (i for (i, token), wanted in zip(has, should, strict=False) if token != wanted),
        has[len(should)][0] if len(has) > len(should) else len(ids) - 1,
    )
    return Difference(case.name, f"{_FORGED}: {names.text(ids[at])!r} at token {at}")
