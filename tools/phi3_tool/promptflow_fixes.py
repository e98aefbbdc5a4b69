"""What this package changes in Prompt flow 1.18, and why; upstream takes no fixes any more.

- A question that is null, or that a row of the data lacks, becomes the text "None" or "nan", and
  the model is asked that; for a wrong name the error does not say what was sent.
- At INFO a dozen lines are logged about every request: a sixth of the work of `pf flow serve`, and
  errors drown in them.
- The served page requires every input, those with a default too.
- `pf flow test --interactive` shows a streamed answer only when all of it is there.

Each change is made in the process that loads the flow, only where Prompt flow has loaded the module
in question, and once. Reads PF_LOGGING_LEVEL and no file. Standard library only and no relative
import: phi3_eval carries this file alone.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Dict, List

_INVOKER = "promptflow.core._serving.flow_invoker"
_SERVING_ERRORS = "promptflow.core._serving._errors"
_SERVER = "promptflow.core._serving.app_base"
_LOGGERS = "promptflow._utils.logger_utils"
_VALIDATOR = "promptflow.executor.flow_validator"
#: `pf flow test`, and its loop `--interactive`.
_TEST = "promptflow._sdk._orchestrator.test_submitter"
# Attributes that mark a changed module: flows are loaded several times in one process.
_REFUSES = "phi3_refuses"
_DESCRIBES = "phi3_describes"
_SHOWS_PIECES = "phi3_shows_pieces"

Record = Dict[str, List[str]]  # the pieces of each output that was shown


# ---- a missing question is an error


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
    if invoker is None or errors is None or hasattr(invoker, _REFUSES):
        return
    before = invoker.validate_request_data

    def validate_request_data(flow: Any, data: object) -> None:
        fault = fault_of_request(flow.inputs, data)
        if fault:
            raise errors.MissingRequiredFlowInput(fault)
        before(flow, data)

    invoker.validate_request_data = validate_request_data  # type: ignore[attr-defined]
    setattr(invoker, _REFUSES, True)


def _in_the_executor() -> None:
    """Every line of `pf run` and every request passes here before its values become texts.

    None is given to the node, which raises: an error raised here would end the whole of `pf run
    create` with a traceback of pandas, because Prompt flow then has no inputs to list.
    """
    module = sys.modules.get(_VALIDATOR)
    validator = getattr(module, "FlowValidator", None)
    if validator is None or hasattr(module, _REFUSES):
        return
    before = validator.ensure_flow_inputs_type

    def ensure_flow_inputs_type(
        flow: Any, inputs: Mapping[str, Any], idx: int | None = None
    ) -> dict[str, Any]:
        # Prompt flow's own conversion turns None into the text "None": the texts that are null get
        # "" for its sake, and None again afterwards.
        filled = without_empty_cells(flow.inputs, inputs)
        texts = [name for name, about in flow.inputs.items() if _is_text(about)]
        null = dict.fromkeys(name for name in texts if filled.get(name, "") is None)
        return {**before(flow, {**filled, **dict.fromkeys(null, "")}, idx), **null}

    validator.ensure_flow_inputs_type = staticmethod(ensure_flow_inputs_type)
    setattr(module, _REFUSES, True)


def _in_flow_test() -> None:
    """`pf flow test`: the flow is loaded, and this with it, before its inputs are looked at."""
    module = sys.modules.get(_TEST)
    submitter = getattr(module, "TestSubmitter", None)
    errors = getattr(module, "UserErrorException", None)
    if submitter is None or errors is None or hasattr(module, _REFUSES):
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
    setattr(module, _REFUSES, True)


# ---- a served flow: quiet, with a usable page


def quiet_when_served() -> None:
    """Prompt flow's log at ERROR if this process serves the flow and no other level is set."""
    if _SERVER not in sys.modules or os.environ.get("PF_LOGGING_LEVEL"):
        return
    # Setting PF_LOGGING_LEVEL is too late here: Prompt flow reads it when it is imported.
    factory = getattr(sys.modules.get(_LOGGERS), "LoggerFactory", None)
    for logger in getattr(factory, "_existing_loggers", ()):
        logger.setLevel(logging.ERROR)


def let_the_page_leave_defaults_out(title: str = "") -> None:
    """Describe as fields only the conversation and what has no default: before the server is made.

    `title` is what the page shows above the conversation: Prompt flow serves a copy of the flow,
    and would show its temporary folder.

    Prompt flow's page draws a required field for every input of this description, whatever its
    `required` and `default` say, and keeps its button grey until all of them are filled in. The
    inputs that may be left out are named in the body's description, each with its default.
    """
    server = sys.modules.get(_SERVER)
    if server is None or hasattr(server, _DESCRIBES):
        return
    before = server.generate_swagger

    def generate_swagger(flow: Any, *others: Any) -> dict[str, Any]:
        flow.name = title or flow.name
        swagger: dict[str, Any] = before(flow, *others)
        body = swagger["paths"]["/score"]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        optional = []
        for name, about in flow.inputs.items():
            if about.default is not None:
                schema["required"].remove(name)
                if not about.is_chat_history:
                    del schema["properties"][name]
                    optional.append(f"{name} ({about.default!r})")
        if optional:
            body["description"] += f". Optional, with defaults: {', '.join(optional)}"
        return swagger

    server.generate_swagger = generate_swagger  # type: ignore[attr-defined]
    setattr(server, _DESCRIBES, True)


# ---- a streamed answer in the terminal


def print_pieces_as_they_come() -> None:
    """Put our way of showing into the loop of `--interactive`, if this process runs it."""
    # The loop reads a streamed answer to its end before it prints the first piece; with traces on
    # it then forgets the text, and the next turn knows nothing of it. Two functions are replaced.
    loop: Any = sys.modules.get(_TEST)
    show = getattr(loop, "print_chat_output", None)
    settle = getattr(loop, "resolve_generator", None)
    if show is None or settle is None or hasattr(loop, _SHOWS_PIECES):
        return

    def print_chat_output(output: object, generator_record: Record, *, generator_key: str) -> None:
        if isinstance(output, Iterator) and generator_key not in generator_record:
            # Prompt flow takes the whole answer from here afterwards.
            pieces = generator_record[generator_key] = []
            for piece in output:
                pieces.append(str(piece))
                sys.stdout.write(pieces[-1])
                sys.stdout.flush()
            sys.stdout.write("\n")
        else:
            show(output, generator_record, generator_key=generator_key)

    def resolve_generator(flow_result: Any, generator_record: Record) -> Any:
        for place in (flow_result.run_info.output, flow_result.run_info.result, flow_result.output):
            # The text that was shown, instead of the exhausted iterator.
            for name, value in place.items() if isinstance(place, dict) else ():
                shown = generator_record.get(f"run.outputs.{name}")
                if isinstance(value, Iterator) and shown is not None:
                    place[name] = "".join(shown)
        return settle(flow_result, generator_record)

    loop.print_chat_output, loop.resolve_generator = print_chat_output, resolve_generator
    setattr(loop, _SHOWS_PIECES, True)
