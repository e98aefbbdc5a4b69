"""Looks for the tool the way Prompt flow does; a separate program, run where the wheel is.

`python -I package_probe.py FOLDER` prints a JSON list of findings (check, ok, said, fix) as its
last line.
Imports nothing of this project by itself: what it reports on must come from FOLDER.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

GROUP = "package_tools"
ENTRY_FIX = "correct the entry point in setup.py"
Finding = tuple[str, bool, str, str]


class FaultError(Exception):
    """A fault (check, said, fix) that ends the search."""


def examine(folder: Path) -> Iterator[Finding]:
    """Entry point, listing, the function of each tool, and whether Prompt flow has it."""
    points = [
        point
        for point in importlib.metadata.entry_points(group=GROUP)
        if point.dist is not None and _below(str(point.dist.locate_file("")), folder)
    ]
    if not points:
        said = f"the installed package has no entry point {GROUP!r}"
        fix = "name the listing function under `entry_points` in setup.py"
        raise FaultError("entry point", said, fix)
    point = points[0]
    fix = f"make {point.module} importable, or {ENTRY_FIX}"
    listing = getattr(_load("entry point", point.module, folder, fix), point.attr, None)
    if not callable(listing):
        said = f"the entry point names {point.value}, and there is no such function"
        raise FaultError("entry point", said, ENTRY_FIX)
    try:
        tools = listing()
    except Exception as error:  # noqa: BLE001 - whatever it is, Prompt flow would swallow it
        said = _why(f"run {point.value}()", error)
        raise FaultError("listing", said, f"look at {point.value}") from None
    if not tools:
        said = f"{point.value}() lists no tool: no tool description was found"
        fix = "look at phi3_tool/yamls/*.yaml and at `package_data` in setup.py"
        raise FaultError("listing", said, fix)
    yield "listing", True, f"{len(tools)} listed: {', '.join(tools)}", ""
    from promptflow._core.tools_manager import collect_package_tools

    for identifier, about in tools.items():
        home, name = about["module"], about["function"]
        fix = "install what is missing, or correct `module` in the tool's YAML"
        if not callable(getattr(_load("tool", home, folder, fix), name, None)):
            said = f"{identifier}: {home} has no function {name!r}"
            raise FaultError("tool", said, "correct `function` in the tool's YAML")
        yield "tool", True, f"{home}.{name} can be imported", ""
        # Prompt flow leaves a tool out of its list with no more than a warning in its log.
        entry = collect_package_tools([identifier]).get(identifier)
        if entry is None:
            said = f"Prompt flow does not list {identifier}"
            raise FaultError("prompt flow", said, "see its warning with: pf tool list")
        said = f'Prompt flow lists it as "{entry["name"]}" of {entry["package"]} '
        yield "prompt flow", True, said + entry["package_version"], ""


def _load(check: str, name: str, folder: Path, fix: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise FaultError(check, _why(f"import {name}", error), fix) from None
    if not _below(module.__file__ or "", folder):
        said = f"{name} comes from {module.__file__}, not from the wheel"
        raise FaultError(check, said, "look at `packages` in setup.py")
    return module


def _below(path: str, folder: Path) -> bool:
    return bool(path) and Path(path).resolve().is_relative_to(folder.resolve())


def _why(doing: str, error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"cannot {doing}: {type(error).__name__}: {line}"


def main(folder: Path) -> None:
    """Print the findings as JSON, as far as the search came."""
    # This project may come from `folder` alone, however this environment has it otherwise: as an
    # editable install (a finder of its own) or on another entry of the path.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "_Editable" not in repr(finder)]
    others = [e for e in sys.path if _below(e, folder) or not (Path(e) / "phi3_tool").is_dir()]
    sys.path[:] = [str(folder), *others]
    findings: list[Finding] = []
    try:
        findings.extend(examine(folder))
    except FaultError as fault:
        check, said, fix = fault.args
        findings.append((check, False, said, fix))
    sys.stdout.write("\n" + json.dumps(findings) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
