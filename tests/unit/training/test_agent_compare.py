"""What counts as a difference between Prompt flow and the agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_tool.errors import ModelError, Phi3Error
from phi3_training.agent.golden import golden_rows, own_rows
from phi3_training.agent.parity import compared
from phi3_training.agent.recorder import Recorder, Reply, Request, first_difference
from phi3_training.agent.worker import Outcome
from phi3_training.errors import UsageError

REQUEST = Request("score", {"authorization": "Bearer k", "accept": "a"}, b'{"temperature": 0.0}')
ANSWER = Outcome("Hi")


def difference(ours: Any, theirs: Any, flow: Any = ANSWER, agent: Any = ANSWER) -> str:
    return compared("row", (ours, theirs), (flow, agent)).difference


def test_the_same_is_the_same() -> None:
    found = compared("row", ([REQUEST], [REQUEST]), (ANSWER, Outcome("Hi", seconds=3)))
    assert found.difference == ""
    assert found.said == "1 request, same bytes; same answer"


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (Request("v1/chat/completions", REQUEST.headers, REQUEST.body), "path"),
        (Request("score", {**REQUEST.headers, "accept": "b"}, REQUEST.body), "header accept"),
        (Request("score", REQUEST.headers, b'{"temperature": 0}'), "at 17"),
        (Request("score", REQUEST.headers, REQUEST.body + b" "), "at 20"),
    ],
)
def test_a_different_request_is_shown_where_it_differs(other: Request, shown: str) -> None:
    assert f"request 2: {shown}" in difference([REQUEST, REQUEST], [REQUEST, other])


def test_a_different_key_is_named_and_not_shown() -> None:
    other = Request("score", {**REQUEST.headers, "authorization": "Bearer secret"}, REQUEST.body)
    assert difference([REQUEST], [other]) == "request 1: header authorization"


@pytest.mark.parametrize(
    ("flow", "agent", "shown"),
    [
        (None, ANSWER, "no outcome from Prompt flow"),
        (ANSWER, None, "no outcome from the agent"),
        (ANSWER, Outcome("Hi "), "answer at 2"),
        (Outcome(["a"]), Outcome(["b"]), "answer at"),
        (ANSWER, Outcome(error=ModelError("x").facts()), "an answer and ModelError: x"),
        (
            Outcome(error=ModelError("x", status=424).facts()),
            Outcome(error=ModelError("x", status=500).facts()),
            "error status",
        ),
        (
            Outcome(error=ModelError("x").facts()),
            Outcome(error=Phi3Error("x").facts()),
            "error kind",
        ),
    ],
)
def test_different_outcomes(flow: Any, agent: Any, shown: str) -> None:
    assert shown in difference([REQUEST], [REQUEST], flow, agent)


def test_a_missing_request_is_a_difference() -> None:
    assert difference([REQUEST, REQUEST], [REQUEST]) == "2 and 1 requests"


def test_what_is_drawn_for_each_request_is_no_difference() -> None:
    def error(number: int, side: str) -> Outcome:
        message = f"No connection to http://127.0.0.1:{number}/{side}/1/score"
        return Outcome(error=Phi3Error(message, request_id=str(number)).facts())

    assert difference([], [], error(1, "promptflow"), error(2, "agent")) == ""


def test_an_error_travels_between_processes() -> None:
    error = ModelError(
        "x", status=424, inner_status=500, reason="r", request_id="i", deployment="d", attempts=3
    )
    again = Outcome.read({"id": "1", "error": error.facts()}).failure()
    assert type(again) is ModelError
    assert str(again) == str(error)
    assert again.facts() == error.facts()
    assert type(Phi3Error.from_facts({"kind": "ZeroDivisionError", "message": "m"})) is Phi3Error


def test_the_recorder_follows_the_script_of_a_row() -> None:
    first, second = Reply(429), Reply(text="x")
    recorder = Recorder({"1": [first, second]})
    assert [recorder.take("agent", "1", REQUEST) for _ in range(3)] == [first, second, second]
    assert recorder.take("promptflow", "1", REQUEST) == first
    assert recorder.take("agent", "2", REQUEST) == Reply()
    assert len(recorder.requests("agent", "1")) == 3


def test_first_difference_is_quoted_with_a_little_around_it() -> None:
    shown = first_difference("x" * 100 + "a" + "y" * 100, "x" * 100 + "b" + "y" * 100)
    assert shown.startswith("at 100: ")
    assert len(shown) < 200


def test_golden_rows_cover_what_has_gone_wrong() -> None:
    rows = golden_rows()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.flow for row in rows} == {"chat", "rag"}
    assert {row.stream for row in rows} == {True, False}
    statuses = {reply.status for row in rows for reply in row.replies}
    assert {401, 404, 424, 429, 500} <= statuses


def test_own_rows_are_asked_both_ways(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "Hi", "temperature": 1, "x": 2}\n', encoding="utf-8")
    whole, streamed = own_rows(data)
    assert whole.inputs == streamed.inputs == {"input_data": "Hi", "temperature": 1}
    assert (whole.stream, streamed.stream) == (False, True)
    data.write_text('{"x": 2}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="input_data"):
        own_rows(data)
