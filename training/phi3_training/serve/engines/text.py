"""Ends an answer at a stop string, also where the string spans several tokens.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopCutter:
    """Lets text through up to the first stop string; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to send; sets `hit` at a stop string."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.hit = True
            return self._release(min(found))
        return self._release(len(self._held) - self._unsure())

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.hit else self._release(len(self._held))

    def _release(self, length: int) -> str:
        safe, self._held = self._held[:length], self._held[length:]
        return safe

    def _unsure(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if self._held.endswith(tuple(s[:size] for s in self._stops if len(s) > size)):
                return size
        return 0
