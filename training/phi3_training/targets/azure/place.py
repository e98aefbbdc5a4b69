"""Where a run is on Azure, and what it made there: kept in the run folder before each first call.

Reads and writes <run>/place.json and <run>/azure/made.json. Names only, never a secret.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...errors import StageError, UsageError
from ...recipe import read_yaml
from ...recipe_azure import AzureSection
from ...run import RECIPE_FILE, Run, write_atomically
from .. import PLACE
from .workplace import Workplace, find_workplace

_IDENTITY = ("subscription_id", "resource_group", "workspace_name")
_KEPT = tuple(item.name for item in fields(Workplace) if item.name != "sources")


def settle(section: AzureSection, run: Run) -> Workplace:
    """The place of a run that is about to be worked on; writes it down.

    A run stays where it began: UsageError when recipe, environment or config.json now name another
    place, for what the run made there would be lost from sight.
    """
    kept = run.manifest(PLACE)
    if kept is None:
        place = find_workplace(section, os.environ, Path.cwd())
    else:
        _refuse_move(section, kept, run)
        place = find_workplace(_filled(section, kept), os.environ, Path.cwd())
    content = {name: getattr(place, name) for name in _KEPT}
    if kept is None or any(kept.get(name) != value for name, value in content.items()):
        run.write_manifest(PLACE, {"target": "azure", **content})
    return place


def place_of(run: Run) -> Workplace:
    """The place that the run folder names. Raises StageError where it names none."""
    kept = run.require(PLACE, f"phi3 up --on azure --run {run.name}")
    return find_workplace(_filled(AzureSection(), kept), {}, run.path)


def section_of(run: Run) -> AzureSection:
    """The `azure:` section of the recipe that the run was made with."""
    path = run.path / RECIPE_FILE
    content = read_yaml(path).get("azure") if path.is_file() else None
    try:
        return AzureSection.model_validate(content or {})
    except ValidationError:
        raise StageError(
            f"{path} has an azure: section that this version does not read; "
            "give the recipe once more: phi3 up RECIPE --on azure"
        ) from None


def _filled(section: AzureSection, kept: Mapping[str, Any]) -> AzureSection:
    known = {name: kept[name] for name in _KEPT if kept.get(name) is not None}
    return section.model_copy(update=known)


def _refuse_move(section: AzureSection, kept: Mapping[str, Any], run: Run) -> None:
    try:
        named = find_workplace(section, os.environ, Path.cwd())
    except UsageError:
        if section.subscription_id is not None:
            raise
        # No subscription is named here: the run knows its own.
        known = section.model_copy(update={"subscription_id": kept["subscription_id"]})
        named = find_workplace(known, os.environ, Path.cwd())
    moved = [
        f"{key} {getattr(named, key)} ({named.sources[key]}) instead of {kept[key]}"
        for key in _IDENTITY
        if named.sources.get(key) != "default"
        and str(getattr(named, key)).lower() != str(kept[key]).lower()
    ]
    if moved:
        raise UsageError(
            f"The run {run.name!r} lives elsewhere on Azure: now named is {'; '.join(moved)}. "
            "Work there under another run with --run NAME"
        )


@dataclass(frozen=True)
class Made:
    """One thing that a run made, or was about to make."""

    kind: str  # endpoint, deployment, model, connection, flow
    name: str
    parent: str = ""  # the endpoint of a deployment, the workspace of a connection


def note(run: Run, made: Made) -> None:
    """Write the thing down, before the call that makes it."""
    known = noted(run)
    if made not in known:
        _write(run, [*known, made])


def strike(run: Run, gone: Made) -> None:
    """Take the thing off the list: it is deleted, and so is what stood in it."""
    inside = [item for item in noted(run) if gone.kind == "endpoint" and item.parent == gone.name]
    _write(run, [item for item in noted(run) if item != gone and item not in inside])


def noted(run: Run, kind: str | None = None) -> list[Made]:
    """What the run made, in order."""
    path = run.path / "azure" / "made.json"
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["made"]
        made = [Made(**item) for item in items]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        raise StageError(
            f"{path} is not what phi3 wrote. What the run made on Azure is then only known there: "
            "see the studio, and delete the file"
        ) from None
    return [item for item in made if kind in (None, item.kind)]


def _write(run: Run, made: list[Made]) -> None:
    text = json.dumps({"made": [asdict(item) for item in made]}, indent=2)
    write_atomically(run.file("azure", "made.json"), text + "\n")
