"""The named adapters of a run: run/adapters/NAME, each a plain peft folder over the same base.

Reads and writes run/adapters/NAME (with our notes in phi3.json) and run/merged/NAME.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StageError, UsageError
from ..run import Run

FOLDER = "adapters"
MERGED = "merged"
NOTES = "phi3.json"
_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Adapter:
    """One adapter; `fits` is False when the run's base was made anew after it was trained."""

    name: str
    path: Path
    fits: bool
    notes: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For `-o json`."""
        return {"name": self.name, "path": str(self.path), "fits": self.fits, **self.notes}


def adapter_folder(run: Run, name: str | None) -> Path:
    """Where the adapter of that name lies; run/adapter for the one without a name."""
    return run.path / "adapter" if name is None else run.path / FOLDER / name


def list_adapters(run: Run) -> list[Adapter]:
    """The run's named adapters by name; whole ones only."""
    base = (run.manifest("base") or {}).get("done_id")
    found = []
    for folder in sorted((run.path / FOLDER).glob("*")):
        if _NAME.fullmatch(folder.name) and (folder / _WEIGHTS).is_file():
            notes = _notes(folder)
            fits = notes.pop("base_id", base) == base
            found.append(Adapter(folder.name, folder, fits, notes))
    return found


def find_adapter(run: Run, name: str) -> Adapter:
    """The adapter of that name; UsageError, with the known names, or StageError if it is stale."""
    found = list_adapters(run)
    for adapter in found:
        if adapter.name == name:
            if not adapter.fits:
                raise StageError(
                    f"The adapter {name!r} was trained on an earlier base model of this run; "
                    f"train it again: phi3 train RECIPE --adapter {name}"
                )
            return adapter
    known = ", ".join(adapter.name for adapter in found) or "none yet"
    raise UsageError(
        f"The run {run.name!r} has no adapter {name!r}; adapters: {known}. "
        f"Train one: phi3 train RECIPE --adapter {name}"
    )


def merge_adapter(run: Run, name: str) -> Path:
    """Merge a named adapter into the base weights: run/merged/NAME, a whole model folder."""
    import torch

    from .merge import merge
    from .methods import with_adapter
    from .runtime import quiet_libraries
    from .weights import base_folder, chat_format

    quiet_libraries()
    adapter = find_adapter(run, name)
    folder = base_folder(run)
    dtype = getattr(torch, str(adapter.notes.get("dtype", "float32")))
    merged = with_adapter(folder, adapter.path, dtype)
    target = run.path / MERGED / name
    merge(merged, chat_format(folder), target, folder, dtype)
    return target


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Note beside the weights what they are; peft overlooks the file."""
    (folder / NOTES).write_text(json.dumps(notes, indent=2, default=str) + "\n", encoding="utf-8")


def _notes(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a peft folder that somebody put there
    return content if isinstance(content, dict) else {}
