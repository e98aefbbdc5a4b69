"""Lets `pf flow test --interactive` show a streamed answer while it arrives, and remember it.

Prompt flow 1.18 reads such an answer to its end before it prints the first piece; with traces on it
then forgets the text, and the next turn knows nothing of it. Touches nothing where that command's
code is not loaded; reads no files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_LOOP = "promptflow._sdk._orchestrator.test_submitter"
_SHOW = "print_chat_output"
_SETTLE = "resolve_generator"

Record = dict[str, Any]


def print_pieces_as_they_come() -> None:
    """Put our way of showing into the loop of `--interactive`, if this process runs it."""
    loop = sys.modules.get(_LOOP)
    if loop is None or not hasattr(loop, _SHOW) or not hasattr(loop, _SETTLE):
        return
    if not getattr(loop, "phi3_shows_pieces", False):
        _replace_in(loop)
        loop.phi3_shows_pieces = True  # type: ignore[attr-defined]


def _replace_in(loop: ModuleType) -> None:
    show, settle = getattr(loop, _SHOW), getattr(loop, _SETTLE)

    def print_chat_output(output: object, generator_record: Record, *, generator_key: str) -> None:
        if isinstance(output, Iterator) and generator_key not in generator_record:
            # Prompt flow takes the whole answer from here afterwards.
            generator_record[generator_key] = _shown(output)
        else:
            show(output, generator_record, generator_key=generator_key)

    def resolve_generator(flow_result: Any, generator_record: Record) -> Any:
        for place in (flow_result.run_info.output, flow_result.run_info.result, flow_result.output):
            _settle(place, generator_record)
        return settle(flow_result, generator_record)

    setattr(loop, _SHOW, print_chat_output)
    setattr(loop, _SETTLE, resolve_generator)


def _shown(pieces: Iterator[object]) -> list[str]:
    kept = []
    for piece in pieces:
        kept.append(str(piece))
        sys.stdout.write(kept[-1])
        sys.stdout.flush()
    sys.stdout.write("\n")
    return kept


def _settle(outputs: object, record: Record) -> None:
    """Put the text that was shown where the exhausted iterator still stands."""
    if not isinstance(outputs, dict):
        return
    for name, value in outputs.items():
        pieces = record.get(f"run.outputs.{name}")
        if isinstance(value, Iterator) and pieces is not None:
            outputs[name] = "".join(pieces)
