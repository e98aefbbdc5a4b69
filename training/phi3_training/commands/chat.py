"""`phi3 batch`: thousands of lines through the endpoint, far faster than `pf run`."""

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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from phi3_tool.client import Phi3Client
from phi3_tool.connection import (
    ENTRA,
    ConnectionSettings,
    environment_names_endpoint,
    is_loopback,
    parse_address,
    same_endpoint,
)
from phi3_tool.entra import entra_tokens
from phi3_tool.grounding import (
    NOT_IN_DOCUMENTS,
    citations,
    grounded,
    look_up,
    standalone_question,
    with_sources,
)
from phi3_tool.history import DEFAULT_CONTEXT_LENGTH, to_messages
from phi3_tool.index import INDEX_VARIABLE, Hit, hits_of, open_index

from .. import console
from ..batch import (
    INPUTS,
    Answers,
    Ask,
    Tally,
    asked_of,
    asker,
    read_lines,
    run_batch,
    verdict,
)
from ..current import is_current, remarks
from ..errors import StageError, UsageError
from ..manifests import ConnectionManifest, DatasetManifest, EndpointManifest
from ..packages import has_prompt_flow
from ..project import FLOW, RAG_FLOW, find
from ..run import Run
from ..targets import HERE, Access, get_target, target_of
from . import HELP
from .common import (
    add_command,
    add_on,
    add_recipe,
    add_rehearse,
    add_which_run,
    current_run,
    has_model_here,
    journey_of,
    typed_questions,
)
from .rag import index_of
from .rag_compare import DEFAULT_DOCUMENTS, add_compare, run_chat_compare

# `phi3 chat --web`: Prompt flow's chat page in the browser, until Ctrl-C.

DEFAULTS = {"system": "", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 256}
_FLOW_NAMES = {"system": "system_prompt"}  # where the flow's input has another name


def add_web(parser: argparse.ArgumentParser) -> None:
    """--web and --no-browser."""
    parser.add_argument("--web", action="store_true", help="use Prompt flow's chat page instead")
    parser.add_argument(
        "--no-browser", action="store_true", help="with --web: only print the page's address"
    )


def run_web(args: argparse.Namespace, settings: ConnectionSettings, url: str) -> int:
    """Open the page and stay until Ctrl-C; `url` is where the endpoint streams."""
    from ..flow.page import chat_page

    if args.question is not None:
        raise UsageError("phi3 chat --web takes no question; type it into the page")
    streaming = (
        settings if url == settings.endpoint else replace(settings, endpoint=url, dialect=None)
    )
    changed = {
        _FLOW_NAMES.get(name, name): getattr(args, name)
        for name, default in DEFAULTS.items()
        if getattr(args, name) != default
    }
    console.err.print("Opening Prompt flow's chat page; this takes a few seconds …")
    with _terminated_like_interrupted():
        try:
            flow = find(RAG_FLOW if args.rag else FLOW)
            with chat_page(flow, streaming, changed) as page:
                _announce(args, page.url)
                page.wait()
        except KeyboardInterrupt:
            console.err.print("Closed; the conversation was not saved.")
    return 0


def _announce(args: argparse.Namespace, url: str) -> None:
    if args.output == "json":
        console.print_json({"url": url})
        sys.stdout.flush()
    else:
        console.out.print(f"Chat page: {url}", markup=False)
        console.err.print("Ctrl-C closes it.")
    if not args.no_browser and has_screen():
        webbrowser.open(url)


def has_screen() -> bool:
    """Whether there is a desktop for a browser; a text browser would take the terminal over."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """`kill` cleans up as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# `phi3 chat | env | serve`: talk to an endpoint, hand it to other clients, run it in front.

OPENAI_PATH = "/v1/chat/completions"


