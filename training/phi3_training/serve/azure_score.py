"""The scoring script of an Azure ML deployment: init() loads the model, run() answers one body.

Reads AZUREML_MODEL_DIR (the registered model's folder), PHI3_MAX_NEW_TOKENS and PHI3_CONCURRENCY;
speaks the protocol of `/score`. Azure's inference server calls run() from several threads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from pathlib import Path

from ..errors import StageError
from .config import ServerConfig
from .engines.base import Engine, EngineError
from .loading import load_engine
from .score_api import (
    BadBodyError,
    engine_failure,
    error_body,
    gather,
    read_score,
    score_sampling,
    success,
)

logger = logging.getLogger(__name__)

# Lengths are read under every name that either image knows; answers say why they ended, and
# failures what went wrong, as the newer image does.
_READ, _WRITE = "loi", "fms"
# What makes a folder a model that can be loaded; an MLflow model keeps it below its own files.
_MODEL_FILES = ("config.json", "tokenizer.json")


class Scorer:
    """Answers bodies with one engine, on a separate event loop."""

    def __init__(self, engine: Engine, *, max_new_tokens: int = 256, name: str = "phi3") -> None:
        self._engine = engine
        self._max_new_tokens = max_new_tokens
        self._name = name
        # One loop for all of the server's threads, so that their answers share the engine's batch.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="phi3-score", daemon=True
        )
        self._thread.start()

    def run(self, raw: str | bytes) -> dict[str, object]:
        """The answer to a body; waits for it. A failure is an answer too."""

        async def answer() -> dict[str, object]:
            try:
                messages, parameters = read_score(json.loads(raw))
                sampling = score_sampling(parameters, _READ, self._max_new_tokens)
                whole = await gather(self._engine, messages, sampling)
            except BadBodyError as error:
                return _refused(str(error))
            except (ValueError, RecursionError):
                return _refused("the body is not JSON")
            except EngineError as error:
                body, reason = engine_failure(error, _WRITE)
                logger.warning("not answered: %s", reason)
                return body
            return success(whole, _WRITE, self._name)

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        """End the loop; the engine is its owner's."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _refused(reason: str) -> dict[str, object]:
    logger.warning("not answered: %s", reason)
    body = {"status_code": 400, "body": error_body("Bad Request", 400, reason)}
    return {"output": None, "error": body}


def find_model(folder: Path) -> Path:
    """The folder of weights below a registered model. Raises StageError if there is none."""
    folders = [path.parent for path in folder.rglob(_MODEL_FILES[0])]
    models = [path for path in folders if all((path / name).is_file() for name in _MODEL_FILES)]
    if not models:
        raise StageError(
            f"The registered model contains no folder with {' and '.join(_MODEL_FILES)}: expected "
            "the tuned model of a training job; register it again with: phi3 register --on azure"
        )
    # The outermost: a folder of checkpoints inside the model must not be taken for it.
    return min(models, key=lambda path: (len(path.parts), str(path)))


def scorer_of(folder: Path) -> Scorer:
    """A scorer for a registered model, with the limits that the deployment's environment names."""
    limit = int(os.environ.get("PHI3_MAX_NEW_TOKENS", "256"))
    config = ServerConfig(
        engine="transformers",
        model_dir=find_model(folder),
        max_concurrent_requests_per_instance=int(os.environ.get("PHI3_CONCURRENCY", "8")),
        max_new_tokens=limit,
    )
    return Scorer(load_engine(config), max_new_tokens=limit, name=folder.name)


_loaded: list[Scorer] = []


def init() -> None:
    """Called once by Azure's inference server; a second call changes nothing."""
    logging.getLogger("phi3_training").setLevel(logging.INFO)
    if not _loaded:
        _loaded.append(scorer_of(Path(os.environ["AZUREML_MODEL_DIR"])))


def run(raw_data: str) -> dict[str, object]:
    """Called by Azure's inference server with the body of each request."""
    return _loaded[0].run(raw_data)
