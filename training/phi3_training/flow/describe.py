"""Describes the tools of a flow folder as Prompt flow does: run as a program, on its own.

Reads the flow folder named first; writes the description to the file named second. It imports the
flow's own code, which is why it has a process to itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LOAD_ERROR = 3


def describe(folder: Path, sources: dict[str, dict[str, str]], package_tools: list[str]) -> Any:
    """flow.tools.json's content, or the exit status LOAD_ERROR with the reasons printed."""
    from promptflow._core.tool_meta_generator import generate_tool_meta
    from promptflow._core.tools_manager import collect_package_tools

    code, errors = generate_tool_meta(folder, sources)
    package = collect_package_tools(package_tools) if package_tools else {}
    absent = sorted(set(package_tools) - set(package))
    if errors or absent:
        for name, error in sorted(errors.items()):
            sys.stderr.write(f"{name}: {error.get('message', 'unknown')}\n")
        for tool in absent:
            sys.stderr.write(f"{tool}: no installed package has this tool\n")
        sys.exit(LOAD_ERROR)
    for tool in code.values():
        # As `pf flow validate` writes the file: its key is the name.
        tool.pop("name", None)
    return {"code": code, "package": package}


def main() -> None:
    """`describe.py FOLDER OUT`, with the sources and package tools as JSON on standard input."""
    folder, out = map(Path, sys.argv[1:])
    tools = json.load(sys.stdin)
    content = describe(folder, tools["sources"], tools["package_tools"])
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, default=lambda kind: kind.value)  # Prompt flow's enums
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
