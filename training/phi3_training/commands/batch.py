"""`phi3 batch`: thousands of lines through the endpoint, far faster than `pf run`."""

from __future__ import annotations

import argparse
import shlex
from contextlib import ExitStack
from pathlib import Path

from .. import console
from ..batch import INPUTS, Answers, asked_of, asker, read_lines, run_batch, verdict
from . import HELP
from .endpoint import endpoint_of
from .options import Subparsers, add_command, add_run, add_sampling, number, sampling_of

# As many connections as the client's pool keeps open (phi3_tool.transport.POOL_SIZE).
CONCURRENCY = 64
# Of the options that shape a request, what --resume must be given again.
_REPEATED = {"run": None, "system": "", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 256}


def register_batch(subparsers: Subparsers) -> None:
    """Add `phi3 batch`."""
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
        type=number(1, 1024),
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
    add_run(batch)
    add_sampling(batch)


def _pair(text: str) -> tuple[str, str]:
    ours, sign, theirs = text.partition("=")
    if not sign or not theirs or ours not in INPUTS:
        raise argparse.ArgumentTypeError(
            f"expected INPUT=COLUMN, the input one of {', '.join(INPUTS)}; got {text!r}"
        )
    return ours, theirs


def run_lines(args: argparse.Namespace) -> int:
    """Ask; exit 1 with the fix where a line has no answer."""
    renamed = dict(args.map)
    lines = read_lines(args.data, renamed, lambda text: console.err.print(text, markup=False))
    endpoint = endpoint_of(args)
    defaults = {"system_prompt": args.system, **sampling_of(args)}
    out = args.out or args.data.with_suffix(".answers.jsonl")
    with ExitStack() as stack:
        if args.agent:  # in its own process
            from ..agent.worker import agent_asker

            ask = stack.enter_context(agent_asker(endpoint.settings(), defaults))
        else:
            # Few retries of the client's own: a throttled line waits its turn again, and all slow
            # down.
            client = stack.enter_context(endpoint.client(max_retries=2))
            ask = asker(client.chat, defaults, endpoint.context)
        asked = asked_of(args.data, renamed, defaults, endpoint.name, args.details)
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
    counts = {
        "out": out,
        "lines": tally.lines,
        "answered": tally.answered,
        "answered_before": tally.answered_before,
        "failed": tally.failed,
        "failures": tally.failures,
        "not_asked": tally.missing,
    }
    before = f", {tally.answered_before} already there" if tally.answered_before else ""
    text = f"{out}: {tally.answered} answered{before}, {tally.failed} failed"
    console.show(args.output, counts, text)
    # This command's own words, and --resume: what an error tells to type must work as it stands.
    words = ["phi3", "batch", str(args.data), "--out", str(out), "--resume"]
    words += [word for ours, theirs in args.map for word in ("--map", f"{ours}={theirs}")]
    words += [f"--{name}" for name in ("details", "agent") if getattr(args, name)]
    for name, default in _REPEATED.items():
        value = getattr(args, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value != default else []
    # Last, because it raises: the counts are shown in either case.
    verdict(tally, shlex.join(words))
    return 0
