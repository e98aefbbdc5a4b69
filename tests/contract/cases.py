"""Loads the golden files beside it: one JSON file per request and per answer of the wire protocol.

for case in request_cases(): build_request(case.dialect, case.messages, ...) == case.body
for case in answer_cases():  an endpoint that sends (case.status, case.headers, case.content)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class RequestCase:
    """What is asked, and the body it becomes; `error` names the class where it is refused."""

    name: str
    about: str
    dialect: str
    messages: Any
    parameters: dict[str, Any]
    stream: bool
    body: dict[str, Any] | None
    error: str | None


@dataclass(frozen=True)
class AnswerCase:
    """What an endpoint sends, and what is to be made of it."""

    name: str
    about: str
    dialect: str
    stream: bool
    status: int
    headers: dict[str, str]
    content: bytes
    #: Either "text" (and maybe "pieces", "usage", "finish_reason", "model"), or "error" with the
    #: class's name, the attributes it carries, and whether the request is sent again ("retried").
    expect: dict[str, Any]


def request_cases() -> list[RequestCase]:
    """Every request file, in the order of their names."""
    return [_request(path) for path in _files("request_*.json")]


def answer_cases() -> list[AnswerCase]:
    """Every answer file, in the order of their names."""
    return [_answer(path) for path in _files("answer_*.json")]


def _files(pattern: str) -> list[Path]:
    paths = sorted(FOLDER.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no golden file {pattern} in {FOLDER}")
    return paths


def _request(path: Path) -> RequestCase:
    case = json.loads(path.read_text(encoding="utf-8"))
    return RequestCase(
        name=path.stem,
        about=case["about"],
        dialect=case["dialect"],
        messages=case["messages"],
        parameters=case["parameters"],
        stream=case.get("stream", False),
        body=case["expect"].get("body"),
        error=case["expect"].get("error"),
    )


def _answer(path: Path) -> AnswerCase:
    case = json.loads(path.read_text(encoding="utf-8"))
    answer = case["answer"]
    text = answer["text"] if "text" in answer else json.dumps(answer["json"])
    return AnswerCase(
        name=path.stem,
        about=case["about"],
        dialect=case["dialect"],
        stream=case.get("stream", False),
        status=answer["status"],
        headers=answer["headers"],
        content=text.encode(),
        expect=case["expect"],
    )
