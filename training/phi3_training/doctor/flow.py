"""The flow: does Prompt flow take it, and are the tools of its nodes found.

Works on a temporary copy, in a process of its own: `pf flow validate` writes beside what it checks
and imports the flow's code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ..bundle import FlowSource, copy_flow
from ..errors import UsageError
from .finding import Finding, Group

HERE = Group("flow")
SECONDS = 120
PF_MAIN = "from promptflow._cli.pf import main; main()"
_SETTINGS = "telemetry:\n  enabled: false\ntrace:\n  destination: none\n"


def flow(folder: Path, *, promptflow_there: bool = True) -> Iterator[Finding]:
    """The folder, what Prompt flow says of it, its tools."""
    try:
        source = FlowSource.read(folder)
        yield HERE.ok("folder", f"{folder}: {len(source.dag['nodes'])} node(s)")
        with tempfile.TemporaryDirectory(prefix="phi3-doctor-") as scratch:
            yield from _checked(source, Path(scratch), promptflow_there)
    except UsageError as error:
        yield HERE.fault("folder", str(error), "name the flow's folder: phi3 doctor --flow FOLDER")
        for check in ("validate", "tools"):
            yield HERE.skipped(check, "there is no flow to check")
    yield _package()


def _checked(source: FlowSource, scratch: Path, promptflow_there: bool) -> Iterator[Finding]:
    if not promptflow_there:
        for check in ("validate", "tools"):
            yield HERE.skipped(check, "Prompt flow is not installed")
        return
    copy = scratch / source.name
    copy_flow(source, copy)
    quiet_home(scratch)
    try:
        verdict = _validate(copy)
    except subprocess.TimeoutExpired:
        verdict = {"errors": [{"message": f"no verdict within {SECONDS} s"}]}
    faults = [_message(fault) for fault in verdict.get("errors", [])]
    mend = f"pf flow validate --source {source.folder}"
    if faults:
        yield HERE.fault("validate", "; ".join(dict.fromkeys(faults)), f"see it whole: {mend}")
    else:
        yield HERE.ok("validate", "Prompt flow takes it")
    yield _tools(source, copy)


def quiet_home(folder: Path) -> Path:
    """A Prompt flow home in a folder of one's own: no usage report, no service for traces."""
    home = folder / ".promptflow"
    home.mkdir()
    (home / "pf.yaml").write_text(_SETTINGS, encoding="utf-8")
    return home


def _validate(copy: Path) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603 - Prompt flow's own command line
        [sys.executable, "-c", PF_MAIN, "flow", "validate", "--source", str(copy)],
        cwd=copy.parent,
        env={**os.environ, "PF_HOME_DIRECTORY": str(copy.parent / ".promptflow")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    start = done.stdout.find("{")
    try:
        verdict = json.loads(done.stdout[start:]) if start >= 0 else None
    except ValueError:
        verdict = None
    if isinstance(verdict, dict) and (done.returncode == 0 or verdict.get("errors")):
        return verdict
    lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
    return {"errors": [{"message": lines[-1]}]}


def _message(fault: Any) -> str:
    message = str(fault.get("message", fault)) if isinstance(fault, dict) else str(fault)
    return message.strip().splitlines()[0]


def _tools(source: FlowSource, copy: Path) -> Finding:
    """Every node's tool is in what Prompt flow found."""
    try:
        found = json.loads((copy / ".promptflow" / "flow.tools.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return HERE.skipped("tools", "Prompt flow wrote no list of the tools it found")
    known = {*found.get("code", {}), *found.get("package", {})}
    wanted = {*source.tool_sources, *source.package_tools}
    missing = sorted(wanted - known)
    if missing:
        return HERE.fault(
            "tools",
            f"not found: {', '.join(missing)}",
            "install what the nodes import (requirements.txt of the flow); for phi3_tool:"
            ' pip install "phi3-promptflow[flow]"',
        )
    return HERE.ok("tools", f"found: {', '.join(sorted(wanted))}")


def _package() -> Finding:
    """Prompt flow lists the package tool where its entry point is installed."""
    names = {entry.name for entry in metadata.entry_points(group="package_tools")}
    if "phi3_tool" in names:
        return HERE.ok("package tool", "installed: Prompt flow lists Phi-3 chat among its tools")
    return HERE.warning(
        "package tool",
        "not installed: editors do not offer Phi-3 chat (the chat flow carries its source along)",
        'pip install "phi3-promptflow[flow]"',
    )
