"""Several adapters over one base, served by name: each answers as its merged model does."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from tests.integration.server_fixture import AUTH, KEY, PAIRS, Served, Taught, served

from phi3_tool import Phi3Client
from phi3_training.errors import RecipeError, StageError
from phi3_training.finetune.weights import chat_format, load_model, with_adapter
from phi3_training.manifests import BaseManifest, ModelManifest
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import load_recipe
from phi3_training.run import Run
from phi3_training.serve.config import ServerConfig
from phi3_training.serve.loading import load_engine
from phi3_training.targets.local import server_config

pytest_plugins = ["tests.integration.server_plugin"]

QUESTIONS = [question for question, _ in PAIRS[:4]]
NAMED = ("v1.0", "loud")


def make_adapter(base: Path, folder: Path, seed: int, *, dora: bool = False) -> Path:
    """An adapter that changes what the model says; nothing was trained for it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora
    )
    model = get_peft_model(load_model(base, torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(4.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(taught: Taught, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.open(tmp_path_factory.mktemp("runs") / "r")
    base = Path(shutil.copytree(taught.model_dir, run.path / "base"))
    make_adapter(base, run.path / "adapter", 1)
    make_adapter(base, run.path / "adapters" / "v1.0", 2)
    make_adapter(base, run.path / "adapters" / "loud", 3, dora=True)
    run.write(BaseManifest(path="base"))
    run.write(ModelManifest(path="base", adapter="adapter"))
    (run.path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (run.path / "recipe.yaml").write_text(
        "name: r\nmodel: {name_or_path: base}\ndata: {train: chats.jsonl}\n"
        "serve: {adapters: true}\n"
    )
    return run


@pytest.fixture(scope="module")
def config(run: Run) -> ServerConfig:
    recipe = load_recipe(run.path / "recipe.yaml", ["finetune.num_threads=1"])
    config, engine, reason = server_config(recipe, run, lambda _done, _total, _text: None)
    assert (engine, "by name" in reason) == ("transformers", True)
    return config


@pytest.fixture(scope="module")
def endpoint(config: ServerConfig) -> Iterator[Served]:
    engine = load_engine(config)
    shared = {"adapters": config.adapters, "deployment": "local"}
    with served(engine, **shared) as endpoint:
        yield endpoint
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def expected(run: Run) -> dict[str, dict[str, str]]:
    """What each adapter says when it is merged and asked by transformers' own `generate`."""
    base = run.path / "base"
    chat = chat_format(base)
    found: dict[str, dict[str, str]] = {}
    for name, folder in {"own": "adapter", **{n: f"adapters/{n}" for n in NAMED}}.items():
        model = with_adapter(base, run.path / folder, torch.float32).merge_and_unload().eval()
        found[name] = {}
        for question in QUESTIONS:
            ids = torch.tensor([chat.encode_prompt([{"role": "user", "content": question}])])
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                do_sample=False, eos_token_id=list(chat.stop_token_ids),
            )  # fmt: skip
            found[name][question] = as_it_comes(chat, out[0, ids.shape[1] :].tolist())
    return found


def as_it_comes(chat: ChatFormat, ids: list[int]) -> str:
    """Decoded one by one, as an endpoint must: random models write bytes that are no text, and
    a decoder that sees them all at once also gives up the good ones among them."""
    decoder = chat.stream_decoder()
    return "".join(decoder.push(token) for token in ids) + decoder.flush()


def openai(endpoint: Served, question: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 12}
    reply = endpoint.post("/v1/chat/completions", body).json()
    assert reply["model"] == (model if model in NAMED else "phi3")
    return str(reply["choices"][0]["message"]["content"])


def score(endpoint: Served, question: str, deployment: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"input_data": {"input_string": messages, "parameters": {"max_new_tokens": 12}}}
    reply = endpoint.post("/score", body, **{"azureml-model-deployment": deployment})
    assert reply.headers["azureml-model-deployment"] == deployment
    return str(reply.json()["output"])


def test_adapters_differ(expected: dict[str, dict[str, str]]) -> None:
    """Else the tests below would show nothing."""
    first = QUESTIONS[0]
    assert len({expected[name][first] for name in expected}) == 3


def test_each_name_answers_as_its_merged_model_all_at_once(
    endpoint: Served, expected: dict[str, dict[str, str]]
) -> None:
    asked = [(question, name) for question in QUESTIONS for name in ("own", *NAMED)]

    def by_openai(item: tuple[str, str]) -> str:
        return openai(endpoint, item[0], "phi3" if item[1] == "own" else item[1])

    def by_score(item: tuple[str, str]) -> str:
        return score(endpoint, item[0], "local" if item[1] == "own" else item[1])

    with ThreadPoolExecutor(12) as pool:
        said = list(pool.map(by_openai, asked))
        scored = list(pool.map(by_score, asked))
    wanted = [expected[name][question] for question, name in asked]
    assert said == wanted
    assert scored == wanted


def test_models_are_listed(endpoint: Served) -> None:
    reply = requests.get(f"{endpoint.url}/v1/models", headers=AUTH, timeout=10).json()
    assert [model["id"] for model in reply["data"]] == ["phi3", *sorted(NAMED)]


def test_an_unknown_name_is_refused_and_the_known_ones_listed(endpoint: Served) -> None:
    body = {"model": "french", "messages": [{"role": "user", "content": "Hi"}]}
    reply = endpoint.post("/v1/chat/completions", body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "models: local, loud, phi3, v1.0" in reply.text
    header = {"azureml-model-deployment": "french"}
    assert endpoint.post("/score", {}, **header).status_code == 404


def test_the_flow_client_reaches_an_adapter_by_deployment(
    endpoint: Served, expected: dict[str, dict[str, str]]
) -> None:
    question = QUESTIONS[1]
    messages = [{"role": "user", "content": question}]
    with Phi3Client(f"{endpoint.url}/score", KEY, deployment="loud") as client:
        reply = client.chat(messages, max_new_tokens=12)
    assert (reply.text, reply.deployment) == (expected["loud"][question], "loud")


def test_runs_that_cannot_serve_adapters_say_why(run: Run, tmp_path: Path) -> None:
    recipe = load_recipe(run.path / "recipe.yaml", [])
    whole = Run.open(tmp_path / "whole")
    whole.write(ModelManifest(path="model", adapter=None))
    with pytest.raises(StageError, match="trained with method full"):
        server_config(recipe, whole, lambda _done, _total, _text: None)
    whole.write(ModelManifest(path="model", adapter="adapter"))
    with pytest.raises(StageError, match="no named adapter"):
        server_config(recipe, whole, lambda _done, _total, _text: None)
    with pytest.raises(RecipeError, match="only the engine transformers"):
        load_recipe(run.path / "recipe.yaml", ["serve.engine=onnxruntime"])


def test_an_adapter_of_another_model_is_named(config: ServerConfig, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(config.adapters["loud"], broken)
    (broken / "adapter_model.safetensors").unlink()
    wrong = config.model_copy(update={"adapters": {"broken": broken}})
    with pytest.raises(StageError, match="adapter 'broken'"):
        load_engine(wrong)
