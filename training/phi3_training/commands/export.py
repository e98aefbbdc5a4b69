"""`phi3 export`: the tuned model in another form, held against what it was made of."""

from __future__ import annotations

import argparse
from typing import Any

from .. import console
from .common import add_command, tuned_run

# Spelled out, so that `--help` needs no heavy package.
FORMATS = ("merged", "onnx-int4", "onnx-int8", "onnx-fp32")


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "export",
        "write the tuned model in another form and prove that it still is the same model",
        "phi3 export --to onnx-int4 --run phi3-tiny",
        run_export,
    )
    parser.add_argument("--to", choices=FORMATS, required=True, help="the form")
    parser.add_argument("--run", metavar="NAME", help="which run (default: the last trained)")


def run_export(args: argparse.Namespace) -> int:
    """Export and compare; exit 1 when the export is too far from the original."""
    from ..export import export

    run = tuned_run(args)
    with run.lock(), console.progress_bar("export") as progress:
        check = export(run, args.to, progress)
    manifest = run.require(f"export-{args.to}", "phi3 export")
    if args.output == "json":
        console.print_json(manifest)
    else:
        _show(str(run.path / manifest["path"]), check)
    return 0 if check["passed"] else 1


def _show(path: str, check: dict[str, Any]) -> None:
    console.out.print(f"Written: {path}", markup=False)
    if "note" in check:
        console.out.print(check["note"], markup=False)
        return
    title = f"Compared with {check['compared_with']}, {check['prompts']} fixed prompts"
    console.table(title, ["figure", "measured", "limit"], list(_rows(check)))
    for problem in check["problems"]:
        console.out.print(f"Too far: {problem}", markup=False)


def _rows(check: dict[str, Any]) -> list[list[str]]:
    limits = check["limits"]
    rows = [
        ["tokens chosen alike", f"{check['token_agreement']:.2%}",
         f"at least {limits['token_agreement']:.1%}"],
        ["mean KL (nats)", f"{check['mean_kl']:.2g}", f"at most {limits['mean_kl']:g}"],
        ["KL at the worst prompt", f"{check['worst_kl']:.2g}", f"at most {limits['worst_kl']:g}"],
    ]  # fmt: skip
    if held := check.get("held_out"):
        before, after = held["exact_match_before"], held["exact_match"]
        rows.append(
            [f"exact match, {held['rows']} held-out rows", f"{before:.1%} → {after:.1%}",
             f"falls by at most {limits['lost_answers']:.1%}"]
        )  # fmt: skip
    if layers := check.get("layers"):
        rows.append(
            [f"furthest layer, {layers['layer']}", f"{layers['largest']:.2g}",
             f"at most {limits['weights']:g}"]
        )  # fmt: skip
    return rows
