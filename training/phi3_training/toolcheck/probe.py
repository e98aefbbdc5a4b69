"""Looks for the tool the way Prompt flow does; a separate program, run where the wheel is.

`python -I probe.py FOLDER` prints a JSON list of findings as its last line. Imports nothing of
this project by itself: what it reports on must come from FOLDER.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GROUP = "package_tools"
PACKAGE = "phi3_tool"
#: Inputs that Prompt flow sets itself, by the decorator's own word.
STREAMING = "_streaming_option_parameter"

Finding = tuple[str, bool, str, str]


class NotFoundError(Exception):
    """The search ends here: nothing further can be looked at."""

    def __init__(self, check: str, said: str, fix: str) -> None:
        super().__init__(said)
        self.finding: Finding = (check, False, said, fix)


def hide_other_copies(folder: Path) -> None:
    """Let this project come from `folder` alone, however this environment has it otherwise."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "_Editable" not in _name(finder)]
    copies = {
        entry
        for entry in sys.path
        if (Path(entry) / PACKAGE).is_dir() and not _below(entry, folder)
    }
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in copies)]


def _name(finder: object) -> str:
    return getattr(finder, "__name__", type(finder).__name__)


def examine(folder: Path) -> Iterator[Finding]:
    """Entry point, listing, each tool, and Prompt flow's own word."""
    tools = listed(entry_point(folder), folder)
    yield "listing", True, f"{len(tools)} listed: {', '.join(tools)}", ""
    for identifier, about in tools.items():
        yield from examine_tool(identifier, about, folder)


def entry_point(folder: Path) -> importlib.metadata.EntryPoint:
    """This project's entry point, loaded from nowhere but `folder`."""
    points = [
        point
        for point in importlib.metadata.entry_points(group=GROUP)
        if point.dist is not None and _below(str(point.dist.locate_file("")), folder)
    ]
    if not points:
        raise NotFoundError(
            "entry point",
            f"the installed package has no entry point {GROUP!r}",
            "name the listing function under `entry_points` in setup.py",
        )
    return points[0]


def listed(point: importlib.metadata.EntryPoint, folder: Path) -> dict[str, Any]:
    """What the entry point's function lists."""
    try:
        module = importlib.import_module(point.module)
    except ImportError as error:
        fix = f"make {point.module} importable, or correct the entry point in setup.py"
        raise NotFoundError("entry point", _why(f"import {point.module}", error), fix) from None
    if not _below(getattr(module, "__file__", "") or "", folder):
        said = f"{point.module} comes from {module.__file__}, not from the wheel"
        raise NotFoundError("entry point", said, "look at `packages` in setup.py")
    function = getattr(module, point.attr, None)
    if not callable(function):
        said = f"the entry point names {point.value}, and there is no such function"
        raise NotFoundError("entry point", said, "correct the entry point in setup.py")
    return _described(point.value, function)


def _described(name: str, function: Any) -> dict[str, Any]:
    try:
        tools = function()
    except Exception as error:  # noqa: BLE001 - whatever it is, Prompt flow would swallow it
        said = _why(f"run {name}()", error)
        raise NotFoundError("listing", said, f"look at {name}") from None
    if not isinstance(tools, dict) or not tools:
        raise NotFoundError(
            "listing",
            f"{name}() lists no tool: no tool description was found",
            "look at phi3_tool/yamls/*.yaml and at `package_data` in setup.py",
        )
    return tools


def examine_tool(identifier: str, about: dict[str, Any], folder: Path) -> Iterator[Finding]:
    """One tool: its function, its inputs, its connection types, and whether Prompt flow has it."""
    function, module = _function(identifier, about, folder)
    faults = [
        *_function_faults(function, module),
        *_input_faults(about.get("inputs") or {}, function),
    ]
    for name, entry in (about.get("inputs") or {}).items():
        faults += _type_faults(name, entry, module)
    for said, fix in faults:
        yield "tool", False, f"{identifier}: {said}", fix
    if not faults:
        yield "tool", True, f"{about['module']}.{about['function']} matches its description", ""
        yield from _prompt_flow(identifier)


