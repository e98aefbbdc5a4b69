"""The application: routes of the model's container behind the imitated front door."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from .asgi import App
from .config import ServerConfig
from .engines.base import Engine
from .frontdoor import FrontDoor
from .openai_api import add_openai
from .quirks import Quirks
from .replies import error_body
from .score_api import add_score
from .swagger import swagger


def create_app(engine: Engine, config: ServerConfig, *, key: str) -> App:
    """The ASGI application of one endpoint."""
    container = create_container(engine, config)
    return FrontDoor(Quirks(container, config.quirks), key=key, config=config)


def create_container(engine: Engine, config: ServerConfig) -> FastAPI:
    """What runs inside the container on Azure: no key, no limits, its own statuses."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def health() -> Response:
        return PlainTextResponse("healthy")

    @app.get("/swagger.json")
    async def description() -> dict[str, Any]:
        return swagger(config.model_name)

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body("Error", error.status_code, error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> Response:
        body = error_body("Internal Server Error", 500, "the endpoint failed; see its log")
        return JSONResponse(body, 500)

    add_score(app, engine, config)
    add_openai(app, engine, config)
    return app
