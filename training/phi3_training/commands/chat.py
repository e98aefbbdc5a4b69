"""`phi3 chat | env | serve | invoke`: talk to an endpoint, hand it to other clients, serve it."""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shlex
import signal
import sys
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi3_tool.client import Phi3Client
from phi3_tool.grounding import (
    NOT_IN_DOCUMENTS,
    citations,
    grounded,
    look_up,
    standalone_question,
    with_sources,
)
from phi3_tool.index import INDEX_VARIABLE, Hit, hits_of
from phi3_tool.wire import to_messages

from .. import console
from ..errors import StageError, UsageError
from ..manifests import DatasetManifest
from ..project import FLOW, RAG_FLOW, find
from ..rag.index_files import checked_index
from ..run import Run
from . import HELP
from .common import current_run, has_model_here, journey_of, typed_questions
from .endpoint import Endpoint, endpoint_of
from .options import (
    Subparsers,
    add_command,
    add_endpoint,
    add_max_new_tokens,
    add_no_browser,
    add_rag,
    add_recipe,
    add_rehearse,
    add_sampling,
    sampling_of,
)
from .rag_compare import add_compare, run_chat_compare

# The flow's inputs that the options set, and their defaults there.
_FLOW_DEFAULTS = {"system_prompt": "", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 256}


