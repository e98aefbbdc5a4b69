"""`did you mean`: the known name that is closest to a mistyped one. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """`; did you mean 'chat'?`, or nothing where no known name is close to what was typed."""
    from difflib import get_close_matches

    closest = get_close_matches(typed, list(known), n=1)
    return f"; did you mean {closest[0]!r}?" if closest else ""
