"""The golden requests through the Azure scoring script: same prompt ids as through the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.contract.cases import RequestCase, answer_cases, request_cases

import phi3_tool
from phi3_tool.wire import read_answer
from phi3_training.errors import StageError
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.prompt import ChatFormat
from phi3_training.serve.azure_score import Scorer, find_model
from phi3_training.serve.config import ServerConfig
from phi3_training.serve.engines.tokens import TokenEngine
from phi3_training.serve.server import create_container
from phi3_training.verify.parity import Recorder

CASES = [case for case in request_cases() if case.body is not None and case.dialect == "score"]
TEXTS = ["Who founded Microsoft? The quick brown fox."] * 5


class Bench:
    """A scorer and a server over the same engine; `prompts` are the ids that reach the model."""

    def __init__(self, folder: Path) -> None:
        self._recorder = Recorder(ChatFormat.from_folder(folder).stop_token_ids[0])
        self.engine = TokenEngine.of_folder("transformers", folder, self._recorder, slots=1)
        self.scorer = Scorer(self.engine)

    def ids_of(self, answer: Any) -> tuple[list[int], dict[str, Any]]:
        prompts = [list(prompt) for prompt in self._recorder.prompts]
        self._recorder.prompts.clear()
        assert len(prompts) == 1, answer
        return prompts[0], answer

    def through_script(self, body: str) -> tuple[list[int], dict[str, Any]]:
        return self.ids_of(self.scorer.run(body))

    def through_server(self, body: str) -> tuple[list[int], dict[str, Any]]:
        async def post() -> Any:
            container = create_container(self.engine, ServerConfig())
            transport = httpx.ASGITransport(container)
            async with httpx.AsyncClient(transport=transport, base_url="http://phi3") as client:
                return (await client.post("/score", content=body)).json()

        return self.ids_of(asyncio.run(post()))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("script")
    make_tokenizer(TEXTS, folder, vocab_size=600, model_max_length=512)
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    bench = Bench(folder)
    with bench.scorer:
        yield bench
    asyncio.run(bench.engine.close())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_script_writes_the_servers_prompt(bench: Bench, case: RequestCase) -> None:
    body = json.dumps(case.body)
    by_script, answer = bench.through_script(body)
    by_server, _ = bench.through_server(body)

    assert by_script == by_server
    read = read_answer("score", answer)
    assert read.finish_reason == "stop"
    assert read.usage["prompt_tokens"] == len(by_script)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "the body is not JSON"),
        ("{}", "input_data"),
        ('{"input_data": {"input_string": "Hi"}}', "not a list of messages"),
        ('{"input_data": {"input_string": [{"role": "x", "content": "Hi"}]}}', "role of message 1"),
        (
            '{"input_data": {"input_string": [{"role": "user", "content": "Hi"}], '
            '"parameters": {"temperature": -1}}}',
            "temperature",
        ),
        (
            '{"input_data": {"input_string": [{"role": "user", "content": "%s"}]}}' % ("Hi " * 600),
            "tokens",
        ),
    ],
    ids=["not-json", "empty", "text", "role", "parameter", "too-long"],
)
def test_failures_are_errors_to_the_client(bench: Bench, body: str, said: str) -> None:
    answer = bench.scorer.run(body)

    with pytest.raises(phi3_tool.Phi3Error, match=said):
        read_answer("score", answer)


def test_successes_have_the_shape_of_a_golden_answer(bench: Bench) -> None:
    golden = next(c for c in answer_cases() if c.name == "answer_score_newer_image")
    body = {"input_data": {"input_string": [{"role": "user", "content": "Hi"}]}}
    _ids, answer = bench.through_script(json.dumps(body))

    assert set(answer) == set(json.loads(golden.content))


def test_the_model_is_found_inside_an_mlflow_folder(tmp_path: Path) -> None:
    weights = tmp_path / "trained_model" / "artifacts" / "model"
    deeper = weights / "adapter"
    deeper.mkdir(parents=True)
    for folder in (weights, deeper):
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
    (tmp_path / "config.json").write_text("{}")  # something else's

    assert find_model(tmp_path) == weights
    with pytest.raises(StageError, match=r"tokenizer\.json"):
        find_model(deeper.parent.parent.parent / "nothing")
