"""The check as a whole: wheel, clean place, probe; one finding after the other.

Writes into a temporary folder that is gone afterwards; starts pip and one Python.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..doctor.finding import Finding, Group
from ..errors import StageError
from . import wheel as wheels
from .install import Place, beside, fresh

TOOL = Group("tool")
PROBE = Path(__file__).with_name("probe.py")
PROBE_SECONDS = 120


def check_tool(project: Path, *, new_environment: bool = False) -> Iterator[Finding]:
    """Build the wheel of the clone `project` and look for the tool in it."""
    with tempfile.TemporaryDirectory(prefix="phi3-tool-") as scratch:
        try:
            wheel = wheels.build(project, Path(scratch))
        except StageError as error:
            yield wheels.GROUP.fault("build", str(error), "fix that, then: phi3 doctor --tool")
            return
        yield wheels.GROUP.ok("build", wheel.name)
        constraints = project / "constraints/local.txt" if new_environment else None
        yield from check_wheel(
            wheel, Path(scratch), new_environment=new_environment, constraints=constraints
        )


def check_wheel(
    wheel: Path,
    scratch: Path,
    *,
    new_environment: bool = False,
    constraints: Path | None = None,
) -> Iterator[Finding]:
    """Look into a wheel, install it below `scratch`, and look for the tool there."""
    yield from wheels.contents(wheel)
    try:
        place = fresh(wheel, scratch, constraints) if new_environment else beside(wheel, scratch)
        yield TOOL.ok("install", place.said)
        yield from search(place)
    except StageError as error:
        yield TOOL.fault("install", str(error), "fix that, then: phi3 doctor --tool")


def search(place: Place) -> Iterator[Finding]:
    """Look for the tool where the wheel is installed; StageError if the search itself fails."""
    command = [str(place.python), "-I", str(PROBE), str(place.folder)]
    done = wheels.run(command, PROBE_SECONDS, "The search for the tool")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise StageError(
            f"The search for the tool failed: {wheels.last_line(done.stderr)}"
        ) from None
    for check, ok, said, fix in found:
        yield TOOL.ok(check, said) if ok else TOOL.fault(check, said, fix)
