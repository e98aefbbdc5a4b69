"""`phi3 azure provision | quota | cancel`: what only Azure has, apart from the journey."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console
from ..errors import UsageError
from ..recipe import Recipe
from .common import add_command, add_recipe, add_rehearse, current_run, recipe_of

if TYPE_CHECKING:
    from ..targets.azure.clients import Clients
    from ..targets.azure.sizes import Need

_ABOUT = "make what a run on Azure needs, look at the GPU quota, cancel a job"


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser(
        "azure",
        help=_ABOUT,
        description=_ABOUT[0].upper() + _ABOUT[1:] + ".",
        epilog="example:\n  phi3 azure provision training/recipes/phi3-mini-lora.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run_command=lambda _args: _no_command(parser), debug=False)
    inner = parser.add_subparsers(dest="azure_command", metavar="COMMAND")
    _add_provision(inner)
    _add_quota(inner)
    cancel = add_command(
        inner,
        "cancel",
        "cancel the jobs of a run that still work; they bill until then",
        "phi3 azure cancel --run phi3-mini-azure",
        run_cancel,
    )
    cancel.add_argument("--run", metavar="NAME", required=True, help="which run")
    add_rehearse(cancel)
    cancel.set_defaults(on="azure")


def _add_provision(inner: Any) -> None:
    parser = add_command(
        inner,
        "provision",
        "make what is missing: group, workspace, identity, roles, hub, project, GPU cluster",
        "phi3 azure provision training/recipes/phi3-mini-lora.yaml azure.location=eastus",
        run_provision,
    )
    add_recipe(parser)
    add_rehearse(parser)
    parser.set_defaults(on="azure")
    parser.add_argument(
        "--least-privilege",
        action="store_true",
        help="give the identity only what a deployment needs (azure.least_privilege=true)",
    )


def _add_quota(inner: Any) -> None:
    parser = add_command(
        inner,
        "quota",
        "show the GPU quota that a recipe needs, or ask for more",
        "phi3 azure quota --request 48",
        run_quota,
    )
    add_recipe(parser)
    add_rehearse(parser)
    parser.set_defaults(on="azure")
    parser.add_argument("--request", type=int, metavar="CORES", help="ask for so many in all")
    parser.add_argument("--family", metavar="NAME", help="of this family (default: the recipe's)")


def _no_command(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2


def run_provision(args: argparse.Namespace) -> int:
    """Make what is missing, a line for each step; 1 when one failed."""
    words = [*args.words, *(["azure.least_privilege=true"] if args.least_privilege else [])]
    recipe = recipe_of(words, "azure")
    from ..targets.azure.provision import Step, provision

    clients = _clients(recipe)

    def report(step: Step) -> None:
        if args.output == "text":
            console.out.print(step.text(), markup=False)

    if args.output == "text":
        for line in clients.place.lines():
            console.note(line)
    with console.progress_bar("provision") as progress:
        done = provision(clients, recipe, progress, report)
    if args.output == "json":
        console.print_json(done.manifest())
    return 0


def run_quota(args: argparse.Namespace) -> int:
    """Show what is needed, used and allowed, or ask for more; 1 when it does not suffice."""
    recipe = recipe_of(args.words, "azure")
    from ..targets.azure.sizes import quota_needs, short_of_quota

    clients = _clients(recipe)
    found = quota_needs(clients, recipe)
    if args.request is not None:
        return _request(args, clients, found)
    short = short_of_quota(found)
    if args.output == "json":
        console.print_json([{**vars(need), "enough": need not in short} for need in found])
    else:
        for need in found:
            mark = "too little" if need in short else "enough"
            console.out.print(f"{mark:<10} {need.text()}", markup=False)
        if short:
            cores = max((need.used or 0) + need.cores for need in short)
            console.out.print(f"Ask for more with: phi3 azure quota --request {cores}")
    return 1 if short else 0


def _request(args: argparse.Namespace, clients: Clients, found: list[Need]) -> int:
    from ..targets.azure.sizes import request_quota, short_of_quota

    family = args.family or (short_of_quota(found) or found)[0].family
    if args.request < 1:
        raise UsageError(f"--request {args.request}: expected the number of cores, at least 1")
    with console.progress_bar("quota") as progress:
        answer = request_quota(clients, family, args.request, progress)
    if args.output == "json":
        console.print_json({"family": family, "requested": args.request, "answer": answer})
    else:
        console.out.print(f"{family}, {args.request} cores: {answer}", markup=False)
    return 0


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel what the run folder names and Azure still works on."""
    run = current_run(args)
    from ..targets.azure.clients import Clients
    from ..targets.azure.jobs import cancel_all
    from ..targets.azure.place import place_of, section_of
    from ..targets.azure.target import refuse_without_extra

    refuse_without_extra()
    lines = cancel_all(Clients(place_of(run), section_of(run).poll), run)
    if args.output == "json":
        console.print_json({"cancelled": lines})
    else:
        for line in lines or ["No job of this run is at work."]:
            console.out.print(line, markup=False)
    return 0


def _clients(recipe: Recipe) -> Clients:
    from ..targets.azure.clients import Clients
    from ..targets.azure.place import find_place
    from ..targets.azure.target import refuse_without_extra

    refuse_without_extra()
    place = find_place(recipe.azure, os.environ, Path.cwd())
    return Clients(place, recipe.azure.poll)
