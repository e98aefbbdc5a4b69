"""Both token engines on one taught model: the same answers, alone, together and interrupted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.server_fixture import PAIRS, Taught

from phi3_training.errors import StageError
from phi3_training.prompt import ChatFormat
from phi3_training.serve.engines import onnxruntime, transformers
from phi3_training.serve.engines.base import (
    Chunk,
    Engine,
    InvalidPromptError,
    PromptTooLongError,
    Sampling,
)
from phi3_training.serve.engines.batch import PartwiseModel
from phi3_training.serve.export import export_onnx

pytest_plugins = ("tests.integration.server_plugin",)
GREEDY = Sampling(max_new_tokens=40, temperature=0.0)
QUESTIONS = [question for question, _ in PAIRS]
ANSWERS = [answer for _, answer in PAIRS]


async def chunks(engine: Engine, question: str, sampling: Sampling = GREEDY) -> list[Chunk]:
    messages = [{"role": "user", "content": question}]
    return [chunk async for chunk in engine.stream(messages, sampling)]


async def answer(engine: Engine, question: str, sampling: Sampling = GREEDY) -> str:
    return "".join(chunk.text for chunk in await chunks(engine, question, sampling))


async def together(engine: Engine, questions: list[str]) -> list[str]:
    return await asyncio.gather(*[answer(engine, question) for question in questions])


async def in_turn(engine: Engine, questions: list[str]) -> list[str]:
    return [await answer(engine, question) for question in questions]


@pytest.fixture(scope="module", params=["onnxruntime", "transformers"])
def each(request: pytest.FixtureRequest, taught: Taught) -> Iterator[Engine]:
    """Every token engine, by way of the same tests."""
    if request.param == "transformers":
        engine = transformers.load(taught.model_dir, slots=40)
    else:
        engine = onnxruntime.load(taught.onnx_dir, slots=40)
    yield engine
    asyncio.run(engine.close())


def test_right_answers_alone_and_forty_at_once(each: Engine) -> None:
    alone = asyncio.run(in_turn(each, QUESTIONS[:40]))
    assert alone == ANSWERS[:40]
    assert asyncio.run(together(each, QUESTIONS[:40])) == alone
    assert each.active == 0


def test_rows_that_come_and_go_do_not_disturb_each_other(each: Engine) -> None:
    async def main() -> list[str]:
        tasks = []
        for number, question in enumerate(QUESTIONS):
            tasks.append(asyncio.create_task(answer(each, question)))
            if number % 5 == 0:
                long = Sampling(max_new_tokens=300, temperature=0.0, ignore_eos=True)
                leaving = asyncio.create_task(answer(each, question, long))
                await asyncio.sleep(0.003)
                leaving.cancel()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ANSWERS
    assert each.active == 0


def test_an_interrupted_answer_frees_its_slot(each: Engine) -> None:
    async def main() -> str:
        long = Sampling(max_new_tokens=400, temperature=0.0, ignore_eos=True)
        stream = each.stream([{"role": "user", "content": QUESTIONS[0]}], long)
        first = await anext(stream)
        await stream.aclose()
        for _ in range(200):
            if not each.active:
                break
            await asyncio.sleep(0.01)
        return first.text

    assert ANSWERS[0].startswith(asyncio.run(main()))
    assert each.active == 0


def test_figures_and_reasons(each: Engine) -> None:
    last = asyncio.run(chunks(each, QUESTIONS[0]))[-1]
    chat_ids = len(ANSWERS[0].split())
    assert last.finish_reason == "stop"
    assert last.completion_tokens >= chat_ids
    short = asyncio.run(chunks(each, QUESTIONS[0], Sampling(max_new_tokens=3, temperature=0.0)))[-1]
    assert (short.finish_reason, short.completion_tokens) == ("length", 3)
    assert short.prompt_tokens == last.prompt_tokens > 5


def test_a_stop_string_ends_the_answer(each: Engine) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=0.0, stop=("costs 1",))
    found = asyncio.run(chunks(each, QUESTIONS[0], sampling))
    assert "".join(chunk.text for chunk in found) == "The red lamp "
    assert found[-1].finish_reason == "stop"


def test_one_seed_one_answer(each: Engine) -> None:
    hot = Sampling(max_new_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    first = asyncio.run(answer(each, QUESTIONS[0], hot))

    async def beside_others() -> str:
        others = [asyncio.create_task(answer(each, question)) for question in QUESTIONS[1:6]]
        found = await answer(each, QUESTIONS[0], hot)
        await asyncio.gather(*others)
        return found

    assert asyncio.run(beside_others()) == first


def test_the_context_is_a_limit(each: Engine) -> None:
    with pytest.raises(PromptTooLongError, match="context holds 512"):
        asyncio.run(answer(each, "lamp " * 600))
    endless = Sampling(max_new_tokens=10_000, temperature=0.0, ignore_eos=True)
    last = asyncio.run(chunks(each, QUESTIONS[0], endless))[-1]
    assert last.finish_reason == "length"
    assert last.prompt_tokens + last.completion_tokens == 512


def test_role_order_is_a_plain_error(each: Engine) -> None:
    async def main() -> None:
        async for _ in each.stream([{"role": "assistant", "content": "x"}], GREEDY):
            pass

    with pytest.raises(InvalidPromptError, match="user"):
        asyncio.run(main())


def test_a_lone_surrogate_is_no_crash(each: Engine) -> None:
    with contextlib.suppress(InvalidPromptError):
        asyncio.run(answer(each, "lamp \ud800 cost"))
    assert asyncio.run(answer(each, QUESTIONS[1])) == ANSWERS[1]


def test_int4_answers_too(taught: Taught, tmp_path: Path) -> None:
    report = export_onnx(taught.model_dir, tmp_path / "int4", "int4")
    full = sum(file.stat().st_size for file in taught.onnx_dir.iterdir())
    assert report["bytes"] < full
    engine = onnxruntime.load(tmp_path / "int4", slots=8)
    found = asyncio.run(together(engine, QUESTIONS))
    asyncio.run(engine.close())
    assert sum(a == b for a, b in zip(found, ANSWERS, strict=True)) > 24


def test_int8_answers_as_full_precision_does_whoever_is_beside_it(
    taught: Taught, tmp_path: Path
) -> None:
    export_onnx(taught.model_dir, tmp_path / "int8", "int8")
    model = onnxruntime.step_model(tmp_path / "int8")
    full = onnxruntime.step_model(taught.onnx_dir)
    ids = ChatFormat.from_folder(taught.onnx_dir).encode_prompt(
        [{"role": "user", "content": QUESTIONS[0]}]
    )
    alone, exact = model.add(ids, 64), full.add(ids, 64)
    assert np.abs(alone - exact).max() < 0.1 * exact.std()
    alone = model.step([7])[0]
    model.reset()
    model.add(ids, 64)
    model.add(ids[:5], 64)
    assert np.array_equal(model.step([7, 9])[0], alone)
    engine = onnxruntime.load(tmp_path / "int8", slots=40)
    found = asyncio.run(together(engine, QUESTIONS))
    asyncio.run(engine.close())
    assert sum(a == b for a, b in zip(found, ANSWERS, strict=True)) >= 46


def test_a_prompt_read_in_parts_is_the_same_prompt(taught: Taught) -> None:
    ids = [5 + n % 200 for n in range(150)]
    whole, parts = (onnxruntime.step_model(taught.onnx_dir) for _ in range(2))
    assert isinstance(parts, PartwiseModel)
    for model in (whole, parts):
        model.add(ids[:9], 64)
    expected = whole.add(ids, 200)
    read = parts.add_in_parts(ids, 200, 40)
    found = [next(read) for _ in range(4)]
    assert found[:3] == [None] * 3
    assert found[3] is not None
    np.testing.assert_allclose(found[3], expected, atol=1e-4)
    for _ in range(3):
        np.testing.assert_allclose(parts.step([8, 9]), whole.step([8, 9]), atol=1e-4)


def test_the_converted_folder_tokenises_as_the_model_does(taught: Taught) -> None:
    from transformers import AutoTokenizer

    ours = ChatFormat.from_folder(taught.onnx_dir)
    theirs = AutoTokenizer.from_pretrained(taught.model_dir)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert ours.encode_prompt(messages) == list(expected)


def test_a_conversion_replaces_the_old_one_or_nothing(taught: Taught, tmp_path: Path) -> None:
    target = tmp_path / "onnx"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(StageError, match=r"no config\.json"):
        export_onnx(tmp_path / "nothing", target)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "phi3"}')
    with pytest.raises(StageError, match="could not be converted"):
        export_onnx(broken, target)
    assert [file.name for file in target.iterdir()] == ["old"]
    export_onnx(taught.model_dir, target)
    assert not (target / "old").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"onnx", "broken"}


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="not a converted model"):
        onnxruntime.load(tmp_path, slots=1)


@pytest.mark.parametrize(("load", "kind"), [(onnxruntime.load, "onnx"), (transformers.load, "hf")])
def test_a_folder_without_a_tokenizer_is_named(
    load: Any, kind: str, taught: Taught, tmp_path: Path
) -> None:
    folder = taught.onnx_dir if kind == "onnx" else taught.model_dir
    for file in folder.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(StageError, match=r"no tokenizer\.json"):
        load(tmp_path, slots=1)


def test_a_damaged_model_is_named(taught: Taught, tmp_path: Path) -> None:
    for file in taught.onnx_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(StageError, match="cannot run the model"):
        onnxruntime.load(tmp_path, slots=1)
