"""Evaluation on a real model: perplexity computed directly, asking held against `generate`."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.server_fixture import PAIRS, Taught

from phi3_training.errors import StageError
from phi3_training.evaluate.answers import Asked, answer_losses, ask_all, ask_served, examine
from phi3_training.finetune.weights import chat_format, load_model
from phi3_training.prompt import ChatFormat
from phi3_training.serve.engines.tokens import TokenEngine
from phi3_training.serve.engines.transformers import CachedRows

pytest_plugins = ["tests.integration.server_plugin"]

Chat = list[dict[str, str]]


@pytest.fixture(scope="module")
def model(taught: Taught) -> Any:
    return load_model(taught.model_dir, torch.float32).eval()


@pytest.fixture(scope="module")
def chat(taught: Taught) -> ChatFormat:
    return chat_format(taught.model_dir)


def conversations() -> list[Chat]:
    """Short and long, right and wrong answers, and one of two turns."""
    found: list[Chat] = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in [*PAIRS[:6], (PAIRS[7][0], PAIRS[9][1])]
    ]
    found.append([*found[0], *found[3]])
    found.append([{"role": "system", "content": "Be short."}, *found[2]])
    return found


def test_perplexity_agrees_with_a_direct_computation(model: Any, chat: ChatFormat) -> None:
    """Token by token, one conversation at a time, without padding: the formula as documented."""
    total, count = 0.0, 0
    found = answer_losses(model, chat, conversations())
    for conversation, loss in zip(conversations(), found, strict=True):
        example = chat.encode_example(conversation)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        nll, tokens = 0.0, 0
        for position in range(1, len(example.input_ids)):
            if example.assistant_mask[position]:
                row = logits[position - 1]
                nll -= float(row[example.input_ids[position]] - torch.logsumexp(row, 0))
                tokens += 1
        assert loss is not None
        assert loss.tokens == tokens
        assert loss.nll == pytest.approx(nll, rel=1e-4, abs=1e-4)
        total, count = total + nll, count + tokens

    ours = math.exp(sum(x.nll for x in found if x) / sum(x.tokens for x in found if x))
    assert ours == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_agrees_with_the_loss_of_transformers(model: Any, chat: ChatFormat) -> None:
    example = chat.encode_example(conversations()[1])
    labels = [
        token if learnt else -100
        for token, learnt in zip(example.input_ids, example.assistant_mask, strict=True)
    ]
    with torch.inference_mode():
        theirs = model(
            input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([labels])
        ).loss
    (ours,) = answer_losses(model, chat, conversations()[1:2])

    assert ours is not None
    assert ours.nll / ours.tokens == pytest.approx(float(theirs), rel=1e-4)


def test_end_of_turn_counts(model: Any, chat: ChatFormat) -> None:
    """The token that ends an answer is among those measured."""
    conversation = conversations()[0]
    (loss,) = answer_losses(model, chat, [conversation])
    text_only = len(chat.encode_example(conversation).input_ids) - len(
        chat.encode_prompt(conversation[:1])
    )
    ends = sum(
        learnt and token in chat.stop_token_ids
        for token, learnt in zip(*_example(chat, conversation), strict=True)
    )

    assert ends >= 1
    assert loss is not None
    assert loss.tokens == text_only


def _example(chat: ChatFormat, conversation: Chat) -> tuple[list[int], list[int]]:
    example = chat.encode_example(conversation)
    return list(example.input_ids), list(example.assistant_mask)


def test_conversation_beyond_the_context_has_no_loss(model: Any, chat: ChatFormat) -> None:
    words = "lamp " * (chat.context_length + 5)
    long = [{"role": "user", "content": words}, {"role": "assistant", "content": "No."}]

    found = answer_losses(model, chat, [long, conversations()[0]])

    assert found[0] is None
    assert found[1] is not None


def generated(model: Any, chat: ChatFormat, prompt: Chat, limit: int) -> str:
    """What transformers' own generate answers, one question at a time."""
    ids = torch.tensor([chat.encode_prompt(prompt)])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(chat.stop_token_ids),
            pad_token_id=chat.pad_token_id,
        )
    return str(chat.decode(output[0, ids.shape[1] :].tolist()))


