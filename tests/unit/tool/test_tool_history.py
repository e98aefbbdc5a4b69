"""phi3_tool.wire: turns to messages and back, and trimming in whole turns."""

from __future__ import annotations

import pytest

from phi3_tool import RequestRejectedError, from_messages, to_messages
from phi3_tool.wire import BROKE_OFF, fit, rough_tokens


def turn(question: object, answer: object) -> dict[str, object]:
    return {"inputs": {"input_data": question}, "outputs": {"answer": answer}}


HISTORY = [turn(f"q{i}", f"a{i}") for i in range(4)]


def texts(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_a_conversation() -> None:
    messages = to_messages(HISTORY[:1], "q", "Be kind")
    assert messages == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "q0"},
        {"role": "assistant", "content": "a0"},
        {"role": "user", "content": "q"},
    ]


@pytest.mark.parametrize("empty", [None, "", "  \n"])
def test_no_system_turn_without_a_system_prompt(empty: str | None) -> None:
    """An empty system turn would change the tokens the model sees."""
    assert to_messages([], "q", empty) == [{"role": "user", "content": "q"}]
    assert to_messages(None, "q", empty) == [{"role": "user", "content": "q"}]


def test_the_note_of_a_broken_answer_is_not_sent() -> None:
    broken = turn("q0", f"Half an{BROKE_OFF}The model failed [status 200]]")
    assert texts(to_messages([broken], "q1")) == ["q0", "Half an", "q1"]
    assert texts(to_messages([turn("q0", f"{BROKE_OFF}Failed]")], "q1")) == ["q1"]


def test_there_and_back() -> None:
    messages = to_messages(HISTORY, "next", "Be kind")
    assert from_messages(messages) == HISTORY
    assert to_messages(from_messages(messages), "next", "Be kind") == messages


@pytest.mark.parametrize("budget", range(0, 60, 3))
def test_characters_are_trimmed_in_whole_turns(budget: int) -> None:
    messages = to_messages(HISTORY, "question", "system", max_chars=budget)
    assert messages[0]["role"] == "system"
    assert messages[-1]["content"] == "question"
    kept = texts(messages)[1:-1]
    assert kept == texts(to_messages(HISTORY, "question"))[8 - len(kept) : 8]
    assert len(kept) % 2 == 0
    if kept:
        assert sum(map(len, texts(messages))) <= budget
    # Not more left out than needed.
    assert len(kept) == min(8, max(0, (budget - 14) // 4 * 2))


def test_tokens_are_counted_with_the_given_counter() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return 10

    # Each message costs 10 and 5 around it; the question and two turns fit.
    assert len(to_messages(HISTORY, "q", max_tokens=75, count_tokens=count)) == 5
    assert len(to_messages(HISTORY, "q", max_tokens=74, count_tokens=count)) == 3
    assert "q" in counted


def test_a_budget_too_small_keeps_the_question() -> None:
    assert texts(to_messages(HISTORY, "q", "s", max_tokens=-5, max_chars=0)) == ["s", "q"]


def test_a_long_turn_hides_the_older_ones() -> None:
    """No gaps: what is kept is the newest, without a hole."""
    history = [turn("q", "a"), turn("x" * 100, "y"), turn("q", "a")]
    assert texts(to_messages(history, "q", max_chars=20)) == ["q", "a", "q"]


def test_rough_count_is_cautious() -> None:
    assert rough_tokens("") == 0
    assert rough_tokens("abcd") == 2
    assert rough_tokens("你好") == 2


def test_other_names_are_understood() -> None:
    history = [{"inputs": {"question": "q0"}, "outputs": {"reply": "a0"}}]
    assert texts(to_messages(history, "q")) == ["q0", "a0", "q"]
    mapped = [{"inputs": {"a": "1", "q": "2"}, "outputs": {"o": "3", "p": "4"}}]
    assert texts(to_messages(mapped, "q", input_key="q", output_key="p")) == ["2", "4", "q"]


@pytest.mark.parametrize("answer", [None, "", 3])
def test_a_turn_without_an_answer_is_left_out_whole(answer: object) -> None:
    assert texts(to_messages([turn("q0", answer), HISTORY[1]], "q")) == ["q1", "a1", "q"]
    assert texts(to_messages([{"inputs": {"input_data": "q0"}}], "q")) == ["q"]


@pytest.mark.parametrize(
    "history",
    ["text", {"inputs": {}}, [3], [{}], [{"inputs": {}}], [{"inputs": "q"}], [turn(3, "a")], 5,
     [{"inputs": {"a": "1", "b": "2"}, "outputs": {"answer": "x"}}]],
)  # fmt: skip
def test_what_is_no_history_is_named(history: object) -> None:
    with pytest.raises(RequestRejectedError) as caught:
        to_messages(history, "q")  # type: ignore[arg-type]
    assert "chat_history" in str(caught.value)


@pytest.mark.parametrize("question", ["", "  ", None, 3])
def test_an_empty_question_is_refused(question: object) -> None:
    with pytest.raises(RequestRejectedError):
        to_messages([], question)  # type: ignore[arg-type]


def test_back_from_messages() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert from_messages([user, assistant, user]) == [turn("q", "a")]
    renamed = from_messages([user, assistant], input_key="question", output_key="reply")
    assert renamed == [{"inputs": {"question": "q"}, "outputs": {"reply": "a"}}]
    for wrong in ([user, user], [assistant], [user, {"role": "system", "content": ""}]):
        with pytest.raises(RequestRejectedError):
            from_messages(wrong)


def role(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_messages_of_any_order_are_cut_in_whole_turns() -> None:
    system = [role("system", "s")]
    greeting = [role("assistant", "Welcome"), role("user", "one"), role("assistant", "1")]
    second = [role("user", "two"), role("user", "two again"), role("assistant", "2")]
    question = [role("user", "three"), role("assistant", "a beginning")]
    every = [*system, *greeting, *second, *question]
    size = {id(part): sum(len(m["content"]) for m in part) for part in (system, second, question)}
    assert fit(every, max_chars=1000) == every
    assert fit(every) == every
    # The two questions in a row are two turns; the greeting goes with the first one.
    room = sum(size.values())
    assert fit(every, max_chars=room) == [*system, *second, *question]
    assert fit(every, max_chars=room - 1) == [*system, *second[1:], *question]
    assert fit(every, max_chars=0) == [*system, *question]


@pytest.mark.parametrize(
    "messages", [[], [role("system", "s")], [role("assistant", "a"), role("system", "s")]]
)
def test_messages_without_a_question_are_left_alone(messages: list[dict[str, str]]) -> None:
    assert fit(messages, max_tokens=0) == messages


def test_cutting_twice_cuts_no_more() -> None:
    history = [turn("q" * 50, "a" * 50) for _ in range(9)]
    once = to_messages(history, "now", "system", max_tokens=200)
    assert 3 < len(once) < 20
    assert fit(once, max_tokens=200) == once
