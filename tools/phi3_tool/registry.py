"""What Prompt flow lists for this package: {tool id: description}, read from yamls/*.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_YAMLS = Path(__file__).parent / "yamls"


def list_package_tools() -> dict[str, dict[str, Any]]:
    """The tools of this package; Prompt flow calls it through the entry point `package_tools`."""
    # Comes with Prompt flow; the package itself does without.
    from ruamel.yaml import YAML

    tools: dict[str, dict[str, Any]] = {}
    for path in sorted(_YAMLS.glob("*.yaml")):
        tools.update(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    return tools
