"""Which of our source files a program runs, so that a job and a registered model carry no others.

Reads the sources of phi3_training and phi3_tool; nothing is imported to find out.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import phi3_tool

# Where each of our packages is: two folders of a clone, or one site-packages.
_PACKAGES = {
    "phi3_training": Path(__file__).resolve().parent,
    "phi3_tool": Path(phi3_tool.__file__).resolve().parent,
}
_OURS = re.compile(rf"({'|'.join(_PACKAGES)})(\.\w+)*")
# What a module reads from its own folder.
_DATA = (".css", ".html", ".txt", ".yaml", ".typed")


# Once per process: parsing some 100 sources takes about a second.
@lru_cache
def carried_files(*modules: str) -> Mapping[str, Path]:
    """Every file that these modules run, by its path below the folder that Python looks in.

    Raises ModuleNotFoundError for a module that is not ours.
    """
    files: dict[str, Path] = {}
    waiting = list(modules)
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = _file_of(module)
        if path is None:
            raise ModuleNotFoundError(f"{module} is not a module of phi3_training or phi3_tool")
        _add(files, path)
        # Imports inside functions count, and so do names of modules in strings, for `python -m`.
        waiting += _imports(path, module, lazily=True)
        parts = module.split(".")
        for length in range(1, len(parts)):
            parent = ".".join(parts[:length])
            init = _file_of(parent)
            # Of a package above only what its `__init__` imports at once: Python runs no more.
            if init is not None and parent not in seen:
                _add(files, init)
                waiting += _imports(init, parent, lazily=False)
    return MappingProxyType(dict(sorted(files.items())))  # read-only: all callers share it


def copy_carried(target: Path, *modules: str) -> None:
    """Copy those files below `target`, which is then a folder that Python can look in."""
    for name, path in carried_files(*modules).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def _file_of(module: str) -> Path | None:
    """The source of a module of ours."""
    first, *rest = module.split(".")
    if first not in _PACKAGES:
        return None
    path = _PACKAGES[first].joinpath(*rest)
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def _add(files: dict[str, Path], path: Path) -> None:
    data = [other for other in path.parent.iterdir() if other.suffix in _DATA]
    for item in (path, *data):
        root = next(p.parent for p in _PACKAGES.values() if item.is_relative_to(p))
        files[item.relative_to(root).as_posix()] = item


def _imports(path: Path, module: str, *, lazily: bool) -> list[str]:
    """The modules of ours that a file imports or names; `lazily`: also inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: list[str] = []
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), lazily=lazily):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            # `from package import name`: the name may be a module or something inside the package.
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += [node.value] if _OURS.fullmatch(node.value) and "." in node.value else []
    return [name for name in names if _file_of(name) is not None]


def _nodes(node: ast.AST, *, lazily: bool) -> Iterator[ast.AST]:
    """All nodes that run; imports for type checkers alone do not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if not lazily and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from _nodes(child, lazily=lazily)
