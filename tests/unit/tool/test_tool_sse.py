"""phi3_tool.wire: events come out the same wherever the network cuts the bytes."""

from __future__ import annotations

import pytest

from phi3_tool import UnreadableAnswerError
from phi3_tool.wire import MAX_LINE, Event, read_events, read_lines, read_pieces

STREAM = (
    ": hello\r\n\r\nevent: x\r\ndata: one\r\ndata:two\r\n\r\n"
    'data: {"choices": [{"delta": {"content": "Grüße 你好🙂"}}]}\n\ndata: [DONE]\n\n'
).encode()
EVENTS = [
    Event("x", "one\ntwo"),
    Event("message", '{"choices": [{"delta": {"content": "Grüße 你好🙂"}}]}'),
    Event("message", "[DONE]"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_cut_anywhere(size: int) -> None:
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert list(read_events(read_lines(pieces))) == EVENTS


def test_pieces_after_done_are_not_waited_for() -> None:
    def endless():
        yield from EVENTS[1:]
        raise AssertionError("read on after [DONE]")

    assert list(read_pieces(endless())) == ["Grüße 你好🙂"]


def test_an_endless_line_is_refused() -> None:
    with pytest.raises(UnreadableAnswerError):
        list(read_lines([b"x" * (MAX_LINE // 2)] * 3))
