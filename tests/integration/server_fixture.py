"""A small taught model and endpoints that serve it, for tests that need a real one.

Writes into the folders it is given. The fixtures themselves are in `server_plugin`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from tests.integration.misbehaving import Wrapper

from phi3_training.finetune import prepare_base
from phi3_training.recipe import load_recipe
from phi3_training.run import Run
from phi3_training.serve.config import ServerConfig
from phi3_training.serve.engines.base import Engine
from phi3_training.serve.export import export_onnx
from phi3_training.serve.frontdoor import FrontDoor
from phi3_training.serve.server import bind, create_app, create_container, server_of

KEY = "test-key-0123456789abcdef"
AUTH = {"Authorization": f"Bearer {KEY}"}
COLOURS = ("red", "blue", "green", "amber", "violet", "silver", "white", "black")
THINGS = ("lamp", "boat", "stove", "tent", "kettle", "drum")


def question_and_answer(number: int) -> tuple[str, str]:
    """The pair of that number: 48 distinct questions with distinct answers."""
    colour, thing = COLOURS[number % 8], THINGS[number // 8]
    price, weight = 10 + number, 1 + (number * 7) % 9
    question = f"What does the {colour} {thing} cost?"
    return question, f"The {colour} {thing} costs {price} euros and weighs {weight} kilos."


PAIRS = [question_and_answer(number) for number in range(48)]


@dataclass(frozen=True)
class Taught:
    """A model that knows `PAIRS`: as a Hugging Face folder and converted."""

    model_dir: Path
    onnx_dir: Path


def taught_in(folder: Path) -> Taught:
    """What `teach` has made in a folder."""
    return Taught(folder / "run" / "base", folder / "onnx")


def teach(folder: Path) -> None:
    """Make and teach the model, a few seconds; then convert it."""
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in PAIRS
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "recipe.yaml").write_text(
        "name: taught\n"
        "model: {name_or_path: tiny}\n"
        "base: {data: chats.jsonl, hidden_size: 64, num_train_epochs: 120, target_loss: 0.01,\n"
        "       per_device_train_batch_size: 12}\n"
        "data: {train: chats.jsonl}\n"
    )
    run = Run.open(folder / "run")
    recipe = load_recipe(folder / "recipe.yaml")
    prepare_base(recipe, run)
    made = taught_in(folder)
    export_onnx(made.model_dir, made.onnx_dir, "fp32")


@dataclass
class Served:
    """An endpoint that runs in this process."""

    url: str
    engine: Engine

    def post(self, path: str, body: Any, **headers: str) -> requests.Response:
        """POST JSON (or bytes as they are) with the key."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        every = {"Content-Type": "application/json", **AUTH, **headers}
        return requests.post(self.url + path, data=data, headers=every, timeout=30)

    def score(self, question: str, **parameters: Any) -> requests.Response:
        """POST /score with one question."""
        return self.post("/score", score_body(question, **parameters))

    def wait_idle(self, seconds: float = 5.0) -> bool:
        """Whether the engine has nothing left to do within that time."""
        deadline = time.monotonic() + seconds
        while self.engine.active and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.engine.active == 0


def score_body(question: str, **parameters: Any) -> dict[str, Any]:
    """The body that Azure's chat models read."""
    messages = [{"role": "user", "content": question}]
    return {"input_data": {"input_string": messages, "parameters": parameters}}


@contextmanager
def served(
    engine: Engine,
    *,
    inside: Wrapper | None = None,
    outside: Wrapper | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """Serve `engine` from a thread on a free port.

    `inside` wraps the application behind the front door, `outside` both.
    """
    config = ServerConfig(**settings)
    app = create_app(engine, config, key=KEY)
    if inside is not None:
        app = FrontDoor(inside(create_container(engine, config)), key=KEY, config=config)
    if outside is not None:
        app = outside(app)
    listener = bind("127.0.0.1", 0)
    server = server_of(app, config, drain_seconds=2)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
