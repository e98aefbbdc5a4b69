"""The base model's answers, kept so that a second tuning of the same base does not ask it again.

Reads and writes run/evaluate/base-answers.json: whole or not at all, and only for exactly the same
weights, questions and settings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..run import Run, write_atomically
from .rows import Answered, AnswerLoss, Said

PATH = "evaluate/base-answers.json"


def remembered(run: Run, key: str | None) -> list[Answered] | None:
    """The answers that were kept under `key`; None where there are none."""
    if key is None:
        return None
    try:
        kept = json.loads((run.path / PATH).read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        return [_answered(one["said"], one["loss"]) for one in kept["answers"]]
    except (OSError, ValueError, TypeError, KeyError):  # nothing, or of another version
        return None


def remember(run: Run, key: str | None, answers: Sequence[Answered]) -> None:
    """Keep the answers under `key`, in place of what was kept before."""
    if key is not None:
        kept = {"key": key, "answers": [asdict(one) for one in answers]}
        write_atomically(run.path / PATH, json.dumps(kept, ensure_ascii=False))


def _answered(said: dict[str, Any] | None, loss: dict[str, Any] | None) -> Answered:
    return Answered(
        Said(**said) if said is not None else None,
        AnswerLoss(**loss) if loss is not None else None,
    )
