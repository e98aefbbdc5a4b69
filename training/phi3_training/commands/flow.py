"""`phi3 flow pack | image | serve | push | to-agent`: a flow for other places, or served here."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path

from .. import console
from ..errors import UsageError
from ..flow.bundle import BASE, pack, write_image
from ..progress import note
from ..project import FLOW, find
from ..runs import all_runs
from ..targets import is_here
from . import HELP
from .common import current_run
from .options import Subparsers, add_address, add_command, add_out_folder, add_rehearse, add_run


def register_flow(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("flow", help=HELP["flow"])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    packs = add_command(
        actions,
        "pack",
        "write a folder and a zip file of the flow, ready to import",
        "phi3 flow pack flows/phi3_chat --out dist",
        run_pack,
    )
    add_out_folder(packs)
    packs.add_argument(
        "--overwrite", action="store_true", help="replace an earlier zip file that differs"
    )
    image = add_command(
        actions,
        "image",
        "write a container build context that serves the flow: small, no connection store, "
        "non-root",
        "phi3 flow image flows/phi3_chat && docker build -t phi3-flow dist/phi3_chat-image",
        run_image,
    )
    image.add_argument("--feed", metavar="URL", help="install the tool from this package index")
    image.add_argument(
        "--base", default=BASE, metavar="IMAGE", help=f"base image (default: {BASE})"
    )
    add_out_folder(image)
    serve = add_command(
        actions,
        "serve",
        "serve the flow like `pf flow serve`, with endpoint and key from the environment only",
        'eval "$(phi3 env)" && phi3 flow serve flows/phi3_chat --port 8080',
        run_serve,
    )
    serve.add_argument(
        "--engine", choices=("flask", "fastapi"), default="fastapi", help="default fastapi"
    )
    add_address(serve, 8080)
    serve.add_argument(
        "--workers", type=int, default=1, help="worker processes (fastapi only; default 1)"
    )
    push = add_command(
        actions,
        "push",
        "upload a flow to the run's workspace and Foundry project",
        "phi3 flow push flows/phi3_chat --run phi3-mini-azure",
        run_push,
    )
    add_run(push, "which run on Azure (default: the current one there)")
    push.add_argument(
        "--to",
        choices=("both", "workspace", "project"),
        default="both",
        help="Azure ML's Studio shows the workspace's flows, Foundry the project's",
    )
    push.set_defaults(on="azure")
    add_rehearse(push)
    # Optional, and the last positional of each: `phi3 flow pack` alone means the shipped flow.
    for each in (packs, image, serve, push):
        each.add_argument(
            "flow",
            nargs="?",
            type=Path,
            metavar="FLOW",
            help=f"the flow's folder (default: {FLOW})",
        )
    for each in (packs, image, push):
        each.add_argument(
            "--add",
            action="append",
            default=[],
            metavar="FILE",
            help="another file of the flow's folder that its code reads (repeatable)",
        )
    for each in (packs, push):
        # The tool comes from one place: its source, a feed, or the image.
        tool = each.add_mutually_exclusive_group()
        tool.add_argument(
            "--feed",
            metavar="URL",
            help="install the tool from this package index instead of carrying its source",
        )
        tool.add_argument(
            "--image", metavar="NAME", help="image of the compute session, with the tool installed"
        )
    to_agent = add_command(
        actions,
        "to-agent",
        "convert a flow to Agent Framework, verified on your own rows: same requests, same answers",
        "phi3 flow to-agent flows/phi3_chat --data flows/phi3_chat/samples.jsonl",
        run_to_agent,
    )
    to_agent.add_argument("flow", type=Path, metavar="FLOW", help="the flow's folder")
    to_agent.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL with the flow's inputs in each line; no model is asked",
    )
    to_agent.add_argument(
        "--out", type=Path, metavar="FOLDER", help="output folder (default: FLOW's name + _agent)"
    )


def run_pack(args: argparse.Namespace) -> int:
    """Pack; print where the results are."""
    bundle = pack(
        args.flow or find(FLOW),
        args.out,
        feed=args.feed,
        image=args.image,
        extra=args.add,
        overwrite=args.overwrite,
    )
    return console.show(
        args.output,
        {
            "folder": bundle.folder,
            "zip": bundle.zip_path,
            "sha256": bundle.sha256,
            "files": list(bundle.files),
        },
        f"Folder: {bundle.folder} ({len(bundle.files)} files)",
        f"Zip:    {bundle.zip_path}",
        f"SHA256: {bundle.sha256}",
    )


def run_push(args: argparse.Namespace) -> int:
    """Pack the flow, create it in the run's workspace and project, print where to open it."""
    from ..targets.azure.target import AzureTarget

    target = AzureTarget()
    if args.run:
        run = current_run(args)
    else:
        away = [run for run in all_runs(args.runs) if not is_here(run)]
        if not away:
            raise UsageError(
                f"No run under {args.runs} is on Azure; create one with: phi3 up --on azure"
            )
        run = away[0]
    # Packed for this upload alone: what is sent holds no transcript and no data.
    with tempfile.TemporaryDirectory() as scratch, console.progress_bar("push") as progress:
        note(progress, "packing")
        flow = args.flow or find(FLOW)
        bundle = pack(flow, Path(scratch), feed=args.feed, image=args.image, extra=args.add)
        pushed = target.push(run, bundle, args.to, progress)
    lines = []
    for item in pushed:
        # The same content was pushed before: nothing was uploaded again.
        done = "already exists" if item.state == "exists" else "created"
        lines.append(f"{item.display_name} {done} in {item.workspace}")
        if item.page:
            lines.append(f"  open it at {item.page}")
    return console.show(args.output, [asdict(item) for item in pushed], *lines)


def run_image(args: argparse.Namespace) -> int:
    """Write the context; print how it is built and run."""
    flow = args.flow or find(FLOW)
    context = write_image(flow, args.out, base=args.base, feed=args.feed, extra=args.add)
    return console.show(
        args.output,
        {"folder": context.folder, "start": context.start, "files": context.files},
        f"Image:  {context.folder} ({len(context.files)} files)",
        f"Build:  docker build -t phi3-flow {shlex.quote(str(context.folder))}",
        "Run:    docker run -p 8080:8080 -e PHI3_ENDPOINT -e PHI3_KEY --read-only --tmpfs /tmp "
        "phi3-flow",
    )


def run_serve(args: argparse.Namespace) -> int:
    """Serve in this process until Ctrl-C."""
    from ..flow.server import serve_flow

    flow = args.flow or find(FLOW)
    url = f"http://{args.host}:{args.port}/score"
    if args.output == "json":
        console.print_json({"flow": flow, "url": url, "engine": args.engine})
    else:
        console.err.print(f"Loading {flow}, to serve it at {url} until Ctrl-C …", markup=False)
    serve_flow(flow, host=args.host, port=args.port, engine=args.engine, workers=args.workers)
    return 0


def run_to_agent(args: argparse.Namespace) -> int:
    """Convert; print what was written and verified."""
    from ..agent.convert import convert

    # In the current folder, not inside the flow.
    out = args.out or Path(args.flow.resolve().name + "_agent")
    done = convert(args.flow, args.data, out)
    return console.show(
        args.output,
        {
            "folder": done.folder,
            "files": list(done.files),
            "rows": done.rows,
            "requests": done.requests,
        },
        f"Folder: {done.folder} ({len(done.files)} files)",
        f"Verified: {done.rows} rows whole and streamed, {done.requests} requests, all the same",
        f'Run:    eval "$(phi3 env)" && .venv-agent/bin/python {done.folder}/agent.py "A question"',
    )
