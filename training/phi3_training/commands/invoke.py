"""`phi3 invoke`: score a random held-out conversation, as the tutorials do, with our own client.

Reads the run's held-out rows; shows what was expected beside what came back.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from .. import console
from ..errors import StageError
from ..run import Run
from .common import add_command, add_on, add_rehearse, current_run
from .talk import access_of

Messages = list[dict[str, str]]


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "invoke",
        "score a random held-out conversation at the endpoint",
        "phi3 invoke --on azure",
        run_invoke,
    )
    parser.add_argument("--run", metavar="NAME", help="which run (default: the last connected)")
    add_on(parser, "of the runs there, the last connected")
    add_rehearse(parser)
    parser.add_argument(
        "--deployment", metavar="NAME", help="this deployment, whatever share of traffic it has"
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
    outputs = run.require("dataset", "phi3 up")["outputs"]
    part = outputs.get("validation")
    path = run.path / str(part["path"]) if part else Path()
    lines = path.read_text(encoding="utf-8").splitlines() if part and path.is_file() else []
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise StageError(f"The run {run.name!r} holds no held-out chats; make them: phi3 up")
    number, line = random.Random(seed).choice(rows)  # noqa: S311 - no secret depends on it
    return number, json.loads(line)["messages"]