def register_chat(subparsers: Any) -> None:
    """Add the commands of this module."""
    chat = add_command(
        subparsers,
        "chat",
        HELP["chat"],
        'phi3 chat "Who founded Microsoft?"',
        run_chat,
    )
    chat.add_argument("question", nargs="?", help="one question (default: a conversation)")
    add_which_run(chat)
    add_on(chat, "the current run there, else the one connected last there")
    add_rehearse(chat)
    chat.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    chat.add_argument("--top-p", type=float, default=1.0, help="default 1")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    chat.add_argument(
        "--rag", action="store_true", help="answer from the documents of `phi3 rag index`"
    )
    chat.add_argument(
        "--documents",
        default=DEFAULT_DOCUMENTS,
        metavar="NAME",
        help="with --rag or --compare: which, as `phi3 rag index --run NAME` "
        f"(default: {DEFAULT_DOCUMENTS})",
    )
    add_compare(chat)
    add_web(chat)
    env = add_command(
        subparsers,
        "env",
        HELP["env"],
        'eval "$(phi3 env)"',
        run_env,
    )
    add_which_run(env)
    add_on(env, "the current run there, else the one connected last there")
    serve = add_command(
        subparsers,
        "serve",
        HELP["serve"],
        "PHI3_KEY=… phi3 serve serve.port=8080",
        run_serve,
    )
    add_recipe(serve)


def access_of(args: argparse.Namespace) -> tuple[Access, dict[str, Any]]:
    """How to reach the endpoint that is meant, and what else a client should know of it.

    That of --run, else the environment's, else the current run's: from the run's own Prompt flow
    connection, on Azure from Azure itself. Says on standard error which one it is.
    """
    if args.run or not environment_names_endpoint():
        run = current_run(args)
        _say_which(args, run)
        cloud = get_target(target_of(run)).cloud
        if cloud is not None:
            return cloud.access(run), {}
        settings = _local_settings(run)
    else:
        settings = ConnectionSettings.from_environment()
        if args.output == "text":
            console.err.print(
                f"Endpoint {settings.endpoint}, which PHI3_ENDPOINT names",
                markup=False,
                style="dim",
            )
    known: dict[str, Any] = {"deployment": settings.deployment, "dialect": settings.dialect}
    if settings.context_length:
        known["context_length"] = settings.context_length
    tokens = entra_tokens() if settings.auth == ENTRA else None
    return Access(settings.endpoint, settings.key or None, tokens), known


def _say_which(args: argparse.Namespace, run: Run) -> None:
    """Whose answers these will be, and what is wrong with them."""
    if args.output != "text":
        return
    current = " (current)" if is_current(run) else ""
    console.err.print(f"Run {run.name}{current}", markup=False, style="dim")
    for remark in remarks(run):
        console.err.print(f"Note: {remark}", markup=False, style="yellow")


def settings_in(access: Access, known: Mapping[str, Any]) -> ConnectionSettings:
    """The same as one record, for clients that only know keys: an Entra token is the key."""
    key = access.token_provider() if access.token_provider else access.key
    return ConnectionSettings(access.endpoint, key or "", **known)


def _local_settings(run: Run) -> ConnectionSettings:
    from ..flow.store import stored_connection
    from ..targets.local import settings_from_server

    again = f"phi3 up --run {run.name}"
    run.require(ConnectionManifest if has_prompt_flow() else EndpointManifest)
    if get_target(HERE).status(run)["endpoint"]["state"] != "up":
        raise StageError(f"The endpoint of the run {run.name!r} is down; start it with: {again}")
    if not has_prompt_flow():
        return settings_from_server(run)
    manifest = run.require(ConnectionManifest)
    name = manifest.own or manifest.name
    settings = ConnectionSettings.from_connection(stored_connection(name))
    if not same_endpoint(settings.endpoint, run.require(EndpointManifest).endpoint):
        raise StageError(
            f"The connection {name} now points to {settings.endpoint}, which is not the endpoint "
            f"of the run {run.name!r}; write it again with: {again}"
        )
    return settings


