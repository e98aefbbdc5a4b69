"""`phi3 chat | env | serve`: talk to an endpoint, hand it to other clients, run it in front."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from phi3_tool import ConnectionSettings, Phi3Client
from phi3_tool.address import same_endpoint
from phi3_tool.connection import ENTRA, environment_names_endpoint
from phi3_tool.entra import entra_tokens
from phi3_tool.history import DEFAULT_CONTEXT_LENGTH, to_messages

from .. import console
from ..errors import StageError, UsageError
from ..run import Run
from ..targets import Access, CloudTarget, get_target, target_of
from .common import (
    add_command,
    add_on,
    add_recipe,
    add_rehearse,
    current_run,
    has_model_here,
    journey_of,
)
from .webpage import add_web, run_web

OPENAI_PATH = "/v1/chat/completions"


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    chat = add_command(
        subparsers,
        "chat",
        "talk to the tuned model, in the terminal or with --web in the browser",
        'phi3 chat "Who founded Microsoft?"',
        run_chat,
    )
    chat.add_argument("question", nargs="?", help="one question; without it, a conversation")
    chat.add_argument("--run", metavar="NAME", help="which run (default: the last connected)")
    add_on(chat, "of the runs there, the last connected")
    add_rehearse(chat)
    chat.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    chat.add_argument("--top-p", type=float, default=1.0, help="default 1")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    add_web(chat)
    env = add_command(
        subparsers,
        "env",
        "print endpoint and key as shell variables for any other client",
        'eval "$(phi3 env)"',
        run_env,
    )
    env.add_argument("--run", metavar="NAME", help="which run (default: the last connected)")
    add_on(env, "of the runs there, the last connected")
    serve = add_command(
        subparsers,
        "serve",
        "serve the tuned model in the foreground, until Ctrl-C",
        "PHI3_KEY=… phi3 serve serve.port=8080",
        run_serve,
    )
    add_recipe(serve)


def access_of(args: argparse.Namespace) -> tuple[Access, dict[str, Any]]:
    """How to reach the endpoint that is meant, and what else a client should know of it.

    The environment's, else the run's: from its Prompt flow connection, on Azure from Azure itself.
    """
    if not environment_names_endpoint():
        run = current_run(args)
        if target_of(run) != "local":
            return _cloud_access(run), {}
        settings = _local_settings(run)
    else:
        settings = ConnectionSettings.from_environment()
    known: dict[str, Any] = {"deployment": settings.deployment, "dialect": settings.dialect}
    if settings.context_length:
        known["context_length"] = settings.context_length
    tokens = entra_tokens() if settings.auth == ENTRA else None
    return Access(settings.endpoint, settings.key or None, tokens), known


def _settings(access: Access, known: Mapping[str, Any]) -> ConnectionSettings:
    """The same as one record, for what knows keys only: an Entra token stands in for a key."""
    key = access.token_provider() if access.token_provider else access.key
    return ConnectionSettings(access.endpoint, key or "", **known)


def _cloud_access(run: Run) -> Access:
    run.require("endpoint", f"phi3 up --on {target_of(run)} --run {run.name}")
    target: CloudTarget = get_target(target_of(run))  # type: ignore[assignment]  # not local: one
    return target.access(run)


def _local_settings(run: Run) -> ConnectionSettings:
    from ..promptflow_store import stored_connection

    again = f"phi3 up --run {run.name}"
    name = run.require("connection", again)["name"]
    if get_target("local").status(run)["endpoint"]["state"] != "up":
        raise StageError(f"The endpoint of the run {run.name!r} is down; start it with: {again}")
    settings = ConnectionSettings.from_connection(stored_connection(name))
    if not same_endpoint(settings.endpoint, run.require("endpoint", again)["endpoint"]):
        raise StageError(
            f"The connection {name} now leads to {settings.endpoint}, which is not the endpoint of "
            f"the run {run.name!r}; bring this run back with {again}, or keep both by giving one a "
            "connection of its own: connection.name=NAME"
        )
    return settings


def run_chat(args: argparse.Namespace) -> int:
    """One question, or a conversation that streams."""
    if args.output == "json" and args.question is None and not args.web:
        raise UsageError('-o json answers one question: phi3 chat -o json "Who founded Microsoft?"')
    access, known = access_of(args)
    parameters = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    url = streaming_url(access.endpoint)
    if args.web:
        return run_web(args, _settings(access, known), url)
    if url != access.endpoint:
        known["dialect"] = None
    length = known.pop("context_length", DEFAULT_CONTEXT_LENGTH)
    with replace(access, endpoint=url).client(**known) as client:
        if args.question is not None:
            return _ask_once(client, args, parameters)
        return _converse(client, args, parameters, length - args.max_new_tokens)


def streaming_url(endpoint: str) -> str:
    """Our own endpoint streams beside /score; any other URL is used as it is."""
    parts = urlsplit(endpoint)
    if parts.path == "/score" and parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return urlunsplit(parts._replace(path=OPENAI_PATH))
    return endpoint


def _ask_once(client: Phi3Client, args: argparse.Namespace, parameters: Mapping[str, Any]) -> int:
    messages = to_messages((), args.question, args.system)
    if args.output == "json":
        reply = client.chat(messages, **parameters)
        console.print_json({"question": args.question, "answer": reply.text})
    else:
        _stream(client, messages, parameters)
    return 0


def _converse(
    client: Phi3Client, args: argparse.Namespace, parameters: Mapping[str, Any], room: int
) -> int:
    """Questions and answers until an empty line; what does not fit into `room` is left out."""
    console.err.print("Type a question; an empty line, Ctrl-C or Ctrl-D ends the conversation.")
    history: list[dict[str, dict[str, str]]] = []
    while True:
        try:
            question = input("You: ").strip()
        except (EOFError, KeyboardInterrupt):
            console.out.print()
            return 0
        if not question:
            return 0
        console.out.print("Model: ", end="", style="bold green")
        messages = to_messages(history, question, args.system, max_tokens=room)
        answer = _stream(client, messages, parameters)
        history.append({"inputs": {"input_data": question}, "outputs": {"answer": answer}})


def _stream(
    client: Phi3Client, messages: list[dict[str, str]], parameters: Mapping[str, Any]
) -> str:
    pieces = []
    for piece in client.stream(messages, **parameters):
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    sys.stdout.write("\n")
    return "".join(pieces)


def run_env(args: argparse.Namespace) -> int:
    """Print shell exports; made for `eval`, so nothing else goes to standard output."""
    from ..webchat import environment_of

    access, known = access_of(args)
    if access.token_provider is not None:
        console.err.print("The endpoint takes Entra tokens: this one is good for about an hour.")
    values = environment_of(_settings(access, known))
    if args.output == "json":
        console.print_json(values)
    else:
        for name, value in values.items():
            sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    return 0


def run_serve(args: argparse.Namespace) -> int:
    """Serve in this process."""
    from ..targets.local import serve_in_front

    journey = journey_of(args)
    if not has_model_here(journey.run):
        raise UsageError(f"The run {journey.run.name!r} has no model here; make one: phi3 train")
    key = os.environ.get("PHI3_KEY")
    if not key:
        key = secrets.token_urlsafe(32)
        console.err.print("No PHI3_KEY is set: made a key for this server, shown only here:")
        console.err.print(f"  {key}", markup=False)
    return serve_in_front(journey.recipe, journey.run, key)
