"""What `phi3 status`, `runs` and `up` show of a run: its finished stages and what is up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .current import is_current, remarks
from .errors import StageError
from .manifests import AnswerManifest, BaseManifest, EndpointManifest, Manifest, ModelManifest
from .run import Run
from .stages import stages_of
from .targets import Target, get_target, is_here, target_of


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
    status: Mapping[str, Any]
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
    from .finetune.weights import list_adapters

    name, here = target_of(run), is_here(run)
    done: list[str] = []
    broken: dict[type[Manifest], str] = {}
    for stage in stages_of(in_cloud=not here):
        try:
            if run.read(stage.manifest) is not None:
                done.append(stage.title)
        except StageError as error:
            broken[stage.manifest] = str(error)
    if EndpointManifest in broken:
        status: Mapping[str, Any] = {"endpoint": {"state": "unknown"}}
    elif target is None and not here:
        endpoint = run.read(EndpointManifest)
        where = {} if endpoint is None else {"url": endpoint.endpoint}
        status = {"endpoint": {"state": "not asked", **where}}
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
