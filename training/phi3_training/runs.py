"""The runs of a folder: which one is current, and what there is of each.

The current run is what every command works on unless another is named. Reads and writes
`<runs>/.current`, which holds its name; `phi3 use` and a finished `phi3 up` choose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StageError
from .manifests import (
    AnswerManifest,
    BaseManifest,
    ConnectionManifest,
    EndpointManifest,
    Manifest,
    ModelManifest,
    RolloutManifest,
)
from .packages import has_prompt_flow
from .run import Run, write_atomically

if TYPE_CHECKING:
    from .targets import RunStatus, Target

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
        # A name, not a path: the folder of runs may be moved.
        chosen = (folder / _FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        chosen = None
    for run in runs:
        if run.name == chosen:
            return run
    connected = [run for run in runs if is_connected(run)]
    if connected:
        # By its manifest's time: the one connected last.
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

        # The flow names one connection; it is made to lead to this run.
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


@dataclass(frozen=True)
class RunState:
    """The state of a run; `broken` names the manifests that cannot be read.

    `status` is what the target says: at least {"endpoint": {"state": …}}, on Azure `lines` for
    people as well.
    """

    run: str
    path: str
    on: str
    current: bool
    remarks: Sequence[str]
    done: Sequence[str]
    broken: Sequence[str]
    status: RunStatus
    adapters: Sequence[str]
    question: str | None
    answer: str | None

    @property
    def endpoint(self) -> str:
        """up, down, none, unknown, or "not asked" where Azure was not asked."""
        return str(self.status["endpoint"]["state"])

    def as_json(self) -> dict[str, Any]:
        """Plain values for `-o json`; the target's own keys come between the others."""
        before = ("run", "path", "on", "current", "remarks", "done", "broken")
        after = ("adapters", "question", "answer")
        return {
            **{name: getattr(self, name) for name in before},
            **self.status,
            **{name: getattr(self, name) for name in after},
        }


def state_of(run: Run, target: Target | None = None) -> RunState:
    """Which stages of a run are done and what is up; read from Azure only if `target` is given.

    A manifest that cannot be read is named and hides nothing else.
    """
    # Here, because the shell's completion lists the runs at each press of Tab and needs no stage.
    from .finetune.weights import list_adapters
    from .stages import stages_of
    from .targets import get_target, is_here, target_of

    name, here = target_of(run), is_here(run)
    done: list[str] = []
    broken: dict[type[Manifest], str] = {}
    for stage in stages_of(in_cloud=not here):
        try:
            if run.read(stage.manifest) is not None:
                done.append(stage.title)
        except StageError as error:
            broken[stage.manifest] = str(error)
    # The target would read the same file, and fail.
    if EndpointManifest in broken:
        status: RunStatus = {"endpoint": {"state": "unknown"}}
    elif target is None and not here:
        endpoint = run.read(EndpointManifest)
        status = {"endpoint": {"state": "not asked"}}
        if endpoint is not None:
            status["endpoint"]["url"] = endpoint.endpoint
    else:
        status = (target or get_target(name)).status(run)
    answer = None if AnswerManifest in broken else run.read(AnswerManifest)
    adapters = [] if BaseManifest in broken else list_adapters(run)
    return RunState(
        run=run.name,
        path=str(run.path),
        on=name,
        current=is_current(run),
        remarks=[] if {EndpointManifest, ModelManifest} & broken.keys() else remarks(run),
        done=done,
        broken=list(broken.values()),
        status=status,
        adapters=[adapter.name for adapter in adapters],
        question=None if answer is None else answer.question,
        answer=None if answer is None else answer.answer,
    )