def run_chat(args: argparse.Namespace) -> int:
    """One question, or a conversation that streams."""
    if args.output == "json" and args.question is None and not args.web:
        raise UsageError('-o json answers one question: phi3 chat -o json "Who founded Microsoft?"')
    if args.compare:
        return run_chat_compare(args)
    access, known = access_of(args)
    parameters = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    url = streaming_url(access.endpoint)
    if args.rag:
        # The flow on the chat page looks here as well.
        os.environ[INDEX_VARIABLE] = str(index_of(Run(args.runs / args.documents)).absolute())
        open_index(Path(os.environ[INDEX_VARIABLE]))  # reports a missing index before anything else
    if args.web:
        return run_web(args, settings_in(access, known), url)
    if url != access.endpoint:
        known["dialect"] = None
    length = known.pop("context_length", DEFAULT_CONTEXT_LENGTH)
    with replace(access, endpoint=url).client(**known) as client:
        if args.question is not None:
            return _ask_once(client, args, parameters)
        return converse(client, args, parameters, length - args.max_new_tokens)


def streaming_url(endpoint: str) -> str:
    """Our own endpoint streams on a second route; any other URL is used as it is."""
    parts = urlsplit(endpoint)
    if parts.path == "/score" and parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return urlunsplit(parts._replace(path=OPENAI_PATH))
    return endpoint


def _ask_once(client: Phi3Client, args: argparse.Namespace, parameters: Mapping[str, Any]) -> int:
    if args.output == "json":
        prompt = _prompt(args, (), args.question)
        answer = {"question": args.question, "answer": NOT_IN_DOCUMENTS}
        if prompt.text:
            reply = client.chat(to_messages((), prompt.text, args.system), **parameters)
            answer["answer"] = reply.text
        cited = {"citations": citations(answer["answer"], prompt.hits)} if args.rag else {}
        console.print_json({**answer, **cited})
    else:
        _answer(client, args, parameters, (), args.question)
    return 0


def converse(
    client: Phi3Client, args: argparse.Namespace, parameters: Mapping[str, Any], room: int
) -> int:
    """Questions and answers until an empty line; what does not fit into `room` is left out."""
    console.err.print("Type a question; an empty line, Ctrl-C or Ctrl-D ends the conversation.")
    history: list[dict[str, dict[str, str]]] = []
    for question in typed_questions():
        console.out.print("Model: ", end="", style="bold green")
        answer = _answer(client, args, parameters, history, question, room)
        history.append({"inputs": {"input_data": question}, "outputs": {"answer": answer}})
    return 0


class _Prompt(NamedTuple):
    """The message for the model and the passages in it; no text where no passage fits."""

    text: str
    hits: list[Hit]


def _prompt(
    args: argparse.Namespace, history: Sequence[Mapping[str, Any]], question: str
) -> _Prompt:
    """The question, with --rag as the flow `phi3_rag_chat` asks it: the same bytes."""
    if not args.rag:
        return _Prompt(question, [])
    query, _ = standalone_question(question, history)
    made = grounded(question, look_up(query, "", Path()))
    return _Prompt(made["text"], hits_of(made["passages"]))


def _answer(
    client: Phi3Client,
    args: argparse.Namespace,
    parameters: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    question: str,
    room: int | None = None,
) -> str:
    """Ask and print the answer piece by piece; where no passage fits, the model is not asked."""
    prompt = _prompt(args, history, question)
    pieces = iter([NOT_IN_DOCUMENTS])
    if prompt.text:
        messages = to_messages(history, prompt.text, args.system, max_tokens=room)
        pieces = with_sources(client.stream(messages, **parameters), prompt.hits)
    return _shown(pieces)


def _shown(answer: Iterator[str]) -> str:
    pieces = []
    for piece in answer:
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    sys.stdout.write("\n")
    return "".join(pieces)


