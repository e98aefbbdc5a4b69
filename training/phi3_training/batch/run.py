"""One batch: every line that has no answer is asked, each outcome is kept at once and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from phi3_tool import AuthenticationError, ConfigurationError, EndpointNotFoundError

from ..errors import StageError
from .answers import Answers
from .asking import Ask, ask_all
from .lines import Line

# After these no other line would fare better: the rest is not asked.
HOPELESS = (AuthenticationError, EndpointNotFoundError, ConfigurationError)
FAILED_IN_A_ROW = 50


@dataclass
class Tally:
    """How a batch ended."""

    lines: int
    kept: int = 0
    answered: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    stopped_by: str = ""

    @property
    def failed(self) -> int:
        """Lines that have an error in place of an answer."""
        return sum(self.failures.values())

    @property
    def missing(self) -> int:
        """Lines that were not asked, because the batch was stopped."""
        return self.lines - self.kept - self.answered - self.failed


def run_batch(
    ask: Ask,
    lines: Sequence[Line],
    answers: Answers,
    *,
    concurrency: int,
    details: bool = False,
    step: Callable[[int, int, str], None] = lambda _done, _of, _text: None,
) -> Tally:
    """Ask every line that has no answer yet; each outcome is kept at once."""
    left = [line for line in lines if not answers.has(line)]
    tally = Tally(len(lines), kept=len(lines) - len(left))
    in_a_row, started = 0, time.monotonic()
    outcomes = ask_all(ask, left, concurrency)
    try:
        for outcome in outcomes:
            answers.add(outcome.row(details))
            if outcome.error is None:
                tally.answered, in_a_row = tally.answered + 1, 0
            else:
                kind = type(outcome.error).__name__
                tally.failures[kind] = tally.failures.get(kind, 0) + 1
                in_a_row += 1
                if isinstance(outcome.error, HOPELESS) or in_a_row >= FAILED_IN_A_ROW:
                    tally.stopped_by = f"{kind}: {outcome.error}"
                    break
            rate = (tally.answered + tally.failed) / max(1e-9, time.monotonic() - started)
            done = tally.kept + tally.answered + tally.failed
            step(done, tally.lines, f"{done}/{tally.lines}, {rate:.0f}/s, {tally.failed} failed")
    finally:
        outcomes.close()
        answers.close()
    return tally


def verdict(tally: Tally, again: str) -> None:
    """StageError where a line has no answer: how many, why, and what does them again."""
    if not tally.failed and not tally.missing:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.failures.items()))
    said = f"{tally.failed} of {tally.lines} lines failed ({kinds})"
    if tally.stopped_by:
        said += f" and {tally.missing} were not asked, because none would fare better:\n"
        said += f"  {tally.stopped_by}\n"
    else:
        said += "; each has its error in the file.\n"
    raise StageError(f"{said}Ask them again, and only them, with: {again}")
