"""`phi3 batch`: thousands of lines through the endpoint, far faster than `pf run`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from phi3_tool.address import is_loopback
from phi3_tool.history import DEFAULT_CONTEXT_LENGTH

from .. import console
from ..batch import Answers, Tally, asked_of, asker, read_lines, run_batch, verdict
from .common import add_command
from .talk import access_of

CONCURRENCY = 64
INPUTS = ("input_data", "chat_history", "system_prompt", "temperature", "top_p", "max_new_tokens")


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    batch = add_command(
        subparsers,
        "batch",
        "ask every line of a JSONL file, many at once; go on where it stopped",
        "phi3 batch questions.jsonl --map input_data=question --out answers.jsonl",
        run_lines,
    )
    batch.add_argument("data", type=Path, metavar="DATA", help="JSONL with a column input_data")
    batch.add_argument(
        "--out", type=Path, metavar="FILE", help="where to (default: DATA's name + .answers.jsonl)"
    )
    batch.add_argument(
        "--map",
        type=_pair,
        action="append",
        default=[],
        metavar="INPUT=COLUMN",
        help=f"take an input of the flow from another column; inputs: {', '.join(INPUTS)}",
    )
    batch.add_argument("--resume", action="store_true", help="only what is missing or failed")
    batch.add_argument(
        "--details", action="store_true", help="add the data's columns, `error` and `seconds`"
    )
    batch.add_argument(
        "--concurrency",
        type=_count,
        default=CONCURRENCY,
        metavar="N",
        help=f"lines at once (default {CONCURRENCY}; fewer by itself where the endpoint throttles)",
    )
    batch.add_argument("--run", metavar="NAME", help="which run (default: the last connected)")
    batch.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    batch.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    batch.add_argument("--top-p", type=float, default=1.0, help="default 1")
    batch.add_argument("--max-new-tokens", type=int, default=256, help="default 256")


def run_lines(args: argparse.Namespace) -> int:
    """Ask; exit 1 with the mend where a line has no answer."""
    renamed = dict(args.map)
    lines = read_lines(args.data, renamed)
    access, known = access_of(args)
    length = known.pop("context_length", DEFAULT_CONTEXT_LENGTH)
    defaults = {
        "system_prompt": args.system,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    out = args.out or args.data.with_suffix(".answers.jsonl")
    # Few retries of the client's own: a throttled line waits its turn again, and all slow down.
    with access.client(**known, max_retries=2) as client:
        endpoint = portless(client.endpoint)
        asked = asked_of(args.data, renamed, defaults, endpoint, args.details)
        answers = Answers(out, asked, resume=args.resume)
        ask = asker(client.chat, defaults, length)
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
    before = f", {tally.kept} were there before" if tally.kept else ""
    text = f"{out}: {tally.answered} answered{before}, {tally.failed} failed"
    console.out.print(text, markup=False)


def _again(args: argparse.Namespace, out: Path) -> str:
    """The command that does the rest: this one's own words, and --resume."""
    words = ["phi3", "batch", str(args.data), "--out", str(out), "--resume"]
    words += [word for ours, theirs in args.map for word in ("--map", f"{ours}={theirs}")]
    words += ["--details"] if args.details else []
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