def run_env(args: argparse.Namespace) -> int:
    """Print shell exports for `eval`, so nothing else goes to standard output."""
    from ..flow.page import environment_of

    access, known = access_of(args)
    if access.token_provider is not None:
        console.err.print("The endpoint uses Entra tokens; this one is valid for about an hour.")
    values = environment_of(settings_in(access, known))
    if args.output == "json":
        console.print_json(values)
    else:
        for name, value in values.items():
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
        key = secrets.token_urlsafe(32)
        console.err.print("PHI3_KEY is not set; generated a key for this server, shown only here:")
        console.err.print(f"  {key}", markup=False)
    return serve_in_front(journey.recipe, journey.run, key)


# `phi3 invoke`: score a random held-out conversation, as the tutorials do, with our own client.
# Reads the run's held-out rows; shows the expected answer next to the actual one.

Messages = list[dict[str, str]]


def register_invoke(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "invoke",
        HELP["invoke"],
        "phi3 invoke --on azure",
        run_invoke,
    )
    add_which_run(parser)
    add_on(parser, "the current run there, else the one connected last there")
    add_rehearse(parser)
    parser.add_argument(
        "--deployment", metavar="NAME", help="this deployment, regardless of its share of traffic"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same row again")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default 256")


def run_invoke(args: argparse.Namespace) -> int:
    """Draw a row, ask, show."""
    run = current_run(args)
    number, messages = _draw(run, args.seed)
    expected = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    asked = messages if expected is None else messages[:-1]
    access, known = access_of(args)
    known.pop("context_length", None)
    if args.deployment:
        known["deployment"] = args.deployment
    with access.client(**known) as client:
        reply = client.chat(asked, temperature=0.0, max_new_tokens=args.max_new_tokens)
    found = {
        "line": number,
        "messages": asked,
        "expected": expected,
        "answer": reply.text,
        "deployment": reply.deployment,
        "request_id": reply.request_id,
    }
    if args.output == "json":
        console.print_json(found)
        return 0
    console.out.print(f"Held-out row {number} of the run {run.name}", style="dim", markup=False)
    for message in asked:
        console.out.print(f"{message['role']}: {message['content']}", markup=False)
    if expected is not None:
        console.out.print(f"expected: {expected}", markup=False, style="dim")
    console.out.print(f"answered: {reply.text}", markup=False, style="bold green")
    return 0


def _draw(run: Run, seed: int | None) -> tuple[int, Messages]:
    """A row of the held-out chats and its line number."""
    part = run.require(DatasetManifest).outputs.get("validation")
    path = run.path / part.path if part else Path()
    # Not splitlines(), which also cuts at U+2028 inside of a text.
    lines = path.read_text(encoding="utf-8").split("\n") if part and path.is_file() else []
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise StageError(f"The run {run.name!r} has no held-out chats; create them with: phi3 up")
    number, line = random.Random(seed).choice(rows)  # noqa: S311 - no secret depends on it
    turns = json.loads(line)["messages"]
    return number, [{"role": turn["role"], "content": turn["content"]} for turn in turns]


CONCURRENCY = 64


def register_batch(subparsers: Any) -> None:
    """Add the command of this module."""
    batch = add_command(
        subparsers,
        "batch",
        HELP["batch"],
        "phi3 batch questions.jsonl --map input_data=question --out answers.jsonl",
        run_lines,
    )
    batch.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="JSONL, CSV, JSON or parquet; the question in input_data, question, prompt, input or "
        "query",
    )
    batch.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="output file (default: DATA's name + .answers.jsonl)",
    )
    batch.add_argument(
        "--map",
        type=_pair,
        action="append",
        default=[],
        metavar="INPUT=COLUMN",
        help=f"read an input of the flow from another column; inputs: {', '.join(INPUTS)}",
    )
    batch.add_argument(
        "--resume", action="store_true", help="send only lines that are missing or failed"
    )
    batch.add_argument(
        "--details", action="store_true", help="add the data's columns, `error` and `seconds`"
    )
    batch.add_argument(
        "--concurrency",
        type=_count,
        default=CONCURRENCY,
        metavar="N",
        help=f"lines in parallel (default {CONCURRENCY}; lowered automatically while the endpoint "
        f"throttles)",
    )
    batch.add_argument(
        "--agent",
        action="store_true",
        help="ask through the agent of `phi3 agent`: the same requests, the same answers",
    )
    add_which_run(batch)
    batch.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    batch.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    batch.add_argument("--top-p", type=float, default=1.0, help="default 1")
    batch.add_argument("--max-new-tokens", type=int, default=256, help="default 256")


