"""The package as a whole: light, importable without Prompt flow, and also as a plain folder."""

from __future__ import annotations

import ast
import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import phi3_tool

PACKAGE = Path(phi3_tool.__file__).parent
#: The modules that Prompt flow itself loads.
LOADED_BY_PROMPT_FLOW = ("chat.py", "connection_type.py")
HEAVY = ("promptflow", "ruamel", "torch", "azure", "transformers", "pydantic")


def run(code: str, folder: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environ,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_imports_nothing_heavy() -> None:
    code = f"import phi3_tool, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(code, PACKAGE.parent).strip() == "[]"


def test_works_as_a_copied_folder(tmp_path: Path) -> None:
    """Prompt flow's additional_includes lays the source beside the flow."""
    shutil.copytree(PACKAGE, tmp_path / "phi3_tool")
    code = (
        "import phi3_tool; from phi3_tool.wire import guess_dialect;"
        "print(phi3_tool.__file__, guess_dialect('http://localhost/score'))"
    )
    told = run(code, tmp_path)
    assert str(tmp_path) in told
    assert "score" in told


def test_only_what_prompt_flow_loads_imports_it() -> None:
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        uses = any(name.split(".")[0] == "promptflow" for name in imported)
        assert uses == (path.name in LOADED_BY_PROMPT_FLOW), path.name
        assert not (uses and "__future__" in imported), "Prompt flow reads annotations at run time"


def test_python_39_can_parse_it() -> None:
    for path in PACKAGE.glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))


def test_the_yaml_carries_the_icon_files() -> None:
    text = (PACKAGE / "yamls" / "phi3_chat.yaml").read_text(encoding="utf-8")
    for shade in ("light", "dark"):
        found = re.search(rf"{shade}: data:image/png;base64,(\S+)", text)
        assert found is not None
        icon = (PACKAGE / "icons" / f"phi3_chat_{shade}.png").read_bytes()
        assert base64.b64decode(found[1]) == icon
        assert icon.startswith(b"\x89PNG")


def test_the_public_names_are_there() -> None:
    assert all(hasattr(phi3_tool, name) for name in phi3_tool.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", phi3_tool.__version__)
    assert (PACKAGE / "py.typed").exists()
