"""The table of fault texts: every entry is used, and filled in with exactly its own names."""

from __future__ import annotations

import ast
import string
from pathlib import Path

import pytest

from phi3_training.data import faults
from phi3_training.data.faults import Problem, Wording

_WORDINGS = {name: value for name, value in vars(faults).items() if isinstance(value, Wording)}
_ROOT = Path(faults.__file__).parents[1]
_USERS = [*sorted((_ROOT / "data").glob("*.py")), _ROOT / "finetune" / "rows.py"]
_NODES = [node for path in _USERS for node in ast.walk(ast.parse(path.read_text("utf-8")))]
# `faults.BROKEN_JSON(…)`; prepare.py has local lists of that name.
_IN_CODE = [
    node
    for node in _NODES
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("faults", "wordings")
]


@pytest.mark.parametrize("name", _WORDINGS)
def test_an_entry_is_used(name: str) -> None:
    assert name in {node.attr for node in _IN_CODE}


def test_each_call_gives_the_names_that_its_text_needs() -> None:
    calls = [node for node in _NODES if isinstance(node, ast.Call) and node.func in _IN_CODE]
    assert len(calls) > len(_WORDINGS) / 2
    wrong = {}
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        wording = _WORDINGS.get(call.func.attr)
        if wording is None:
            continue
        text = wording.what + wording.fix
        wanted = {field for _, field, _, _ in string.Formatter().parse(text) if field}
        given = {keyword.arg for keyword in call.keywords}
        if given != wanted:
            wrong[f"{call.func.attr}, line {call.lineno}"] = given ^ wanted
    assert not wrong


def test_it_fills_in_names_and_keeps_the_column() -> None:
    assert faults.BROKEN_JSON(7, where="near 'x'", why="no value") == Problem(
        "broken-json",
        "broken JSON near 'x' (no value)",
        "write one whole JSON object on one line, with double quotes",
        7,
    )
    assert '{"messages"' in faults.UNREADABLE_JSON(why="it is nested").fix
