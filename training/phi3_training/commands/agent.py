"""`phi3 agent chat | serve | ui | pack`: the tuned model on Microsoft Agent Framework.

Runs in the environment that has the framework; endpoint and key go there as environment variables.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi3_tool.index import INDEX_VARIABLE, open_index

from .. import console
from ..agent.environment import agent_python, command, environment
from ..run import Run
from . import HELP
from .chat import access_of, has_screen, settings_in, streaming_url
from .common import add_command, add_on, add_which_run
from .rag import index_of
from .rag_compare import DEFAULT_DOCUMENTS

#: Conversations of `phi3 agent chat --session`, in the folder of the runs.
SESSIONS = Path(".agent/sessions")


def register_agent(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("agent", help=HELP["agent"])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    chat = add_command(
        actions,
        "chat",
        "talk to the agent in the terminal",
        'phi3 agent chat "What does the Mossback tent cost?"',
        run_chat,
        own_output=True,
    )
    chat.add_argument("question", nargs="?", help="one question (default: a conversation)")
    chat.add_argument(
        "--session",
        metavar="NAME",
        help="keep the conversation in a file under that name, and continue it",
    )
    _add_options(chat)
    serve = add_command(
        actions,
        "serve",
        "serve the agent over HTTP: OpenAI's chat completions and Responses, and the flow's /score",
        "PHI3_AGENT_KEY=… phi3 agent serve --port 8090",
        run_serve,
        own_output=True,
    )
    _add_address(serve, 8090)
    serve.add_argument(
        "--sessions",
        type=Path,
        metavar="FOLDER",
        help="keep what previous_response_id refers to in files (default: in memory, the last "
        "1000)",
    )
    _add_options(serve)
    ui = add_command(
        actions,
        "ui",
        "open Microsoft's DevUI with the agent and the workflow in it",
        "phi3 agent ui",
        run_ui,
        own_output=True,
    )
    _add_address(ui, 8091)
    ui.add_argument("--no-browser", action="store_true", help="only print the page's address")
    _add_options(ui)
    _add_pack(actions)


def _add_pack(actions: Any) -> None:
    pack = add_command(
        actions,
        "pack",
        "write a folder for Foundry's hosted agents: container file, manifest, sources, no key",
        "phi3 agent pack --name phi3-support --out dist",
        run_pack,
    )
    pack.add_argument("--name", default="phi3-agent", help="the agent's name in Foundry")
    pack.add_argument(
        "--out", type=Path, default=Path("dist"), metavar="FOLDER", help="default: dist"
    )


def run_pack(args: argparse.Namespace) -> int:
    """Pack; print what to do with it."""
    from ..agent.pack import pack_agent

    packed = pack_agent(args.out, args.name)
    if args.output == "json":
        console.print_json({"folder": packed.folder, "files": list(packed.files)})
        return 0
    console.out.print(f"Folder: {packed.folder} ({len(packed.files)} files)", markup=False)
    console.out.print(
        f"Next:   see {packed.folder / 'README.md'} (this project has not deployed one to Azure)",
        markup=False,
    )
    return 0


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1")
    parser.add_argument("--port", type=int, default=port, help=f"default {port}")


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Which run, and how it is asked; the defaults are the flow's."""
    add_which_run(parser)
    add_on(parser, "the current run there, else the one connected last there")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default 1")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    parser.add_argument(
        "--rag", action="store_true", help="answer from the documents of `phi3 rag index`"
    )
    parser.add_argument(
        "--documents",
        default=DEFAULT_DOCUMENTS,
        metavar="NAME",
        help=f"with --rag: which, as `phi3 rag index --run NAME` (default: {DEFAULT_DOCUMENTS})",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="print OpenTelemetry spans on standard error, without prompts and answers",
    )
    parser.set_defaults(output="text")  # for what these commands share with others


def run_chat(args: argparse.Namespace) -> int:
    """One question, or a conversation."""
    words = ["chat"]
    if args.session:
        words += ["--session", args.session, "--sessions", str(args.runs / SESSIONS)]
    # After `--`, so that a question may begin with a dash.
    question = ["--", args.question] if args.question is not None else []
    return _start(args, words, question)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    words = ["serve", "--host", args.host, "--port", str(args.port)]
    return _start(args, words + (["--sessions", str(args.sessions)] if args.sessions else []))


def run_ui(args: argparse.Namespace) -> int:
    """Serve DevUI until Ctrl-C."""
    words = ["ui", "--host", args.host, "--port", str(args.port)]
    return _start(args, words + (["--open"] if has_screen() and not args.no_browser else []))


def _start(args: argparse.Namespace, words: list[str], last: list[str] | None = None) -> int:
    """Run the agent's own program with the endpoint in its environment; its exit status."""
    python = agent_python()
    access, known = access_of(args)
    url = streaming_url(access.endpoint)
    if url != access.endpoint:
        access, known["dialect"] = replace(access, endpoint=url), None
    if access.token_provider is not None:
        console.err.print("The endpoint uses Entra tokens; this one is valid for about an hour.")
    from ..flow.page import environment_of

    more = {}
    if args.rag:
        index = index_of(Run(args.runs / args.documents)).absolute()
        open_index(index)  # reports a missing index before anything else
        more[INDEX_VARIABLE] = str(index)
    started = command(python, [*words, *_options(args), *(last or [])])
    variables = environment(environment_of(settings_in(access, known)), more)
    with subprocess.Popen(started, env=variables) as process:  # noqa: S603 - our own program
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                with contextlib.suppress(KeyboardInterrupt):  # the terminal sends it to both
                    return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _options(args: argparse.Namespace) -> list[str]:
    words = [
        f"--temperature={args.temperature}",
        f"--top-p={args.top_p}",
        f"--max-new-tokens={args.max_new_tokens}",
    ]
    words += [f"--system={args.system}"] if args.system else []
    words += ["--rag"] if args.rag else []
    return words + (["--trace"] if args.trace else [])
