"""`phi3 agent chat | serve | ui | pack`: the tuned model on Microsoft Agent Framework.

Runs in the environment that has the framework; endpoint and key go there as environment variables.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
from pathlib import Path

from phi3_tool.index import INDEX_VARIABLE

from .. import console
from ..agent.environment import agent_python, command, environment
from ..rag.index_files import checked_index
from ..run import Run
from . import HELP
from .chat import has_screen
from .endpoint import endpoint_of
from .options import (
    Subparsers,
    add_address,
    add_command,
    add_endpoint,
    add_no_browser,
    add_out_folder,
    add_rag,
    add_sampling,
    sampling_of,
)

#: Conversations of `phi3 agent chat --session`, in the folder of the runs.
SESSIONS = Path(".agent/sessions")


def register_agent(subparsers: Subparsers) -> None:
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
    serve = add_command(
        actions,
        "serve",
        "serve the agent over HTTP: OpenAI's chat completions and Responses, and the flow's /score",
        "PHI3_AGENT_KEY=… phi3 agent serve --port 8090",
        run_serve,
        own_output=True,
    )
    add_address(serve, 8090)
    serve.add_argument(
        "--sessions",
        type=Path,
        metavar="FOLDER",
        help="keep what previous_response_id refers to in files (default: in memory, the last "
        "1000)",
    )
    ui = add_command(
        actions,
        "ui",
        "open Microsoft's DevUI with the agent and the workflow in it",
        "phi3 agent ui",
        run_ui,
        own_output=True,
    )
    add_address(ui, 8091)
    add_no_browser(ui)
    for agent in (chat, serve, ui):
        add_endpoint(agent)
        add_sampling(agent)
        add_rag(agent)
        agent.add_argument(
            "--trace",
            action="store_true",
            help="print OpenTelemetry spans on standard error, without prompts and answers",
        )
        agent.set_defaults(output="text")  # for what these commands share with others
    pack = add_command(
        actions,
        "pack",
        "write a folder for Foundry's hosted agents: container file, manifest, sources, no key",
        "phi3 agent pack --name phi3-support --out dist",
        run_pack,
    )
    pack.add_argument("--name", default="phi3-agent", help="the agent's name in Foundry")
    add_out_folder(pack)


def run_pack(args: argparse.Namespace) -> int:
    """Pack; print what to do with it."""
    from ..agent.pack import pack_agent

    packed = pack_agent(args.out, args.name)
    readme = packed.folder / "README.md"
    return console.show(
        args.output,
        {"folder": packed.folder, "files": list(packed.files)},
        f"Folder: {packed.folder} ({len(packed.files)} files)",
        f"Next:   see {readme} (this project has not deployed one to Azure)",
    )


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
    # First: without an environment for the agent, no endpoint needs to be up.
    python = agent_python()
    # In the environment, never among the words: `ps` shows those to everybody.
    variables = endpoint_of(args).streaming().variables()
    more = {}
    if args.rag:
        more[INDEX_VARIABLE] = str(checked_index(Run(args.runs / args.documents)))
    # With `=`, so that a value may begin with a dash.
    words += [f"--{name.replace('_', '-')}={value}" for name, value in sampling_of(args).items()]
    words += [f"--system={args.system}"] if args.system else []
    words += [f"--{name}" for name in ("rag", "trace") if getattr(args, name)]
    started = command(python, [*words, *(last or [])])
    with subprocess.Popen(started, env=environment(variables, more)) as process:  # noqa: S603 - our own program
        # `kill` reaches this process alone; the agent must end with it.
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                with contextlib.suppress(KeyboardInterrupt):  # the terminal sends it to both
                    return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
