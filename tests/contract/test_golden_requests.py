"""Every golden request file against wire.build_request."""

from __future__ import annotations

import pytest
from tests.contract.cases import RequestCase, request_cases

import phi3_tool
from phi3_tool.wire import build_request

CASES = {case.name: case for case in request_cases()}


@pytest.mark.parametrize("name", CASES)
def test_request(name: str) -> None:
    """The body is exactly the one in the file, or the request is refused."""
    case: RequestCase = CASES[name]
    if case.error is not None:
        with pytest.raises(getattr(phi3_tool, case.error)) as caught:
            build_request(case.dialect, case.messages, case.parameters, case.stream)
        assert type(caught.value).__name__ == case.error
        assert caught.value.attempts == 0
        return
    body = build_request(case.dialect, case.messages, case.parameters, case.stream)
    assert body == case.body


def test_requests_leave_their_input_alone() -> None:
    """Building a body changes neither the messages nor the parameters."""
    messages = [{"role": "user", "content": "Hi", "name": "x"}]
    parameters = {"max_tokens": 5, "do_sample": False}
    build_request("openai", messages, parameters)
    assert messages == [{"role": "user", "content": "Hi", "name": "x"}]
    assert parameters == {"max_tokens": 5, "do_sample": False}
