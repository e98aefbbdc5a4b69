"""The flow: does Prompt flow take it, and are the tools of its nodes found.

Works on a temporary copy, in a separate process: `pf flow validate` writes next to what it checks
and imports the flow's code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from phi3_tool.connection import ConnectionSettings, environment_names_endpoint
from phi3_tool.errors import ConfigurationError

from ..errors import MissingExtraError, StageError, UsageError
from ..flow import store
from ..flow.bundle import copy_flow
from ..flow.page import PF_MAIN, quiet_home
from ..flow.source import FlowSource
from .endpoint import CONNECTION
from .finding import Finding, Group

HERE = Group("flow")
SECONDS = 120  # `pf flow validate` imports the flow's code, which may be slow to load


def flow(folder: Path, *, promptflow_there: bool = True) -> Iterator[Finding]:
    """The folder, what Prompt flow says of it, its tools."""
    try:
        source = FlowSource.read(folder)
        yield HERE.ok("folder", f"{folder}: {len(source.dag['nodes'])} node(s)")
        with tempfile.TemporaryDirectory(prefix="phi3-doctor-") as scratch:
            if not promptflow_there:
                for check in ("validate", "tools"):
                    yield HERE.skipped(check, "Prompt flow is not installed")
            else:
                copy = Path(scratch) / source.name
                copy_flow(source, copy)
                quiet_home(Path(scratch))  # no usage report, no service left running
                yield _validated(source, copy)
                yield tools_of(source, copy)
    except UsageError as error:
        yield HERE.fault("folder", str(error), "name the flow's folder: phi3 doctor --flow FOLDER")
        for check in ("validate", "tools"):
            yield HERE.skipped(check, "there is no flow to check")
    yield package_tool()


def _validated(source: FlowSource, copy: Path) -> Finding:
    """What `pf flow validate` says of the copy."""
    fix = f"see the full message: pf flow validate --source {source.folder}"
    try:
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
    except subprocess.TimeoutExpired:
        return HERE.fault("validate", f"no result within {SECONDS} s", fix)
    # Its JSON comes after whatever else was printed.
    start = done.stdout.find("{")
    try:
        verdict = json.loads(done.stdout[start:]) if start >= 0 else None
    except ValueError:
        verdict = None
    if isinstance(verdict, dict) and (done.returncode == 0 or verdict.get("errors")):
        errors = verdict.get("errors", [])
        faults = [str(e.get("message", e) if isinstance(e, dict) else e) for e in errors]
    else:
        faults = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it printed nothing"]
    if not faults:
        return HERE.ok("validate", "Prompt flow accepts it")
    # The first line names the fault; the rest is Prompt flow's traceback.
    first_lines = (fault.strip().splitlines()[0] for fault in faults)
    return HERE.fault("validate", "; ".join(dict.fromkeys(first_lines)), fix)


def tools_of(source: FlowSource, copy: Path) -> Finding:
    """Every node's tool is in what Prompt flow found."""
    try:
        listed = json.loads((copy / ".promptflow" / "flow.tools.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return HERE.skipped("tools", "Prompt flow wrote no list of the tools it found")
    # Prompt flow leaves out what it cannot import, with a warning alone.
    known = {*listed.get("code", {}), *listed.get("package", {})}
    wanted = {*source.tool_sources, *source.package_tools}
    missing = sorted(wanted - known)
    if missing:
        return HERE.fault(
            "tools",
            f"not found: {', '.join(missing)}",
            "install what the nodes import (the flow's requirements.txt); for phi3_tool:"
            ' pip install "phi3-promptflow[flow]"',
        )
    return HERE.ok("tools", f"found: {', '.join(sorted(wanted))}")


def package_tool() -> Finding:
    """Prompt flow lists the package tool where its entry point is installed."""
    # By the metadata alone: Prompt flow's own list imports every tool package there is.
    if any(e.name == "phi3_tool" for e in metadata.entry_points(group="package_tools")):
        return HERE.ok("package tool", "installed: Prompt flow lists Phi-3 chat among its tools")
    return HERE.warning(
        "package tool",
        "not installed: editors do not offer Phi-3 chat (the chat flow carries its source along)",
        'pip install "phi3-promptflow[flow]"',
    )


# The connection: is it there, is it whole, and does it lead over https or to this machine.
# Reads the environment or Prompt flow's store; asks nothing over the network.

_CONNECT = "phi3 connect, or create one by hand: connections/README.md"


class Connection:
    """What the checks of the connection found out for those that follow."""

    def __init__(
        self,
        name: str,
        without_store: Callable[[], ConnectionSettings] | None = None,
        *,
        chosen: bool = False,
    ) -> None:
        self.name = name
        self._without_store = without_store
        self._chosen = chosen  # by --run or --connection, which outrank the environment
        self.settings: ConnectionSettings | None = None
        self.why_not = ""

    def checks(self) -> Iterator[Finding]:
        """Present, whole, over https; afterwards `settings` is there, or `why_not` says why not."""
        try:
            # The environment outranks what the flow names.
            stored: object | None = None
            if environment_names_endpoint() and not self._chosen:
                said = "from PHI3_ENDPOINT and PHI3_KEY, which take precedence over the store"
            elif self._without_store is not None:
                stored = self._without_store()
                said = "none without Prompt flow; the run's server hands out endpoint and key"
            else:
                stored = store.stored_connection(self.name)
                said = f"{self.name}, in {store.database()}"
        except (StageError, MissingExtraError, UsageError) as error:
            self.why_not = "there is no connection to use"
            fix = "phi3 up" if self._without_store is not None else _CONNECT
            yield CONNECTION.fault("present", str(error), fix)
            # Listed as skipped, so that nobody takes a missing line for a passed check.
            for check in ("shape", "https"):
                yield CONNECTION.skipped(check, self.why_not)
            return
        yield CONNECTION.ok("present", said)
        faults: list[str] = []
        try:
            self.settings = (
                ConnectionSettings.from_environment()
                if stored is None
                else ConnectionSettings.from_connection(stored)
            )
        except ConfigurationError as error:
            faults = list(error.faults) or [error.message]
            self.why_not = "the connection cannot be used as it is"
        yield from self._shape_and_https(stored, faults)

    def _shape_and_https(self, stored: object | None, faults: list[str]) -> Iterator[Finding]:
        fix = 'eval "$(phi3 env)", or set PHI3_ENDPOINT and PHI3_KEY by hand'
        if stored is not None and self._without_store is None:
            fix = (
                f"phi3 connect connection.name={self.name}, or pf connection update --name "
                f"{self.name} --set configs.endpoint=URL secrets.key=KEY"
            )
        # Plain http has a check of its own below, so it is no fault of the shape.
        plain = [fault for fault in faults if "plain http" in fault]
        others = [fault for fault in faults if fault not in plain]
        if others:
            yield CONNECTION.fault("shape", "; ".join(others), fix)
        else:
            options = {} if self.settings is None else vars(self.settings)
            named = [
                f"{name} {options[name]}"
                for name in ("deployment", "dialect", "context_length")
                if options.get(name) is not None
            ]
            address = "endpoint and key are filled in"
            if self.settings is not None:
                address = f"{self.settings.endpoint.partition('?')[0]}, a key"
            yield CONNECTION.ok("shape", ", ".join([address, *named]))
        if plain:
            yield CONNECTION.fault("https", plain[0], fix)
        elif self.settings is None:
            yield CONNECTION.skipped("https", "the endpoint's address is not usable yet")
        else:
            # Plain http to another host is refused when the settings are read.
            parts = urlsplit(self.settings.endpoint)
            said = f"the key goes over https to {parts.hostname}"
            if parts.scheme.lower() != "https":
                said = "plain http, to this machine only"
            yield CONNECTION.ok("https", said)