def run_lines(args: argparse.Namespace) -> int:
    """Ask; exit 1 with the fix where a line has no answer."""
    renamed = dict(args.map)
    lines = read_lines(args.data, renamed, lambda text: console.err.print(text, markup=False))
    access, known = access_of(args)
    defaults = {
        "system_prompt": args.system,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    out = args.out or args.data.with_suffix(".answers.jsonl")
    endpoint = portless(parse_address(access.endpoint, known.get("dialect")).shown)
    with _asker_of(args, access, known, defaults) as ask:
        asked = asked_of(args.data, renamed, defaults, endpoint, args.details)
        answers = Answers(out, asked, resume=args.resume)
        with console.progress_bar("Batch") as step:
            tally = run_batch(
                ask,
                lines,
                answers,
                concurrency=args.concurrency,
                details=args.details,
                step=step,
            )
    _show(args, out, tally)
    verdict(tally, _again(args, out))
    return 0


@contextmanager
def _asker_of(
    args: argparse.Namespace, access: Access, known: dict[str, Any], defaults: Mapping[str, Any]
) -> Iterator[Ask]:
    """What asks a line: the client, or with --agent the agent in its own process."""
    if args.agent:
        from ..agent.asker import agent_asker

        with agent_asker(settings_in(access, known), defaults) as ask:
            yield ask
        return
    length = known.pop("context_length", DEFAULT_CONTEXT_LENGTH)
    # Few retries of the client's own: a throttled line waits its turn again, and all slow down.
    with access.client(**known, max_retries=2) as client:
        yield asker(client.chat, defaults, length)


def portless(endpoint: str) -> str:
    """The endpoint's name; on this machine without the port, which changes with each start."""
    parts = urlsplit(endpoint)
    local = parts.hostname is not None and is_loopback(parts.hostname)
    return urlunsplit(parts._replace(netloc=parts.hostname or "")) if local else endpoint


def _show(args: argparse.Namespace, out: Path, tally: Tally) -> None:
    if args.output == "json":
        console.print_json(
            {
                "out": out,
                "lines": tally.lines,
                "answered": tally.answered,
                "answered_before": tally.kept,
                "failed": tally.failed,
                "failures": tally.failures,
                "not_asked": tally.missing,
            }
        )
        return
    before = f", {tally.kept} already there" if tally.kept else ""
    text = f"{out}: {tally.answered} answered{before}, {tally.failed} failed"
    console.out.print(text, markup=False)


def _again(args: argparse.Namespace, out: Path) -> str:
    """The command that does the rest: this one's own words, and --resume."""
    words = ["phi3", "batch", str(args.data), "--out", str(out), "--resume"]
    words += [word for ours, theirs in args.map for word in ("--map", f"{ours}={theirs}")]
    words += ["--details"] if args.details else []
    words += ["--agent"] if args.agent else []
    for option, value, default in (
        ("--run", args.run, None),
        ("--system", args.system, ""),
        ("--temperature", args.temperature, 0.0),
        ("--top-p", args.top_p, 1.0),
        ("--max-new-tokens", args.max_new_tokens, 256),
    ):
        words += [option, str(value)] if value != default else []
    return shlex.join(words)


def _pair(text: str) -> tuple[str, str]:
    ours, sign, theirs = text.partition("=")
    if not sign or not theirs or ours not in INPUTS:
        raise argparse.ArgumentTypeError(
            f"expected INPUT=COLUMN, the input one of {', '.join(INPUTS)}; got {text!r}"
        )
    return ours, theirs


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1024, got {text!r}")
    return int(text)
