"""`phi3 flow pack | image | serve | push`: a flow made ready for other places, or served here."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .. import console
from ..bundle.image import BASE, write_image
from .common import add_command
from .flow_arguments import add_extra, add_flow, add_flow_argument, flow_of
from .flow_push import add_push

OUT = Path("dist")


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser(
        "flow", help="pack a flow for Foundry or Studio, or as a container"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add in (_add_pack, _add_image, _add_serve, add_push):
        add(actions)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FOLDER", help=f"where to (default: {OUT})"
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


def run_pack(args: argparse.Namespace) -> int:
    """Pack; print what lies where."""
    from ..bundle import pack

    bundle = pack(flow_of(args), args.out, feed=args.feed, image=args.image, extra=args.add)
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
        "write a container context that serves the flow: small, without a store, not as root",
        "phi3 flow image flows/phi3_chat && docker build -t phi3-flow dist/phi3_chat-image",
        run_image,
    )
    add_flow_argument(image)
    image.add_argument("--feed", metavar="URL", help="install the tool from this package index")
    image.add_argument(
        "--base", default=BASE, metavar="IMAGE", help=f"image to build on (default: {BASE})"
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
        "serve the flow as `pf flow serve` does, endpoint and key from the environment alone",
        'eval "$(phi3 env)" && phi3 flow serve flows/phi3_chat --port 8080',
        run_serve,
    )
    add_flow_argument(serve)
    serve.add_argument("--engine", choices=("flask", "fastapi"), default="fastapi")
    serve.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1")
    serve.add_argument("--port", type=int, default=8080, help="default 8080")
    serve.add_argument(
        "--workers", type=int, default=1, help="processes that answer (fastapi); default 1"
    )


def run_serve(args: argparse.Namespace) -> int:
    """Serve in this process until Ctrl-C."""
    from ..flow_server import serve_flow

    flow = flow_of(args)
    url = f"http://{args.host}:{args.port}/score"
    if args.output == "json":
        console.print_json({"flow": flow, "url": url, "engine": args.engine})
    else:
        console.err.print(f"Serving {flow} at {url} until Ctrl-C", markup=False)
    serve_flow(flow, host=args.host, port=args.port, engine=args.engine, workers=args.workers)
    return 0
