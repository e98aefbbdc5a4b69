"""What the commands of `phi3 flow` share: which flow, and what of it travels."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..project import FLOW, find


def add_flow(parser: argparse.ArgumentParser) -> None:
    """FLOW, feed, image and further files: what `pack` and whatever builds on it take."""
    add_flow_argument(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--feed", metavar="URL", help="install the tool from this package index, do not carry it"
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