def register_chat(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    chat = add_command(
        subparsers, "chat", HELP["chat"], 'phi3 chat "Who founded Microsoft?"', run_chat
    )
    chat.add_argument("question", nargs="?", help="one question (default: a conversation)")
    add_endpoint(chat)
    add_rehearse(chat)
    add_sampling(chat)
    add_rag(chat, "--rag or --compare")
    add_compare(chat)
    chat.add_argument("--web", action="store_true", help="use Prompt flow's chat page instead")
    add_no_browser(chat, "with --web: ")
    env = add_command(subparsers, "env", HELP["env"], 'eval "$(phi3 env)"', run_env)
    add_endpoint(env)
    serve = add_command(
        subparsers, "serve", HELP["serve"], "PHI3_KEY=… phi3 serve serve.port=8080", run_serve
    )
    add_recipe(serve)


def register_invoke(subparsers: Subparsers) -> None:
    """Add `phi3 invoke`."""
    invoke = add_command(subparsers, "invoke", HELP["invoke"], "phi3 invoke --on azure", run_invoke)
    add_endpoint(invoke)
    add_rehearse(invoke)
    invoke.add_argument(
        "--deployment", metavar="NAME", help="this deployment, regardless of its share of traffic"
    )
    invoke.add_argument("--seed", type=int, metavar="N", help="draw the same row again")
    add_max_new_tokens(invoke)


def run_chat(args: argparse.Namespace) -> int:
    """One question, or a conversation that streams."""
    if args.output == "json" and args.question is None and not args.web:
        raise UsageError('-o json answers one question: phi3 chat -o json "Who founded Microsoft?"')
    if args.compare:
        return run_chat_compare(args)
    # In OpenAI's dialect where the endpoint is ours: /score answers only when all of it is there.
    endpoint = endpoint_of(args).streaming()
    if args.rag:
        # The flow on the chat page looks here as well.
        os.environ[INDEX_VARIABLE] = str(checked_index(Run(args.runs / args.documents)))
    if args.web:
        return _run_web(args, endpoint)
    with endpoint.client() as client:
        if args.question is None:
            return converse(client, args, endpoint.context - args.max_new_tokens)
        if args.output == "text":
            _answer(client, args, (), args.question)
            return 0
        # Not streamed: JSON is whole or useless.
        prompt, hits = _prompt(args, (), args.question)
        answer = NOT_IN_DOCUMENTS
        if prompt:
            messages = to_messages((), prompt, args.system)
            answer = client.chat(messages, **sampling_of(args)).text
        cited = {"citations": citations(answer, hits)} if args.rag else {}
        console.print_json({"question": args.question, "answer": answer, **cited})
        return 0


def converse(client: Phi3Client, args: argparse.Namespace, room: int) -> int:
    """Questions and answers until an empty line; what does not fit into `room` is left out."""
    console.err.print("Type a question; an empty line, Ctrl-C or Ctrl-D ends the conversation.")
    history: list[dict[str, dict[str, str]]] = []
    for question in typed_questions():
        console.out.print("Model: ", end="", style="bold green")
        answer = _answer(client, args, history, question, room)
        # As Prompt flow keeps it, so that both cut a long conversation in the same way.
        history.append({"inputs": {"input_data": question}, "outputs": {"answer": answer}})
    return 0


def _prompt(
    args: argparse.Namespace, history: Sequence[Mapping[str, Any]], question: str
) -> tuple[str, list[Hit]]:
    """The message for the model, and the passages in it; an empty one where no passage fits.

    With --rag as the flow `phi3_rag_chat` asks it: the same bytes.
    """
    if not args.rag:
        return question, []
    query, _ = standalone_question(question, history)
    prompt = grounded(question, look_up(query, "", Path()))
    return prompt["text"], hits_of(prompt["passages"])


def _answer(
    client: Phi3Client,
    args: argparse.Namespace,
    history: Sequence[Mapping[str, Any]],
    question: str,
    room: int | None = None,
) -> str:
    """Ask and print the answer piece by piece; where no passage fits, the model is not asked."""
    prompt, hits = _prompt(args, history, question)
    pieces: Iterator[str] = iter([NOT_IN_DOCUMENTS])
    if prompt:
        messages = to_messages(history, prompt, args.system, max_tokens=room)
        pieces = with_sources(client.stream(messages, **sampling_of(args)), hits)
    shown = []
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        shown.append(piece)
    sys.stdout.write("\n")
    return "".join(shown)


def _run_web(args: argparse.Namespace, endpoint: Endpoint) -> int:
    """Open Prompt flow's chat page and stay until Ctrl-C."""
    from ..flow.page import chat_page

    if args.question is not None:
        raise UsageError("phi3 chat --web takes no question; type it into the page")
    inputs = {"system_prompt": args.system, **sampling_of(args)}
    changed = {name: v for name, v in inputs.items() if v != _FLOW_DEFAULTS[name]}
    console.err.print("Opening Prompt flow's chat page; this takes a few seconds …")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)  # `kill` cleans up as Ctrl-C does
    try:
        flow = find(RAG_FLOW if args.rag else FLOW)
        with chat_page(flow, endpoint.settings(), changed) as page:
            console.show(args.output, {"url": page.url}, f"Chat page: {page.url}")
            sys.stdout.flush()
            if args.output == "text":
                console.err.print("Ctrl-C closes it.")
            if not args.no_browser and has_screen():
                webbrowser.open(page.url)
            page.wait()
    except KeyboardInterrupt:
        console.err.print("Closed; the conversation was not saved.")
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def has_screen() -> bool:
    """Whether there is a desktop for a browser; a text browser would take the terminal over."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def run_env(args: argparse.Namespace) -> int:
    """Print shell exports for `eval`, so nothing else goes to standard output."""
    values = endpoint_of(args).variables()
    if args.output == "json":
        console.print_json(values)
    else:
        for name, value in values.items():
            # Not through the console: a shell reads it.
            sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    return 0


def run_serve(args: argparse.Namespace) -> int:
    """Serve in this process."""
    from ..targets.local import serve_in_front

    journey = journey_of(args, make_run=False)
    if not has_model_here(journey.run):
        raise UsageError(f"The run {journey.run.name!r} has no model here; train one: phi3 train")
    key = os.environ.get("PHI3_KEY")
    if not key:
        # 256 bits. Shown on standard error, once: standard output may go to a file.
        key = secrets.token_urlsafe(32)
        console.err.print("PHI3_KEY is not set; generated a key for this server, shown only here:")
        console.err.print(f"  {key}", markup=False)
    return serve_in_front(journey.recipe, journey.run, key)


def run_invoke(args: argparse.Namespace) -> int:
    """Ask a random held-out conversation, as the tutorials do; show the expected answer as well."""
    run = current_run(args)
    part = run.require(DatasetManifest).outputs.get("validation")
    path = run.path / part.path if part else Path()
    # Not splitlines(), which also cuts at U+2028 inside of a text.
    lines = path.read_text(encoding="utf-8").split("\n") if part and path.is_file() else []
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise StageError(f"The run {run.name!r} has no held-out chats; create them with: phi3 up")
    number, line = random.Random(args.seed).choice(rows)  # noqa: S311 - no secret depends on it
    messages = [
        {name: t[name] for name in ("role", "content")} for t in json.loads(line)["messages"]
    ]
    # A row's own last answer is shown, not sent.
    expected = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    endpoint = endpoint_of(args)
    if args.deployment:
        endpoint = replace(endpoint, deployment=args.deployment)
    with endpoint.client() as client:
        reply = client.chat(messages, temperature=0.0, max_new_tokens=args.max_new_tokens)
    if args.output == "json":
        console.print_json(
            {
                "line": number,
                "messages": messages,
                "expected": expected,
                "answer": reply.text,
                "deployment": reply.deployment,
                "request_id": reply.request_id,
            }
        )
        return 0
    console.line(f"Held-out row {number} of the run {run.name}", "dim")
    for message in messages:
        console.line(f"{message['role']}: {message['content']}")
    if expected is not None:
        console.line(f"expected: {expected}", "dim")
    console.line(f"answered: {reply.text}", "bold green")
    return 0
