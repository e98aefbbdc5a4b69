"""Which files a flow needs, found by following what it names: nodes, imports, includes.

Reads a flow folder (flow.dag.yaml, the sources of its nodes, additional_includes); writes nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..errors import UsageError

DAG = "flow.dag.yaml"
TOOL_PACKAGE = "phi3_tool"
# What belongs to a program. Everything else in an included folder stays behind, data above all.
PROGRAM_SUFFIXES = frozenset(
    (".py", ".typed", ".yaml", ".yml", ".jinja2", ".prompty", ".png", ".svg", ".txt")
)
_CACHES = ("__pycache__",)


@dataclass(frozen=True)
class FlowSource:
    """A flow folder that was read: its definition and every file it needs, by name in a bundle."""

    folder: Path
    text: str
    dag: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> FlowSource:
        """Read and check a flow folder; raises UsageError where it is none."""
        path = folder / DAG
        if not path.is_file():
            raise UsageError(f"{folder} is not a flow: expected a {DAG} in it")
        text = path.read_text(encoding="utf-8")
        try:
            dag = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{path} cannot be read as YAML: {error}") from None
        if not isinstance(dag, dict) or not isinstance(dag.get("nodes"), list):
            raise UsageError(
                f"{path} has no list of nodes; see: pf flow validate --source {folder}"
            )
        return cls(folder, text, dag)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def package_tools(self) -> list[str]:
        """Tools that nodes take from installed packages."""
        sources = (node.get("source") or {} for node in _nodes(self.dag))
        return sorted({str(s["tool"]) for s in sources if s.get("type") == "package"})

    @property
    def tool_sources(self) -> dict[str, dict[str, str]]:
        """Nodes' own source files, each with the kind of its tool."""
        return {
            str(node["source"]["path"]): {"tool_type": str(node["type"]).lower()}
            for node in _nodes(self.dag)
            if (node.get("source") or {}).get("type") in ("code", "package_with_prompt")
        }

    @property
    def uses_phi3_tool(self) -> bool:
        """Whether the flow needs the package phi3_tool, carried along or installed."""
        return any(Path(entry).name == TOOL_PACKAGE for entry in self._includes()) or any(
            tool.partition(".")[0] == TOOL_PACKAGE for tool in self.package_tools
        )

    @property
    def requirements(self) -> str:
        """Name of the flow's requirements file; empty where it names none."""
        return str((self.dag.get("environment") or {}).get("python_requirements_txt") or "").strip()

    def files(self, *, extra: Sequence[str] = (), carry_tool: bool = True) -> dict[str, Path]:
        """Every file besides flow.dag.yaml; all that is named and missing is reported at once."""
        faults: list[str] = []
        found: dict[str, Path] = {}
        for entry in self._includes():
            if Path(entry).name != TOOL_PACKAGE or carry_tool:
                found.update(_included(self.folder, entry, faults))
        named = [str((node.get("source") or {}).get("path") or "") for node in _nodes(self.dag)]
        for name in dict.fromkeys([*named, self.requirements, *extra]):
            if name and name not in found:
                found.update(_own(self.folder, name, faults))
        if faults:
            raise UsageError(f"{self.folder / DAG} cannot be packed:\n  " + "\n  ".join(faults))
        found.update(_imported(self.folder, found))
        return dict(sorted(found.items()))

    def _includes(self) -> list[str]:
        return [str(entry).rstrip("/\\") for entry in self.dag.get("additional_includes") or []]


def _nodes(dag: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The nodes, those of variants too."""
    yield from (node for node in dag["nodes"] if isinstance(node, dict))
    for group in (dag.get("node_variants") or {}).values():
        for variant in (group.get("variants") or {}).values():
            yield variant["node"]


def _own(folder: Path, name: str, faults: list[str]) -> dict[str, Path]:
    """A file or folder that must lie inside the flow's folder."""
    path = folder / name
    if not path.exists():
        faults.append(f"{name} is named, but is not in {folder}")
    elif not path.resolve().is_relative_to(folder.resolve()):
        faults.append(f"{name} leads out of {folder}; name it under additional_includes instead")
    elif path.is_dir():
        return {str(PurePosixPath(name) / inner): found for inner, found in _tree(path)}
    else:
        return {PurePosixPath(Path(name)).as_posix(): path}
    return {}


def _included(folder: Path, entry: str, faults: list[str]) -> dict[str, Path]:
    path = (folder / entry).resolve()
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        faults.append(f"additional_includes names {entry}, which is not there")
    return {f"{path.name}/{inner}": found for inner, found in _tree(path)}


def _tree(folder: Path) -> Iterator[tuple[str, Path]]:
    """What of a folder belongs to a program, without caches, hidden files and links out of it."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") or part in _CACHES for part in inner.parts)
        inside = path.resolve().is_relative_to(folder.resolve())
        if path.is_file() and not hidden and inside and path.suffix in PROGRAM_SUFFIXES:
            yield inner.as_posix(), path


def _imported(folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """Modules and packages of the flow's own folder that its files import, and those of these."""
    found: dict[str, Path] = {}
    waiting = [path for path in files.values() if path.suffix == ".py"]
    while waiting:
        for name in _imports(waiting.pop()):
            if f"{name}.py" in {*files, *found} or f"{name}/__init__.py" in {*files, *found}:
                continue
            new: Iterable[tuple[str, Path]] = ()
            if (folder / f"{name}.py").is_file():
                new = [(f"{name}.py", folder / f"{name}.py")]
            elif (folder / name / "__init__.py").is_file():
                new = [(f"{name}/{inner}", path) for inner, path in _tree(folder / name)]
            for inner, path in new:
                found[inner] = path
                waiting += [path] if path.suffix == ".py" else []
    return found


def _imports(path: Path) -> set[str]:
    """First names of all modules that a file imports."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not Python that can be read: {error}") from None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names
