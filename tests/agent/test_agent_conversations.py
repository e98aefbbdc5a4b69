"""Conversations: kept in files, apart from each other, and only what was answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("agent_framework", reason="Agent Framework is in .venv-agent: make agent")

from agent_framework.exceptions import ChatClientException
from tests.agent.recorded import run

from phi3_agent import Documents, FileConversations, MemoryConversations, create_agent
from phi3_agent.client import answer_text
from phi3_tool.errors import ConfigurationError
from phi3_tool.grounding import NOT_IN_DOCUMENTS
from phi3_tool.wire import to_messages
from phi3_training.agent.recorder import Reply

Start = Callable[..., Any]


def asked(body: bytes) -> list[dict[str, str]]:
    messages = json.loads(body)["input_data"]["input_string"]
    assert isinstance(messages, list)
    return messages


def test_a_session_is_prompt_flows_chat_history_in_a_file(endpoint: Start, tmp_path: Path) -> None:
    stub = endpoint(a=[Reply(text="First."), Reply(text="Second.")])
    kept = FileConversations(tmp_path / "sessions")
    agent = create_agent(stub.client("a"), conversations=kept)
    run(agent.run("one", session=agent.create_session(session_id="mine")))
    # Another process would begin here: a new agent, the same folder.
    again = create_agent(stub.client("a"), conversations=FileConversations(tmp_path / "sessions"))
    run(again.run("two", session=again.create_session(session_id="mine")))
    path = tmp_path / "sessions/mine.json"
    history = json.loads(path.read_text(encoding="utf-8"))
    assert history == [
        {"inputs": {"input_data": "one"}, "outputs": {"answer": "First."}},
        {"inputs": {"input_data": "two"}, "outputs": {"answer": "Second."}},
    ]
    assert asked(stub.bodies("a")[1]) == to_messages(history[:1], "two")
    assert path.stat().st_mode & 0o077 == 0
    assert [each.name for each in path.parent.iterdir()] == ["mine.json"]


def test_a_question_that_failed_is_not_kept(endpoint: Start) -> None:
    stub = endpoint(a=[Reply(text="First."), Reply(400), Reply(text="Third.")])
    kept = MemoryConversations()
    agent = create_agent(stub.client("a"), conversations=kept)
    session = agent.create_session(session_id="s")
    run(agent.run("one", session=session))
    with pytest.raises(ChatClientException):
        run(agent.run("two", session=session))
    run(agent.run("three", session=session))
    contents = [message["content"] for message in asked(stub.bodies("a")[-1])]
    assert contents == ["one", "First.", "three"]


def test_many_sessions_at_once_do_not_mix(endpoint: Start, tmp_path: Path) -> None:
    stub = endpoint()
    kept = FileConversations(tmp_path)
    agent = create_agent(stub.client("a"), conversations=kept)

    async def talk(name: str) -> None:
        session = agent.create_session(session_id=name)
        for number in range(3):
            await agent.run(f"{name} asks {number}", session=session)

    async def all_of_them() -> None:
        await asyncio.gather(*(talk(f"person-{i}") for i in range(32)))

    run(all_of_them())
    for body in stub.bodies("a"):
        messages = asked(body)
        name = messages[-1]["content"].split()[0]
        assert all(name in message["content"].split() for message in messages)
    assert all(len(kept.read(f"person-{i}") or ()) == 3 for i in range(32))


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a" * 129, "x.json"])
def test_a_session_cannot_name_another_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a file"):
        FileConversations(tmp_path).append(name, [])


@pytest.mark.parametrize("text", ["not json", "{}", '[{"a": 1}]', '["x"]'])
def test_a_file_that_is_no_conversation_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    turns = [{"inputs": {"input_data": "q"}, "outputs": {"answer": "a"}}]
    with pytest.raises(ConfigurationError, match="move the file away"):
        FileConversations(tmp_path).append("s", list(turns))
    assert (tmp_path / "s.json").read_text(encoding="utf-8") == text


def test_memory_keeps_a_bounded_number() -> None:
    kept = MemoryConversations(kept=2)
    for name in ("a", "b", "c"):
        kept.append(name, [])
    assert kept.read("a") is None
    assert kept.read("c") == []


def test_no_fitting_passage_asks_no_model(
    endpoint: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import phi3_agent.agent as module

    monkeypatch.setattr(module, "look_up", lambda *_a, **_k: [])
    stub = endpoint()
    agent = create_agent(stub.client("a"), documents=Documents(folder=tmp_path))

    async def streamed() -> str:
        return "".join([update.text async for update in agent.run("Hi", stream=True)])

    assert answer_text(run(agent.run("Hi")).messages) == NOT_IN_DOCUMENTS
    assert run(streamed()) == NOT_IN_DOCUMENTS
    assert stub.bodies("a") == []


def test_sources_are_shown_but_not_sent_again(
    endpoint: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    import phi3_agent.agent as module

    passage = {
        "text": "Two kilos.",
        "score": 0.9,
        "metadata": {
            "id": 1, "words": 0.9, "cosine": None, "source": "tent.md", "heading": "Tent",
            "page": None, "first": 0, "last": 10, "place": "tent.md (Tent)",
        },
    }  # fmt: skip
    monkeypatch.setattr(module, "look_up", lambda *_a, **_k: [passage])
    stub = endpoint(a=[Reply(text="Two kilos [1].")])
    kept = MemoryConversations()
    agent = create_agent(stub.client("a"), conversations=kept, documents=Documents())
    session = agent.create_session(session_id="s")
    answer = answer_text(run(agent.run("How heavy is the tent?", session=session)).messages)
    assert answer == "Two kilos [1].\n\nSources:\n[1] tent.md (Tent)"

    async def streamed() -> str:
        stream = agent.run("And how long is it?", stream=True, session=session)
        return "".join([update.text async for update in stream])

    assert run(streamed()) == answer
    first, second = (asked(body) for body in stub.bodies("a"))
    assert "Two kilos." in first[-1]["content"]
    assert [m["content"] for m in second[:2]] == ["How heavy is the tent?", "Two kilos [1]."]
    turns = kept.read("s")
    assert turns is not None
    assert [turn["inputs"]["input_data"] for turn in turns] == [
        "How heavy is the tent?",
        "And how long is it?",
    ]
