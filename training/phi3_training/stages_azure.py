"""The ten stages of the journey on Azure: those of this machine, done there, and `provision`.

Each calls the target; its dependencies are listed here, as in stages.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from .journey import Journey, Manifest, Stage, finished
from .stages import STAGES
from .targets import CloudTarget

_HERE = {stage.manifest: stage for stage in STAGES}


def _cloud(journey: Journey) -> CloudTarget:
    return cast(CloudTarget, journey.target)


def _depends(stage: str) -> Callable[[Journey], Any]:
    """The shared inputs of a stage and what it depends on at Azure."""
    shared = _HERE[stage].inputs if stage in _HERE else lambda _journey: None
    return lambda j: [shared(j), _cloud(j).place_inputs(j.recipe, stage)]


def _trains(journey: Journey) -> bool:
    """Whether something is left to train or to measure, so that the cluster is needed."""
    return any(
        name in journey.again or finished(journey, _stage(name)) is None
        for name in ("base", "model", "metrics")
    )


def _provision(journey: Journey) -> Manifest:
    trains = _trains(journey)
    return _cloud(journey).provide(journey.recipe, journey.run, journey.progress, trains=trains)


def _is_provided(journey: Journey, _manifest: Manifest) -> bool:
    trains = _trains(journey)
    return _cloud(journey).is_provided(journey.recipe, journey.run, trains=trains)


def _base(journey: Journey) -> Manifest:
    return _cloud(journey).prepare_base(journey.recipe, journey.run, journey.progress)


def _evaluate(journey: Journey) -> Manifest:
    return _cloud(journey).evaluate(journey.recipe, journey.run, journey.progress)


def _endpoint_up(journey: Journey, _manifest: Manifest) -> bool:
    return _cloud(journey).is_up(journey.run)


def _connect(journey: Journey) -> Manifest:
    return _cloud(journey).connect(journey.recipe, journey.run, journey.progress)


def _ask(journey: Journey) -> Manifest:
    """The flow's answer through each connection that was written: here and in the workspaces."""
    from .flow.ask import ask

    answers = {}
    for place, connection in _cloud(journey).connections(journey.run).items():
        journey.progress(0, 0, f"asking through the connection of {place}")
        answers[place] = ask(journey.flow, journey.recipe.ask, connection=connection)
    return {
        "question": journey.recipe.ask,
        "answer": next(iter(answers.values())),
        "asked_through": list(answers),
    }


def _asked(manifest: Manifest) -> str:
    through = ", ".join(manifest["asked_through"])
    return f"{manifest['question']!r} answered through the connection of {through}"


AZURE_STAGES: tuple[Stage, ...] = (
    _HERE["dataset"],
    Stage(
        manifest="azure",
        title="provision",
        needs=(),  # what is there does not depend on the chats, nor they on it
        inputs=_depends("azure"),
        work=_provision,
        summary=lambda manifest: str(manifest["summary"]),
        still_good=_is_provided,
    ),
    replace(_HERE["base"], inputs=_depends("base"), work=_base, outputs=lambda _: ()),
    replace(_HERE["model"], inputs=_depends("model"), outputs=lambda _: ()),
    replace(_HERE["metrics"], inputs=_depends("metrics"), work=_evaluate),
    _HERE["gate"],
    replace(_HERE["registration"], inputs=_depends("registration"), outputs=lambda _: ()),
    replace(
        _HERE["endpoint"],
        needs=("registration", "gate"),
        inputs=_depends("endpoint"),
        summary=lambda manifest: f"{manifest['endpoint']} ({manifest['deployment']})",
        still_good=_endpoint_up,
    ),
    replace(
        _HERE["connection"],
        inputs=_depends("connection"),
        work=_connect,
        still_good=lambda journey, _manifest: _cloud(journey).is_connected(journey.run),
    ),
    replace(_HERE["answer"], work=_ask, summary=_asked),
)


def _stage(manifest: str) -> Stage:
    return next(stage for stage in AZURE_STAGES if stage.manifest == manifest)


def stages_of(target: str) -> tuple[Stage, ...]:
    """The stages of a target's journey."""
    return AZURE_STAGES if target == "azure" else STAGES


def stages_until(manifest: str, target: str) -> tuple[Stage, ...]:
    """The stages of a target up to and with the one that writes `<manifest>.json`."""
    stages = stages_of(target)
    names = [stage.manifest for stage in stages]
    return stages[: names.index(manifest) + 1]
