"""phi3_tool.promptflow_fixes: a missing question is never asked as the text "None"."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi3_tool.errors import RequestRejectedError
from phi3_tool.promptflow_fixes import (
    fault_of_request,
    refuse_what_lacks_a_question,
    without_empty_cells,
)
from phi3_tool.wire import to_messages

ROOT = Path(__file__).parents[3]


def definition(kind: str, default: object = None, chat: bool = False) -> SimpleNamespace:
    """An input as Prompt flow defines it."""
    return SimpleNamespace(
        type=SimpleNamespace(value=kind), default=default, is_chat_input=chat, is_chat_history=False
    )


INPUTS = {
    "input_data": definition("string", chat=True),
    "chat_history": definition("list", []),
    "system_prompt": definition("string", ""),
    "temperature": definition("double", 0.0),
}


@pytest.mark.parametrize("empty", [None, math.nan])
def test_an_empty_cell_is_the_default_or_a_missing_question(empty: object) -> None:
    row = dict.fromkeys(INPUTS, empty)
    filled = {"input_data": None, "chat_history": [], "system_prompt": "", "temperature": 0.0}
    assert without_empty_cells(INPUTS, row) == filled


def test_texts_stay_as_typed_and_empty_cells_of_csv_are_no_numbers() -> None:
    row = {"input_data": "None", "chat_history": "", "system_prompt": "", "temperature": ""}
    filled = {"input_data": "None", "chat_history": [], "system_prompt": "", "temperature": 0.0}
    assert without_empty_cells(INPUTS, row) == filled
    assert without_empty_cells(INPUTS, {"input_data": "nan"}) == {"input_data": "nan"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"question": "Hi?"}, "lacks the input 'input_data': it has only 'question'"),
        ({}, "it has no inputs at all"),
        ({"input_data": None}, "must be the question as text; the request has None"),
        ([1], "Expected a JSON object"),
        ({"input_data": "None"}, ""),
    ],
)
def test_a_request_without_the_question_is_reported(data: object, said: str) -> None:
    fault = fault_of_request(INPUTS, data)
    assert said in fault
    assert bool(said) == bool(fault)


def test_a_question_with_a_default_of_its_own_may_be_left_out() -> None:
    inputs = {"ask": definition("string", "Who founded Microsoft?", chat=True)}
    assert fault_of_request(inputs, {}) == ""


@pytest.mark.parametrize("flow", ["phi3_chat", "phi3_chat_package", "phi3_rag_chat"])
@pytest.mark.parametrize("question", [None, math.nan])
def test_prompt_flows_own_check_hands_on_what_is_missing(flow: str, question: object) -> None:
    executor = pytest.importorskip("promptflow.executor.flow_validator")
    contracts = pytest.importorskip("promptflow.contracts.flow")
    refuse_what_lacks_a_question()
    refuse_what_lacks_a_question()  # twice is once
    loaded: Any = contracts.Flow.from_yaml(ROOT / "flows" / flow / "flow.dag.yaml")
    row = {**{name: about.default for name, about in loaded.inputs.items()}, "input_data": question}
    check = executor.FlowValidator.ensure_flow_inputs_type
    assert check(flow=loaded, inputs=row, idx=3) == {**row, "input_data": None}
    assert check(flow=loaded, inputs={**row, "input_data": "None"})["input_data"] == "None"
    with pytest.raises(executor.InputNotFound, match="input_data"):
        check(flow=loaded, inputs={}, idx=3)


def test_a_null_question_is_reported_by_name() -> None:
    with pytest.raises(RequestRejectedError, match="input_data is null or missing"):
        to_messages([], None)