def _function(identifier: str, about: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    home, name = about.get("module", ""), about.get("function", "")
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        said = f"{identifier}: {_why(f'import {home}', error)}"
        fix = "install what is missing, or correct `module` in the tool's YAML"
        raise NotFoundError("tool", said, fix) from None
    if not _below(module.__file__ or "", folder):
        said = f"{identifier}: {home} comes from {module.__file__}, not from the wheel"
        raise NotFoundError("tool", said, "look at `packages` in setup.py")
    function = getattr(module, name, None)
    if not callable(function):
        said = f"{identifier}: {home} has no function {name!r}"
        raise NotFoundError("tool", said, "correct `function` in the tool's YAML")
    return function, module


def _function_faults(function: Any, module: Any) -> Iterator[tuple[str, str]]:
    inner = inspect.unwrap(function)
    if inner is function or not hasattr(function, "__tool"):
        yield f"{function.__name__} is not a Prompt flow tool", "put @tool above it"
    written = [name for name, hint in inner.__annotations__.items() if isinstance(hint, str)]
    if written:
        yield (
            f"Prompt flow cannot read the types of {', '.join(written)}",
            f"remove `from __future__ import annotations` from {module.__name__}",
        )


def _input_faults(described: dict[str, Any], function: Any) -> Iterator[tuple[str, str]]:
    parameters = inspect.signature(function).parameters
    fix = "make the YAML's inputs and the function's parameters agree"
    for name in described:
        if name not in parameters:
            yield f"the YAML has an input {name!r} that {function.__name__} does not accept", fix
    for name, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        if needed and name not in described and name != getattr(function, STREAMING, None):
            yield f"{function.__name__} needs {name!r}, which the YAML does not have", fix


def _type_faults(name: str, entry: dict[str, Any], module: Any) -> Iterator[tuple[str, str]]:
    from promptflow.contracts.tool import ConnectionType

    for custom in entry.get("custom_type") or []:
        kind = getattr(module, custom, None)
        if not (isinstance(kind, type) and ConnectionType.is_custom_strong_type(kind)):
            yield (
                f"{name}: {module.__name__} has no connection class {custom}",
                f"import {custom} there, or correct `custom_type` in the YAML",
            )
    if entry.get("custom_type") and entry.get("type") != ["CustomConnection"]:
        yield (
            f"{name}: Prompt flow cannot resolve the type {entry.get('type')}",
            "`type: [CustomConnection]` next to `custom_type` in the YAML",
        )
    path = (entry.get("dynamic_list") or {}).get("func_path")
    if path and not _callable_at(path):
        fix = f"correct `func_path` of {name} in the YAML"
        yield f"{name}: there is no function {path} to fill its list", fix


def _callable_at(path: str) -> bool:
    home, _, name = path.rpartition(".")
    try:
        return callable(getattr(importlib.import_module(home), name, None))
    except ImportError:
        return False


def _prompt_flow(identifier: str) -> Iterator[Finding]:
    from promptflow._core.tools_manager import collect_package_tools

    found = collect_package_tools([identifier]).get(identifier)
    if found is None:
        fix = "see its warning with: pf tool list"
        yield "prompt flow", False, f"Prompt flow does not list {identifier}", fix
    else:
        said = f'Prompt flow lists it as "{found["name"]}" of {found["package"]} '
        yield "prompt flow", True, said + found["package_version"], ""


def _below(path: str, folder: Path) -> bool:
    return bool(path) and folder.resolve() in [Path(path).resolve(), *Path(path).resolve().parents]


def _why(doing: str, error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"cannot {doing}: {type(error).__name__}: {line}"


def main(folder: Path) -> None:
    """Print the findings as JSON, as far as the search came."""
    hide_other_copies(folder)
    findings: list[Finding] = []
    try:
        findings.extend(examine(folder))
    except NotFoundError as end:
        findings.append(end.finding)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "promptflow":
            raise
        said = "Prompt flow is not installed here"
        findings.append(("prompt flow", False, said, 'pip install "phi3-promptflow[flow]"'))
    sys.stdout.write("\n" + json.dumps(findings) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