def test_answers_over_the_wire_are_those_of_generate(
    model: Any, chat: ChatFormat, taught: Taught
) -> None:
    prompts = [[{"role": "user", "content": asked}] for asked, _answer in PAIRS[:12]]
    steps: list[int] = []
    before = threading.enumerate()
    engine = TokenEngine.of_folder("test", taught.model_dir, CachedRows(model), slots=5)

    said = ask_served(engine, chat, prompts, max_new_tokens=40, at_once=5, step=steps.append)

    direct = [generated(model, chat, prompt, 40) for prompt in prompts]
    assert [answer.text for answer in said if answer is not None] == direct
    assert sum(steps) == len(prompts)
    started = [t for t in threading.enumerate() if t not in before]
    assert not [t.name for t in started if t.name.startswith("phi3-")]


def drafts() -> list[Asked]:
    """Expected answers that the model gives, begins, continues or has nothing to do with."""
    asked = []
    for number, (question, answer) in enumerate(PAIRS[:16]):
        expected = [answer, f"{answer} And more.", answer[: len(answer) // 2], "Nothing.", ""]
        first = [{"role": "system", "content": "Be short."}] if number % 3 == 0 else []
        prompt = [*first, {"role": "user", "content": question}]
        asked += [Asked(prompt, text) for text in (expected[number % 5], expected[-1])]
    earlier = [turn for pair in PAIRS[3:5] for turn in _turns(*pair)]
    return [*asked, Asked([*earlier, {"role": "user", "content": PAIRS[0][0]}], PAIRS[0][1])]


def _turns(asked: str, answer: str) -> Chat:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("at_once", [1, 4, 64])
@pytest.mark.parametrize("share_limit", [None, 30])
def test_reading_the_expected_answer_changes_no_answer_and_no_loss(
    model: Any, chat: ChatFormat, at_once: int, share_limit: int | None
) -> None:
    asked = drafts()
    steps: list[int] = []

    found = examine(
        model,
        chat,
        asked,
        max_new_tokens=24,
        at_once=at_once,
        share_limit=share_limit,
        step=steps.append,
    )

    direct = [generated(model, chat, one.prompt, 24) for one in asked]
    assert [one.said.text for one in found if one.said is not None] == direct
    measured = answer_losses(model, chat, [one.whole for one in asked if one.expected])
    losses = [one.loss for one in found if one.loss is not None]
    assert [loss.tokens for loss in losses] == [loss.tokens for loss in measured if loss]
    assert [loss.nll for loss in losses] == pytest.approx(
        [loss.nll for loss in measured if loss], rel=1e-4, abs=1e-4
    )
    assert sum(steps) == len(asked)


@pytest.mark.parametrize("limit", [1, 2, 3, 40])
def test_limit_counts_the_tokens_of_an_answer(model: Any, chat: ChatFormat, limit: int) -> None:
    asked = drafts()

    found = examine(model, chat, asked, max_new_tokens=limit, at_once=8)

    for one, answer in zip(asked, found, strict=True):
        assert answer.said is not None
        assert answer.said.text == generated(model, chat, one.prompt, limit)
        assert answer.said.cut == (limit < 40)


def test_cut_answers_and_prompts_without_room_are_reported(
    model: Any, chat: ChatFormat, taught: Taught
) -> None:
    words = "lamp " * (chat.context_length + 5)
    prompts = [[{"role": "user", "content": text}] for text in (PAIRS[0][0], words)]

    cut, unasked = ask_all(model, taught.model_dir, chat, prompts, max_new_tokens=2, at_once=2)

    assert cut is not None
    assert cut.cut
    assert unasked is None


def test_failing_model_is_an_error_for_the_user(
    chat: ChatFormat, taught: Taught, tmp_path: Path
) -> None:
    class Broken:
        device = torch.device("cpu")

        def __call__(self, **_inputs: Any) -> Any:
            raise RuntimeError("planted")

    prompts = [[{"role": "user", "content": PAIRS[0][0]}]]

    before = threading.enumerate()
    engine = TokenEngine.of_folder("test", taught.model_dir, CachedRows(Broken()), slots=1)

    with pytest.raises(StageError, match="could not be queried"):
        ask_served(engine, chat, prompts, max_new_tokens=4, at_once=1)
    started = [t for t in threading.enumerate() if t not in before]
    assert not [t.name for t in started if t.name.startswith("phi3-")]
