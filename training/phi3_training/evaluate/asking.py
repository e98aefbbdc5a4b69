"""Asks many questions: a served engine over HTTP, or loaded weights directly.

Over HTTP the client and the server application are those that chat with users, on a loopback port
of this process. Both give the same answers where the number types are the same. Writes nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from phi3_tool import EndpointTimeoutError, Phi3Client, Phi3Error

from ..errors import StageError
from ..finetune.rows import Conversation
from ..prompt import ChatFormat
from ..serve.app import create_app
from ..serve.config import ServerConfig
from ..serve.engines.base import Engine
from ..serve.engines.rope import share_limit
from ..serve.server import bind
from .greedy import Asked, examine
from .rows import Said

# The longest that the endpoint gives one request; questions never wait, there is a slot for each.
_REQUEST_TIMEOUT_MS = 180_000


def ask_served(
    engine: Engine,
    chat: ChatFormat,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    at_once: int,
    step: Callable[[int], None] = lambda _count: None,
) -> list[Said | None]:
    """The greedy answer to each prompt; None where a prompt alone fills the model's context.

    `chat` is the format of the engine's model. The engine is closed afterwards. Raises StageError
    when the endpoint fails.
    """

    def ask(prompt: Conversation) -> Said | None:
        if len(chat.encode_prompt(prompt)) >= chat.context_length:
            return None
        reply = client.chat(prompt, temperature=0.0, max_new_tokens=max_new_tokens)
        return Said(reply.text, reply.finish_reason == "length")

    found = []
    with (
        _endpoint(engine, at_once) as (url, key),
        Phi3Client(url, key, max_retries=0) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):
        try:
            for said in pool.map(ask, prompts):
                found.append(said)
                step(1)
        except EndpointTimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise StageError(
                "The model did not answer in time. Lower evaluate.max_new_tokens or "
                "evaluate.per_device_eval_batch_size, or evaluate fewer rows: evaluate.max_rows"
            ) from None
        except Phi3Error as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise StageError(f"The model could not be asked: {error}") from None
    return found


def ask_all(
    model: Any,
    folder: Path,
    chat: ChatFormat,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    at_once: int,
    step: Callable[[int], None] = lambda _count: None,
) -> list[Said | None]:
    """The same of loaded weights, without a server. `folder` is where `model` was loaded from."""
    answered = examine(
        model,
        chat,
        [Asked(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        at_once=at_once,
        share_limit=share_limit(folder),
        step=step,
    )
    return [one.said for one in answered]


@contextmanager
def _endpoint(engine: Engine, at_once: int) -> Iterator[tuple[str, str]]:
    """The endpoint's URL and key while it is served from a thread on a free loopback port."""
    key = secrets.token_urlsafe(32)
    config = ServerConfig(
        max_concurrent_requests_per_instance=at_once, request_timeout_ms=_REQUEST_TIMEOUT_MS
    )
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, config, key=key),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="phi3-evaluate", daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions", key
    finally:
        server.should_exit = True
        thread.join()
        asyncio.run(engine.close())
        listener.close()
