"""The runs of a folder and the current one: what every command works on unless a run is named.

Reads and writes `<runs>/.current`, which holds the current run's name. `phi3 use` and a finished
`phi3 up` choose it.
"""

from __future__ import annotations

from pathlib import Path

from .manifests import ConnectionManifest, EndpointManifest, ModelManifest, RolloutManifest
from .packages import has_prompt_flow
from .run import Run, write_atomically

_FILE = ".current"


def all_runs(folder: Path) -> list[Run]:
    """The run folders: the current one first, then the one worked on last."""
    runs = _by_change(folder)
    current = current_of(folder)
    if current is None:
        return runs
    return [current, *(run for run in runs if run.path != current.path)]


def current_of(folder: Path) -> Run | None:
    """The current run; where none was chosen, the one connected last, else worked on last."""
    runs = _by_change(folder)
    try:
        chosen = (folder / _FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        chosen = None
    for run in runs:
        if run.name == chosen:
            return run
    connected = [run for run in runs if is_connected(run)]
    if connected:
        return max(connected, key=lambda run: _way_to(run).stat().st_mtime)
    return runs[0] if runs else None


def is_connected(run: Run) -> bool:
    """Whether commands find the way to the run's endpoint, up or down."""
    return _way_to(run).is_file()


def _way_to(run: Run) -> Path:
    # Without Prompt flow nothing is connected: the endpoint itself is asked.
    kind = ConnectionManifest if has_prompt_flow() else EndpointManifest
    return run.path / f"{kind.STAGE}.json"


def make_current(run: Run) -> None:
    """From now on the commands work on this run, and Prompt flow's connection leads to it.

    Raises StoreError where the connection belongs to somebody else or its key is lost.
    """
    manifest = run.read(ConnectionManifest)
    if manifest is not None and manifest.own is not None and has_prompt_flow():
        from .flow.store import copy_connection

        copy_connection(manifest.own, manifest.name)
    write_atomically(run.path.parent / _FILE, run.name + "\n")


def is_current(run: Run) -> bool:
    """Whether commands without --run work on this run."""
    current = current_of(run.path.parent)
    return current is not None and current.path == run.path


def remarks(run: Run) -> list[str]:
    """What everybody who talks to the run's endpoint should know about the model that it serves."""
    rollout = run.read(RolloutManifest)
    notes = []
    if rollout is not None and rollout.unfinished:
        notes.append(
            f"{rollout.unfinished}; finish it with: phi3 up --run {run.name}, or undo it with: "
            f"phi3 azure rollback --run {run.name}"
        )
    endpoint = run.read(EndpointManifest)
    if endpoint is None:
        return notes
    if endpoint.gate is not None and not endpoint.gate.passed:
        notes.append("this model did not pass its gate; it was deployed with --force")
    model = run.read(ModelManifest)
    if endpoint.of is not None and (model is None or model.done_id != endpoint.of):
        notes.append(
            "the endpoint serves an earlier model than the run folder contains; serve the new one "
            f"with: phi3 up --run {run.name}"
        )
    return notes


def _by_change(folder: Path) -> list[Run]:
    if not folder.is_dir():
        return []
    runs = [path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.json"))]
    runs.sort(
        key=lambda run: max(file.stat().st_mtime for file in run.glob("*.json")), reverse=True
    )
    return [Run(path.resolve()) for path in runs]
