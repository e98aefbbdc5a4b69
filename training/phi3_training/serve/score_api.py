"""`POST /score`: the request format of the MLflow foundation models on Azure ML.

Failures come back as status 200, as on Azure; the header `x-phi3-reason` says in plain words what
they mean.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from .config import ServerConfig
from .engines.base import Engine, EngineError
from .engines.named import pick
from .parameters import score_sampling
from .replies import error_body
from .score_protocol import BadBodyError, engine_failure, gather, read_score, success

logger = logging.getLogger(__name__)


def add_score(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """Register the route."""

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        try:
            payload = json.loads(await request.body())
        except ValueError:
            body = error_body("Internal Server Error", 500, "the body is not JSON")
            return JSONResponse(body, 500)
        try:
            messages, parameters = read_score(payload)
            sampling = score_sampling(parameters, config.dialect, config.max_new_tokens)
            chosen = pick(engine, request.headers.get("azureml-model-deployment"))
            answer = await gather(chosen, messages, sampling)
        except BadBodyError as error:
            return _failure({}, str(error))
        except EngineError as error:
            return _failure(*engine_failure(error, config.dialect))
        return JSONResponse(success(answer, config.dialect, config.model_name))


def _failure(body: dict[str, Any], reason: str) -> JSONResponse:
    plain = "".join(c if " " <= c <= "~" else " " for c in reason)[:200]
    logger.warning("/score failed as status 200: %s", plain)
    return JSONResponse(body, headers={"x-phi3-reason": plain})
