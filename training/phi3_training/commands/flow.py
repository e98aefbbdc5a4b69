"""`phi3 flow pack | image | serve | push | to-agent`: a flow for other places, or served here."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import Any

from .. import console
from ..current import all_runs
from ..errors import UsageError
from ..flow.bundle import BASE, pack, write_image
from ..progress import note
from ..project import FLOW, find
from ..run import Run
from ..targets import is_here
from . import HELP
from .common import add_command, add_rehearse, current_run

# What the commands of `phi3 flow` share: which flow, and what of it travels.


def add_flow(parser: argparse.ArgumentParser) -> None:
    """FLOW, feed, image and further files: what `pack` and whatever builds on it take."""
    add_flow_argument(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--feed",
        metavar="URL",
        help="install the tool from this package index instead of carrying its source",
    )
    source.add_argument(
        "--image", metavar="NAME", help="image of the compute session, with the tool installed"
    )
    add_extra(parser)


def add_flow_argument(parser: argparse.ArgumentParser) -> None:
    """FLOW, by default the shipped chat flow."""
    parser.add_argument(
        "flow", nargs="?", type=Path, metavar="FLOW", help=f"the flow's folder (default: {FLOW})"
    )


def add_extra(parser: argparse.ArgumentParser) -> None:
    """--add FILE."""
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="FILE",
        help="another file of the flow's folder that its code reads (repeatable)",
    )


def flow_of(args: argparse.Namespace) -> Path:
    """The flow folder that is meant."""
    return args.flow or find(FLOW)


# `phi3 flow push`: packs a flow and creates it in the run's workspace and Foundry project.


def add_push(actions: Any) -> None:
    """`push`, among the other actions of `phi3 flow`."""
    push = add_command(
        actions,
        "push",
        "upload a flow to the run's workspace and Foundry project",
        "phi3 flow push flows/phi3_chat --run phi3-mini-azure",
        run_push,
    )
    add_flow(push)
    push.add_argument(
        "--run", metavar="NAME", help="which run on Azure (default: the current one there)"
    )
    push.add_argument(
        "--to",
        choices=("both", "workspace", "project"),
        default="both",
        help="Azure ML's Studio shows the workspace's flows, Foundry the project's",
    )
    push.set_defaults(on="azure")
    add_rehearse(push)


def run_push(args: argparse.Namespace) -> int:
    """Push the flow and print where to open it."""
    from ..targets.azure.target import AzureTarget

    target = AzureTarget()
    run = _run(args)
    with tempfile.TemporaryDirectory() as scratch, console.progress_bar("push") as progress:
        note(progress, "packing")
        bundle = pack(
            flow_of(args),
            Path(scratch),
            feed=args.feed,
            image=args.image,
            extra=args.add,
        )
        pushed = target.push(run, bundle, args.to, progress)
    if args.output == "json":
        console.print_json(pushed)
        return 0
    for item in pushed:
        said = "already exists" if item["state"] == "exists" else "created"
        console.out.print(f"{item['display_name']} {said} in {item['workspace']}", markup=False)
        if item["page"]:
            console.out.print(f"  open it at {item['page']}", markup=False)
    return 0


def _run(args: argparse.Namespace) -> Run:
    if args.run:
        return current_run(args)
    runs = [run for run in all_runs(args.runs) if not is_here(run)]
    if not runs:
        raise UsageError(
            f"No run under {args.runs} is on Azure; create one with: phi3 up --on azure"
        )
    return runs[0]


OUT = Path("dist")


def register_flow(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("flow", help=HELP["flow"])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add in (_add_pack, _add_image, _add_serve, add_push, _add_to_agent):
        add(actions)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FOLDER", help=f"output folder (default: {OUT})"
    )


def _add_pack(actions: Any) -> None:
    pack = add_command(
        actions,
        "pack",
        "write a folder and a zip file of the flow, ready to import",
        "phi3 flow pack flows/phi3_chat --out dist",
        run_pack,
    )
    add_flow(pack)
    _add_out(pack)
    pack.add_argument(
        "--overwrite", action="store_true", help="replace an earlier zip file that differs"
    )


def run_pack(args: argparse.Namespace) -> int:
    """Pack; print where the results are."""
    from ..flow.bundle import pack

    bundle = pack(
        flow_of(args),
        args.out,
        feed=args.feed,
        image=args.image,
        extra=args.add,
        overwrite=args.overwrite,
    )
    if args.output == "json":
        console.print_json(
            {
                "folder": bundle.folder,
                "zip": bundle.zip_path,
                "sha256": bundle.sha256,
                "files": list(bundle.files),
            }
        )
        return 0
    console.out.print(f"Folder: {bundle.folder} ({len(bundle.files)} files)", markup=False)
    console.out.print(f"Zip:    {bundle.zip_path}", markup=False)
    console.out.print(f"SHA256: {bundle.sha256}", markup=False)
    return 0


def _add_image(actions: Any) -> None:
    image = add_command(
        actions,
        "image",
        "write a container build context that serves the flow: small, no connection store, not "
        "root",
        "phi3 flow image flows/phi3_chat && docker build -t phi3-flow dist/phi3_chat-image",
        run_image,
    )
    add_flow_argument(image)
    image.add_argument("--feed", metavar="URL", help="install the tool from this package index")
    image.add_argument(
        "--base", default=BASE, metavar="IMAGE", help=f"base image (default: {BASE})"
    )
    add_extra(image)
    _add_out(image)


def run_image(args: argparse.Namespace) -> int:
    """Write the context; print how it is built and run."""
    context = write_image(flow_of(args), args.out, base=args.base, feed=args.feed, extra=args.add)
    if args.output == "json":
        console.print_json(
            {"folder": context.folder, "start": context.start, "files": context.files}
        )
        return 0
    shown = shlex.quote(str(context.folder))
    for line in (
        f"Image:  {context.folder} ({len(context.files)} files)",
        f"Build:  docker build -t phi3-flow {shown}",
        "Run:    docker run -p 8080:8080 -e PHI3_ENDPOINT -e PHI3_KEY --read-only --tmpfs /tmp "
        "phi3-flow",
    ):
        console.out.print(line, markup=False)
    return 0


def _add_serve(actions: Any) -> None:
    serve = add_command(
        actions,
        "serve",
        "serve the flow like `pf flow serve`, with endpoint and key from the environment only",
        'eval "$(phi3 env)" && phi3 flow serve flows/phi3_chat --port 8080',
        run_serve,
    )
    add_flow_argument(serve)
    serve.add_argument("--engine", choices=("flask", "fastapi"), default="fastapi")
    serve.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1")
    serve.add_argument("--port", type=int, default=8080, help="default 8080")
    serve.add_argument(
        "--workers", type=int, default=1, help="worker processes (fastapi only; default 1)"
    )


def run_serve(args: argparse.Namespace) -> int:
    """Serve in this process until Ctrl-C."""
    from ..flow.server import serve_flow

    flow = flow_of(args)
    url = f"http://{args.host}:{args.port}/score"
    if args.output == "json":
        console.print_json({"flow": flow, "url": url, "engine": args.engine})
    else:
        console.err.print(f"Loading {flow}, to serve it at {url} until Ctrl-C …", markup=False)
    serve_flow(flow, host=args.host, port=args.port, engine=args.engine, workers=args.workers)
    return 0


def _add_to_agent(actions: Any) -> None:
    to_agent = add_command(
        actions,
        "to-agent",
        "convert a flow to Agent Framework, proved on your own rows: same requests, same answers",
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


def run_to_agent(args: argparse.Namespace) -> int:
    """Convert; print what was written and proved."""
    from ..agent.convert import convert

    out = args.out or Path(args.flow.resolve().name + "_agent")
    done = convert(args.flow, args.data, out)
    if args.output == "json":
        console.print_json(
            {
                "folder": done.folder,
                "files": list(done.files),
                "rows": done.rows,
                "requests": done.requests,
            }
        )
        return 0
    for line in (
        f"Folder: {done.folder} ({len(done.files)} files)",
        f"Proved: {done.rows} rows whole and streamed, {done.requests} requests, all the same",
        f'Run:    eval "$(phi3 env)" && .venv-agent/bin/python {done.folder}/agent.py "A question"',
    ):
        console.out.print(line, markup=False)
    return 0
