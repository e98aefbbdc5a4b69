"""One finding of the doctor: what was checked, the result, and the fix."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace


class State(enum.Enum):
    """The result of a check. Only a fault makes `phi3 doctor` fail."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    group: str
    check: str
    state: State
    said: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return {**self.__dict__, "state": self.state.value}

    def changed(self, scrub: Callable[[str], str]) -> Finding:
        """The same finding with its words gone through `scrub`, each on one line."""
        said, fix = (" ".join(scrub(text).split()) for text in (self.said, self.fix))
        return replace(self, said=said, fix=fix)


class Group:
    """Makes the findings of one group."""

    def __init__(self, name: str) -> None:
        self._name = name

    def ok(self, check: str, said: str) -> Finding:
        """It is as it should be."""
        return Finding(self._name, check, State.OK, said)

    def warning(self, check: str, said: str, fix: str) -> Finding:
        """It works, but not as well as it could."""
        return Finding(self._name, check, State.WARNING, said, fix)

    def fault(self, check: str, said: str, fix: str) -> Finding:
        """It does not work."""
        return Finding(self._name, check, State.FAULT, said, fix)

    def skipped(self, check: str, why: str, fix: str = "") -> Finding:
        """It was not checked, and why."""
        return Finding(self._name, check, State.SKIPPED, why, fix)
