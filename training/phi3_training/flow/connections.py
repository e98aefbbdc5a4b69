"""Which inputs of a flow's nodes are connections, by the annotations of their functions.

Reads the nodes' source files as text; imports nothing of them.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bundle import FlowSource


def connection_inputs(source: FlowSource) -> dict[str, list[str]]:
    """Node name → its inputs that are connections; nodes without any are left out."""
    by_node: dict[str, list[str]] = {}
    for node in source.dag["nodes"]:
        inputs = _of_node(source.folder, node) if isinstance(node, dict) else []
        if inputs:
            by_node[str(node.get("name"))] = inputs
    return by_node


def _of_node(folder: Path, node: Mapping[str, Any]) -> list[str]:
    inputs = node.get("inputs") or {}
    literal = [name for name, value in inputs.items() if isinstance(value, str)]
    about = node.get("source") or {}
    path = folder / str(about.get("path") or "")
    if about.get("type") != "code" or not path.is_file():
        # A package tool's source is not here; ours, and Prompt flow's own, use this name.
        return [name for name in literal if name == "connection"]
    if node.get("type") != "python":
        return []
    try:
        function = tool_function(path)
    except SyntaxError:  # reported where the node is run or converted
        return []
    if function is None:
        return []
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotated = {each.arg: ast.unparse(each.annotation) for each in parameters if each.annotation}
    return [name for name in literal if "Connection" in annotated.get(name, "")]


def tool_function(path: Path) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function with the decorator `tool`, called or not; None where the file has none.

    Raises SyntaxError for what is not Python.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if ast.unparse(called).rpartition(".")[2] == "tool":
                    return node
    return None
