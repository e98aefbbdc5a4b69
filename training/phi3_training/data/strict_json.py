"""JSON of one line, read strictly: repeated keys, NaN and Infinity are problems, not values."""

from __future__ import annotations

import json
from typing import Any

from .faults import Problem

_NEAR = 24


class StrictJson:
    """A decoder to be used for many lines; `read` gives the value and all its problems."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant
        )

    def read(self, text: str) -> tuple[Any, list[Problem]]:
        """The value of a line; it is None when the line is not JSON."""
        self._problems = []
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            return None, [_broken(text, error)]
        except RecursionError:
            return None, [_unreadable("its brackets are nested too deeply")]
        except ValueError:  # an integer with more digits than Python converts
            return None, [_unreadable("it holds a number with thousands of digits")]
        return value, self._problems

    def read_at(self, text: str, place: int) -> tuple[Any, list[Problem], int | None]:
        """The value that starts at a place, and where it ends; None where there is none whole."""
        self._problems = []
        try:
            value, end = self._decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            return None, [_broken(text, error)], None
        except RecursionError:
            return None, [_unreadable("its brackets are nested too deeply")], None
        except ValueError:  # an integer with more digits than Python converts
            return None, [_unreadable("it holds a number with thousands of digits")], None
        return value, self._problems, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._problems.append(_repeated(key))
                seen.add(key)
        return value

    def _constant(self, name: str) -> None:
        self._problems.append(
            Problem(
                "not-a-number", f"{name} is not a JSON value", "write null or leave the key out"
            )
        )


def _repeated(key: str) -> Problem:
    return Problem(
        "repeated-key",
        f"the key {key!r} occurs twice in one object",
        "keep one of them: which one counts is left to chance",
    )


def _broken(text: str, error: json.JSONDecodeError) -> Problem:
    near = text[max(error.pos - _NEAR // 2, 0) : error.pos + _NEAR // 2]
    where = f"near {near!r}" if error.pos < len(text) else "at the end of the line"
    return Problem(
        "broken-json",
        f"broken JSON {where} ({error.msg})",
        "write one whole JSON object on one line, with double quotes",
        error.colno,
    )


def _unreadable(why: str) -> Problem:
    return Problem(
        "broken-json", f"JSON that cannot be read: {why}", 'write {"messages": […]} as plain JSON'
    )
