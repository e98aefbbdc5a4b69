"""Thousands of lines asked at once: bounded, resumable, each answer kept as it comes."""

from __future__ import annotations

from .answers import Answers, asked_of
from .asking import Outcome, Pace, ask_all, asker
from .lines import Line, read_lines
from .run import Tally, run_batch, verdict

__all__ = [
    "Answers",
    "Line",
    "Outcome",
    "Pace",
    "Tally",
    "ask_all",
    "asked_of",
    "asker",
    "read_lines",
    "run_batch",
    "verdict",
]
