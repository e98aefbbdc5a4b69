"""phi3_tool.errors: what an error shows, and that it survives a process boundary."""

from __future__ import annotations

import pickle

import pytest

import phi3_tool
from phi3_tool.errors import ConfigurationError, Phi3Error, ThrottledError, one_line

TREE = [
    getattr(phi3_tool, name)
    for name in phi3_tool.__all__
    if name.endswith("Error") and name != "Phi3Error"
]


def test_every_error_is_a_branch_of_one_tree() -> None:
    assert TREE
    assert all(kind.__bases__ == (Phi3Error,) for kind in TREE)


@pytest.mark.parametrize("kind", TREE)
def test_the_docstring_draws_the_class(kind: type[Phi3Error]) -> None:
    assert phi3_tool.errors.__doc__ is not None
    assert f"── {kind.__name__} " in phi3_tool.errors.__doc__


def test_text_says_the_facts_that_are_known() -> None:
    error = ThrottledError(
        "Busy: wait", status=424, reason="r", request_id="i", deployment="blue", attempts=3
    )
    assert str(error) == (
        "Busy: wait [status 424, reason r, deployment blue, request id i, after 3 attempts]"
    )
    assert str(ThrottledError("Busy: wait", attempts=1)) == "Busy: wait"


def test_errors_cross_processes() -> None:
    """Prompt flow's batch workers hand errors over by pickling them."""
    error = ThrottledError("Busy", status=429, inner_status=1, request_id="i", attempts=2)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
    assert type(copy) is ThrottledError
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_every_fault_is_named() -> None:
    error = ConfigurationError.from_faults("No", ["a is missing", "b is wrong"])
    assert str(error) == "No:\n  - a is missing\n  - b is wrong"
    assert error.faults == ("a is missing", "b is wrong")
    assert str(ConfigurationError.from_faults("No", ["a is missing"])) == "No: a is missing"


def test_foreign_words_become_one_short_line() -> None:
    assert one_line(" a\r\n\x1b[31mb\x00\tc ") == "a [31mb c"
    assert len(one_line("x" * 5000)) == 300
