"""Runs the endpoint: binds the port, loads the engine, serves until stopped, then drains.

Reads the settings file and, for the keys, its standard input or the environment; writes a status
file with the port it got. Logs to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..errors import Phi3TrainingError, UsageError
from ..processes import start_time
from ..run import write_atomically
from . import keyholder
from .config import ServerConfig
from .engines.base import Engine
from .frontdoor import FrontDoor
from .loading import load_engine
from .openai_api import add_openai
from .openai_errors import is_openai, no_such_route, openai_error
from .score_api import add_score, error_body, swagger

logger = logging.getLogger(__name__)


def create_app(engine: Engine, config: ServerConfig, *, key: str) -> ASGIApp:
    """The ASGI application of one endpoint."""
    container = create_container(engine, config)
    door = FrontDoor(container, key=key, config=config)
    if not config.cors_origins:
        return door
    # Around the front door: a browser asks first, without the key, and must read refusals too.
    return CORSMiddleware(
        door,
        allow_origins=config.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "azureml-model-deployment", "x-phi3-reason"],
    )


def create_container(engine: Engine, config: ServerConfig) -> FastAPI:
    """What runs inside the container on Azure: no key, no limits, its own statuses."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def health() -> Response:
        return PlainTextResponse("healthy")

    @app.get("/swagger.json")
    async def description() -> dict[str, object]:
        return swagger(config.model_name)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if is_openai(path):
            body = no_such_route(path, error.status_code)
            return JSONResponse(body, 404 if path == "/v1/completions" else error.status_code)
        return JSONResponse(error_body("Error", error.status_code, error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, _error: Exception) -> Response:
        said = "the endpoint failed; see its log"
        openai = is_openai(request.url.path)
        body = openai_error(500, said) if openai else error_body("Internal Server Error", 500, said)
        return JSONResponse(body, 500)

    add_score(app, engine, config)
    add_openai(app, engine, config)
    return app


_BACKLOG = 2048  # connections not accepted yet; uvicorn's own default


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's HTTP protocol, which also closes connections that never finish their headers.

    uvicorn itself counts only from the end of an answer on, so a client that sends nothing, or
    half a request, would keep its connection for ever.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A new connection: the first request must come in time."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Some bytes: with the end of the headers the request is in progress, and has its time."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._patience is None:
            seconds = self.config.timeout_keep_alive
            self._patience = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def server_of(app: ASGIApp, config: ServerConfig, *, drain_seconds: int) -> uvicorn.Server:
    """The HTTP server of an application, not started yet."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            log_config=None,  # uvicorn would replace the handlers of `log_to_stderr`
            access_log=False,
            lifespan="off",  # the front door answers requests alone
            server_header=False,
            timeout_keep_alive=config.idle_seconds,
            timeout_graceful_shutdown=drain_seconds,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m phi3_training.serve`; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3_training.serve",
        description="Serve a tuned model. The key comes from PHI3_KEY or standard input.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the settings, a JSON file")
    parser.add_argument(
        "--key-stdin",
        action="store_true",
        help="read the key from the first line of standard input, an upstream key from the second",
    )
    args = parser.parse_args(arguments)
    log_to_stderr()
    try:
        config = ServerConfig.from_file(args.config)
        key, upstream_key = read_keys(from_stdin=args.key_stdin)
        serve(config, key=key, upstream_key=upstream_key)
    except Phi3TrainingError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is a command
        return 1
    except KeyboardInterrupt:  # Ctrl-C while the model loads
        return 130
    return 0


def log_to_stderr() -> None:
    """Show what the endpoint does, a line each; for a process that does nothing else."""
    layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout, stream=sys.stderr)
    # Our own front door logs requests; other libraries log urls, bodies, and each write to a
    # client that has left.
    for name in ("uvicorn.access", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Every message of uvicorn bears the name "uvicorn.error", good news included. Ours says where
    # it listens and when it has stopped; what is left to uvicorn are warnings.
    server = logging.getLogger("uvicorn.error")
    server.setLevel(logging.WARNING)

    def under_our_name(record: logging.LogRecord) -> bool:
        record.name = logger.name
        return True

    server.addFilter(under_our_name)


def read_keys(*, from_stdin: bool) -> tuple[str, str | None]:
    """The endpoint's key and the upstream server's, if any; both leave the environment."""
    # Taken out of the environment: /proc/PID/environ and child processes would show it.
    named = [os.environ.pop(name, "") for name in ("PHI3_KEY", "PHI3_UPSTREAM_KEY")]
    lines = [sys.stdin.readline().strip() for _ in named] if from_stdin else ["", ""]
    key, upstream = (line or value for line, value in zip(lines, named, strict=True))
    if not key:
        raise UsageError(
            "The endpoint has no key; set PHI3_KEY, or give the key on standard input "
            "with --key-stdin"
        )
    return key, upstream or None


def serve(config: ServerConfig, *, key: str, upstream_key: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT; returns when the running requests are finished.

    Raises UsageError when the port is taken, StageError when the model cannot be loaded.
    """
    # Before the model is loaded, which takes minutes: a taken port is an error at once.
    listener = bind(config.host, config.port)
    try:
        engine = load_engine(config, upstream_key=upstream_key)
        asyncio.run(_serve(config, engine, listener, key))
    finally:
        listener.close()
        if config.status_file is not None:
            config.status_file.unlink(missing_ok=True)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the port (0: any free one), not listening yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named explicitly: asyncio turns Nagle's delay off only where it sees the protocol's number.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # elsewhere this option would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"Port {port} on {host} cannot be used ({error.strerror or error}); "
            "choose another with serve.port=PORT, or 0 for any free port"
        ) from None
    return listener


async def _serve(config: ServerConfig, engine: Engine, listener: socket.socket, key: str) -> None:
    app = create_app(engine, config, key=key)
    server = server_of(app, config, drain_seconds=config.drain_seconds)
    async with AsyncExitStack() as open_until_stopped:
        # uvicorn raises the signal that stopped it once more at its end; by then all is done.
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, lambda *_: None)
            open_until_stopped.callback(signal.signal, number, before)
        if config.status_file is not None:  # in the background: whoever started it is gone
            holder = await keyholder.offer(key)
            if holder is not None:
                await open_until_stopped.enter_async_context(holder)
        port = listener.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        logger.info(
            "serving %s at http://%s:%d/score and, as OpenAI's API, at http://%s:%d/v1; Ctrl-C or "
            "SIGTERM stops it after the running requests",
            *(config.model_name, host, port, host, port),
        )
        # Written when the port is bound and the model loaded: whoever started us waits for it.
        if config.status_file is not None:
            pid = os.getpid()
            status = {"pid": pid, "create_time": start_time(pid), "port": port}
            write_atomically(config.status_file, json.dumps(status))
        try:
            await server.serve(sockets=[listener])
        finally:
            await engine.close()
    logger.info("stopped")
