"""Streamed answers in Prompt flow's terminal loop, and nothing else touched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from phi3_tool.promptflow_fixes import print_pieces_as_they_come

LOOP = "promptflow._sdk._orchestrator.test_submitter"


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for Prompt flow's loop that notes what reaches its own functions."""
    module: Any = ModuleType(LOOP)
    module.reached = []

    def print_chat_output(output: object, generator_record: Any, *, generator_key: str) -> None:
        module.reached.append(("show", output, generator_key))

    def resolve_generator(flow_result: Any, generator_record: Any) -> Any:
        module.reached.append(("settle", flow_result.output))
        return flow_result

    module.print_chat_output, module.resolve_generator = print_chat_output, resolve_generator
    monkeypatch.setitem(sys.modules, LOOP, module)
    return module


def test_without_that_loop_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, LOOP, raising=False)
    print_pieces_as_they_come()
    assert LOOP not in sys.modules


def test_another_form_of_the_loop_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType(LOOP)
    monkeypatch.setitem(sys.modules, LOOP, other)
    before = dict(vars(other))
    print_pieces_as_they_come()
    assert vars(other) == before


def test_each_piece_is_shown_before_the_next_is_made(
    loop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []

    def pieces() -> Iterator[str]:
        for piece in ("one ", "two"):
            shown.append(capsys.readouterr().out)
            yield piece

    print_pieces_as_they_come()
    record: dict[str, Any] = {}
    loop.print_chat_output(pieces(), record, generator_key="run.outputs.answer")
    assert [*shown, capsys.readouterr().out] == ["", "one ", "two\n"]
    assert record == {"run.outputs.answer": ["one ", "two"]}
    assert loop.reached == []


def test_the_text_takes_the_place_of_what_was_read(loop: Any) -> None:
    print_pieces_as_they_come()
    spent = iter(())
    run = SimpleNamespace(output={"answer": spent}, result={"answer": spent})
    result = SimpleNamespace(run_info=run, output={"answer": spent, "other": "text"})
    assert loop.resolve_generator(result, {"run.outputs.answer": ["one ", "two"]}) is result
    assert result.output == {"answer": "one two", "other": "text"}
    assert run.output == run.result == {"answer": "one two"}
    assert loop.reached == [("settle", result.output)]


def test_plain_text_goes_prompt_flows_own_way(loop: Any) -> None:
    print_pieces_as_they_come()
    once = loop.print_chat_output
    print_pieces_as_they_come()
    assert loop.print_chat_output is once
    loop.print_chat_output("text", {}, generator_key="run.outputs.answer")
    assert loop.reached == [("show", "text", "run.outputs.answer")]
