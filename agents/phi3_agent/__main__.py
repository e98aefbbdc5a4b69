"""`python -m phi3_agent chat | serve | ui | rows`: what `phi3 agent` starts in this environment.

The endpoint and its key come from PHI3_ENDPOINT and PHI3_KEY, never from the command line.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from agent_framework.observability import disable_instrumentation, enable_instrumentation

from phi3_tool.errors import ConfigurationError

from .agent import Documents, create_agent
from .client import MAX_NEW_TOKENS, Phi3ChatClient, phi3_error
from .conversation import Conversations, FileConversations, MemoryConversations


def run(args: argparse.Namespace) -> int:
    """One command; raises the framework's exceptions."""
    if args.command == "rows":  # its connections come with the rows: no client is made here
        disable_instrumentation()
        from .rows import main as serve_rows

        return serve_rows(args.folder)
    if args.trace:
        print_traces()
    else:
        # No spans are made that nobody collects.
        disable_instrumentation()
    client = Phi3ChatClient()
    conversations: Conversations = (
        FileConversations(args.sessions) if args.sessions else MemoryConversations()
    )
    agent = create_agent(
        client,
        instructions=args.system or None,
        # A server's client names its conversation itself (previous_response_id): see serve.py.
        conversations=conversations if args.command != "serve" else None,
        documents=Documents() if args.rag else None,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_new_tokens,
    )
    if args.command == "chat":
        from .chat import talk

        return talk(agent, args.question, args.session)
    if args.command == "ui":
        from .ui import show

        return show(agent, client, rag=args.rag, host=args.host, port=args.port, browse=args.open)
    from .serve import serve

    return serve(agent, conversations, host=args.host, port=args.port, rag=args.rag)


def print_traces() -> None:
    """`--trace`: one JSON object per span on standard error, without prompts and answers.

    Raises ConfigurationError without opentelemetry-sdk.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
    except ModuleNotFoundError:
        raise ConfigurationError(
            "Traces need opentelemetry-sdk, which is not installed in this environment; install "
            f"it with: {sys.executable} -m pip install opentelemetry-sdk"
        ) from None
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stderr)))
    trace.set_tracer_provider(provider)
    enable_instrumentation(enable_sensitive_data=False)


def main() -> int:
    """Exit status 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    # Without help texts: `phi3 agent --help` is the one that people read, and it starts this.
    parser = argparse.ArgumentParser(prog="phi3 agent", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    chat = commands.add_parser("chat")
    chat.add_argument("question", nargs="?")
    chat.add_argument("--session", default="")
    serve, ui = commands.add_parser("serve"), commands.add_parser("ui")
    for server, port in ((serve, 8090), (ui, 8091)):
        server.add_argument("--host", default="127.0.0.1")
        server.add_argument("--port", type=int, default=port)
    ui.add_argument("--open", action="store_true")
    for command in (chat, serve, ui):
        command.add_argument("--sessions", type=Path)
        command.add_argument("--system", default="")
        command.add_argument("--temperature", type=float, default=0.0)
        command.add_argument("--top-p", type=float, default=1.0)
        command.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
        command.add_argument("--rag", action="store_true")
        command.add_argument("--trace", action="store_true")
    rows = commands.add_parser("rows")
    rows.add_argument("folder", nargs="?", default="")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run(args)
    except KeyboardInterrupt:
        # A thread may wait for the endpoint for minutes; nobody waits for its answer.
        sys.stdout.flush()
        os._exit(130)
    except Exception as error:
        failure = phi3_error(error)
        if failure is None:
            raise
        sys.stderr.write(f"Error: {failure}\n")
        return 2 if isinstance(failure, ConfigurationError) else 1


if __name__ == "__main__":
    sys.exit(main())
