"""`phi3 flow pack`: a flow made ready for other places than this clone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import console
from .common import FLOW, add_command, find

OUT = Path("dist")


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("flow", help="pack a flow for Foundry or Studio")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add in (_add_pack,):
        add(actions)


def add_flow(parser: argparse.ArgumentParser) -> None:
    """FLOW, feed, image and further files: what `pack` and whatever builds on it take."""
    parser.add_argument(
        "flow", nargs="?", type=Path, metavar="FLOW", help=f"the flow's folder (default: {FLOW})"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--feed", metavar="URL", help="install the tool from this package index, do not carry it"
    )
    source.add_argument(
        "--image", metavar="NAME", help="image of the compute session, with the tool installed"
    )
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


def _add_pack(actions: Any) -> None:
    pack = add_command(
        actions,
        "pack",
        "write a folder and a zip file of the flow, ready to import",
        "phi3 flow pack flows/phi3_chat --out dist",
        run_pack,
    )
    add_flow(pack)
    pack.add_argument(
        "--out", type=Path, default=OUT, metavar="FOLDER", help=f"where to (default: {OUT})"
    )


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
