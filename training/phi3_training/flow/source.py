"""A Prompt flow folder as it is read: its definition, the files that it needs, its connections.

What a flow needs is found by following what it names: nodes, imports, additional_includes. Sources
are read as text and never imported; writes nothing.
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
# What belongs to a program. Everything else in an included folder is left out, data above all.
PROGRAM_SUFFIXES = frozenset(
    (".py", ".typed", ".yaml", ".yml", ".jinja2", ".prompty", ".png", ".svg", ".txt")
)
_CACHES = ("__pycache__",)
_DOCUMENTS = ("index.sqlite", "index.json", "embedder/model.onnx", "embedder/tokenizer.json")


@dataclass(frozen=True)
class FlowSource:
    """A flow folder that was read: its definition and every file it needs, by name in a bundle."""

    folder: Path
    text: str
    dag: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> FlowSource:
        """Read and check a flow folder; raises UsageError if it is not one."""
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
        """Every file but flow.dag.yaml; all that is named and missing is reported at once."""
        faults: list[str] = []
        files: dict[str, Path] = {}
        for entry in self._includes():
            if Path(entry).name == TOOL_PACKAGE and not carry_tool:
                continue
            path = (self.folder / entry).resolve()
            if path.is_file():
                files[path.name] = path
            elif path.is_dir():
                files |= {f"{path.name}/{inner}": file for inner, file in _tree(path)}
            else:
                faults.append(f"additional_includes names {entry}, which does not exist")
        named = [str((node.get("source") or {}).get("path") or "") for node in _nodes(self.dag)]
        # The index that the lookup node opens, and the embedder if its folder was put next to it.
        documents = [name for name in _DOCUMENTS if (self.folder / name).is_file()]
        for name in dict.fromkeys([*named, self.requirements, *documents, *extra]):
            path = self.folder / name
            if not name or name in files:
                continue
            if not path.exists():
                faults.append(f"{name} is named, but is not in {self.folder}")
            elif not path.resolve().is_relative_to(self.folder.resolve()):
                faults.append(
                    f"{name} points outside {self.folder}; list it under additional_includes "
                    "instead"
                )
            elif path.is_dir():
                files |= {str(PurePosixPath(name) / inner): file for inner, file in _tree(path)}
            else:
                files[PurePosixPath(Path(name)).as_posix()] = path
        if faults:
            raise UsageError(f"{self.folder / DAG} cannot be packed:\n  " + "\n  ".join(faults))
        files |= _imported(self.folder, files)
        return dict(sorted(files.items()))

    def _includes(self) -> list[str]:
        return [str(entry).rstrip("/\\") for entry in self.dag.get("additional_includes") or []]


def _nodes(dag: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The nodes, those of variants too."""
    yield from (node for node in dag["nodes"] if isinstance(node, dict))
    # Any of the variants may be chosen when the flow runs.
    for group in (dag.get("node_variants") or {}).values():
        for variant in (group.get("variants") or {}).values():
            yield variant["node"]


def _tree(folder: Path) -> Iterator[tuple[str, Path]]:
    """What of a folder belongs to a program, without caches, hidden files and links out of it."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        # .promptflow holds transcripts of conversations; .env holds keys.
        hidden = any(part.startswith(".") or part in _CACHES for part in inner.parts)
        inside = path.resolve().is_relative_to(folder.resolve())
        if path.is_file() and not hidden and inside and path.suffix in PROGRAM_SUFFIXES:
            yield inner.as_posix(), path


def _imported(folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """Modules and packages of the flow's own folder that its files import, and those of these."""
    imported: dict[str, Path] = {}
    waiting = [path for path in files.values() if path.suffix == ".py"]
    while waiting:
        source = waiting.pop()
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise UsageError(f"{source} is not valid Python: {error}") from None
        names: set[str] = set()  # the first ones: of `import a.b` the folder or file `a` is needed
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
        for name in names:
            known = {*files, *imported}
            if f"{name}.py" in known or f"{name}/__init__.py" in known:
                continue
            # Neither in the folder: a package of the environment, which requirements.txt names.
            new: Iterable[tuple[str, Path]] = ()
            if (folder / f"{name}.py").is_file():
                new = [(f"{name}.py", folder / f"{name}.py")]
            elif (folder / name / "__init__.py").is_file():
                new = [(f"{name}/{inner}", path) for inner, path in _tree(folder / name)]
            for inner, path in new:
                imported[inner] = path
                waiting += [path] if path.suffix == ".py" else []
    return imported


# ---- connections


def connection_of(dag: Mapping[str, object] | None) -> str | None:
    """The connection that a flow's nodes name; None where they name none."""
    nodes = (dag or {}).get("nodes")
    for node in nodes if isinstance(nodes, list) else []:
        inputs = node.get("inputs") if isinstance(node, dict) else None
        name = inputs.get("connection") if isinstance(inputs, dict) else None
        if isinstance(name, str) and name and not name.startswith("${"):
            return name
    return None


def connection_inputs(source: FlowSource) -> dict[str, list[str]]:
    """Node name → its inputs that are connections; nodes without any are left out.

    By the annotations of the nodes' functions.
    """
    by_node: dict[str, list[str]] = {}
    for node in source.dag["nodes"]:
        if not isinstance(node, dict):
            continue
        inputs = node.get("inputs") or {}
        literal = [name for name, value in inputs.items() if isinstance(value, str)]
        about = node.get("source") or {}
        path = source.folder / str(about.get("path") or "")
        named: list[str] = []
        if about.get("type") != "code" or not path.is_file():
            # A package tool's source is not here; ours, and Prompt flow's own, use this name.
            named = [name for name in literal if name == "connection"]
        elif node.get("type") == "python":
            try:
                function = tool_function(path)
            except SyntaxError:  # reported where the node is run or converted
                function = None
            if function is not None:
                arguments = function.args
                parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                kinds = {p.arg: ast.unparse(p.annotation) for p in parameters if p.annotation}
                named = [name for name in literal if "Connection" in kinds.get(name, "")]
        if named:
            by_node[str(node.get("name"))] = named
    return by_node


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
