"""A flow's inputs as Prompt flow 1.18 takes them, but a missing question is an error.

Prompt flow turns a question that is null, or that a row of the data lacks, into the text "None" or
"nan" and asks the model that; for a wrong name it does not say what was sent. Changes Prompt flow's
modules in the process that loads the flow, and only where it has loaded them; reads no file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

_INVOKER = "promptflow.core._serving.flow_invoker"
_SERVING_ERRORS = "promptflow.core._serving._errors"
_VALIDATOR = "promptflow.executor.flow_validator"
_TEST = "promptflow._sdk._orchestrator.test_submitter"
_CHANGED = "phi3_refuses"


def refuse_what_lacks_a_question() -> None:
    """Let this process refuse a request, a row or a test of the flow without a question's text."""
    _in_the_server()
    _in_the_executor()
    _in_flow_test()


def fault_of_request(inputs: Mapping[str, Any], data: object) -> str:
    """What a request lacks of a flow's inputs (Prompt flow's definitions); empty if nothing."""
    if not isinstance(data, Mapping):
        return f"Expected a JSON object with the inputs {', '.join(inputs)}; got {data!r:.80}"
    missing = [name for name, about in inputs.items() if about.default is None and name not in data]
    if missing:
        sent = f"only {', '.join(map(repr, data))}" if data else "no inputs at all"
        return f"The request lacks the input {', '.join(map(repr, missing))}: it has {sent}"
    for name, about in inputs.items():
        if about.is_chat_input and name in data and not isinstance(data[name], str):
            sent = f"{data[name]!r:.80}"
            return f"The input {name!r} must be the question as text; the request has {sent}"
    return ""


def without_empty_cells(inputs: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the flow's defaults where it has null; None where a text has no default.

    Prompt flow reads data with pandas: null comes as None, a key that other rows have as NaN, and
    an empty cell of a CSV file as "", which is a text but no number or list.
    """
    filled = dict(row)
    for name, about in inputs.items():
        value = filled.get(name)
        is_null = value is None or (isinstance(value, float) and math.isnan(value))
        if name in filled and (is_null or (value == "" and not _is_text(about))):
            filled[name] = about.default
    return filled


def _is_text(about: Any) -> bool:
    return str(getattr(about.type, "value", about.type)) == "string"


def _in_the_server() -> None:
    """Prompt flow answers 400 to the error, with its message."""
    invoker, errors = sys.modules.get(_INVOKER), sys.modules.get(_SERVING_ERRORS)
    if invoker is None or errors is None or hasattr(invoker, _CHANGED):
        return
    before = invoker.validate_request_data

    def validate_request_data(flow: Any, data: object) -> None:
        fault = fault_of_request(flow.inputs, data)
        if fault:
            raise errors.MissingRequiredFlowInput(fault)
        before(flow, data)

    invoker.validate_request_data = validate_request_data  # type: ignore[attr-defined]
    setattr(invoker, _CHANGED, True)


def _in_the_executor() -> None:
    """Every line of `pf run` and every request passes here before its values become texts.

    None is given to the node, which raises: an error raised here would end the whole of `pf run
    create` with a traceback of pandas, because Prompt flow then has no inputs to list.
    """
    module = sys.modules.get(_VALIDATOR)
    validator = getattr(module, "FlowValidator", None)
    if validator is None or hasattr(module, _CHANGED):
        return
    before = validator.ensure_flow_inputs_type

    def ensure_flow_inputs_type(
        flow: Any, inputs: Mapping[str, Any], idx: int | None = None
    ) -> dict[str, Any]:
        filled = without_empty_cells(flow.inputs, inputs)
        texts = [name for name, about in flow.inputs.items() if _is_text(about)]
        null = dict.fromkeys(name for name in texts if filled.get(name, "") is None)
        return {**before(flow, {**filled, **dict.fromkeys(null, "")}, idx), **null}

    validator.ensure_flow_inputs_type = staticmethod(ensure_flow_inputs_type)
    setattr(module, _CHANGED, True)


def _in_flow_test() -> None:
    """`pf flow test`: the flow is loaded, and this with it, before its inputs are looked at."""
    module = sys.modules.get(_TEST)
    submitter = getattr(module, "TestSubmitter", None)
    errors = getattr(module, "UserErrorException", None)
    if submitter is None or errors is None or hasattr(module, _CHANGED):
        return
    before = submitter.resolve_data

    def resolve_data(
        self: Any, node_name: str | None = None, inputs: Any = None, *others: Any, **named: Any
    ) -> Any:
        try:
            return before(self, node_name, inputs, *others, **named)
        except errors as error:
            fault = "" if node_name else fault_of_request(self.dataplane_flow.inputs, inputs or {})
            if not fault:
                raise
            raise errors(message=fault) from error

    submitter.resolve_data = resolve_data
    setattr(module, _CHANGED, True)
