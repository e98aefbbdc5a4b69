"""The ten stages of the journey, in order, each with what it depends on.

A stage calls the target where its work differs between this machine and Azure; `provision` is of
Azure alone. Heavy packages are imported inside the functions, so that a skipped stage costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .journey import Journey, Stage, file_hashes, finished
from .manifests import (
    AnswerManifest,
    BaseManifest,
    ConnectionManifest,
    DatasetManifest,
    EndpointManifest,
    GateManifest,
    Manifest,
    MetricsManifest,
    ModelManifest,
    ProvisionManifest,
    RegistrationManifest,
)
from .packages import ADD_PROMPT_FLOW, NO_PROMPT_FLOW, has_prompt_flow
from .targets import CloudTarget

# Not part of what a stage depends on. Files are hashed instead, so that a renamed file costs no
# training; checkpoints and `allow` change how a model is trained on the way, not what comes out.
_NO_INPUTS = {"data", "train", "validation", "replay", "canary", "probes", "allow"}
_NO_INPUTS |= {"save_steps", "save_seconds", "save_total_limit"}


def section_values(journey: Journey, *names: str) -> list[Any]:
    """The recipe's sections as plain values.

    Paths do not count: contents are hashed instead. Nor does what the label audit let pass: a
    model trained with --allow stays trained when the next command comes without it.
    """
    return [
        section.model_dump(mode="json", exclude=_NO_INPUTS)
        for section in (getattr(journey.recipe, name) for name in names)
        if section is not None
    ]


def _at_target(
    stage: type[Manifest], shared: Callable[[Journey], Any] = lambda _journey: None
) -> Callable[[Journey], Any]:
    """The inputs that every target shares, and those of the journey's own."""
    return lambda journey: journey.target.inputs(journey.recipe, stage, shared(journey))


def _data_inputs(journey: Journey) -> Any:
    from .data import fingerprints

    data = journey.recipe.data
    sources = [*data.train, *data.validation, *data.replay]
    # Rows are skipped by their length in the model's tokens: another model, another data set.
    skips = "skip" in (data.bad_rows, data.too_long)
    model = [journey.recipe.model.name_or_path] if skips else []
    return [section_values(journey, "data"), fingerprints(sources), *model]


def _prepare(journey: Journey) -> DatasetManifest:
    from .data import prepare
    from .finetune.rows import TokenRules
    from .memory.rows import tokenizer_folder

    recipe = journey.recipe
    folder = tokenizer_folder(recipe, journey.run)
    rules = TokenRules.of(recipe, folder) if folder is not None else None
    return prepare(
        recipe.data, journey.run, tokenizer=folder, rules=rules, progress=journey.progress
    )


def _cloud(journey: Journey) -> CloudTarget:
    cloud = journey.target.cloud
    if cloud is None:
        raise AssertionError("unreachable: stages_of leaves the cloud's stages out")
    return cloud


def _trains(journey: Journey) -> bool:
    """Whether something is left to train or to measure, so that the cluster is needed."""
    return any(
        stage.manifest in journey.again or finished(journey, stage) is None
        for stage in STAGES
        if stage.manifest in (BaseManifest, ModelManifest, MetricsManifest)
    )


def _train(journey: Journey) -> ModelManifest:
    recipe, run, cloud = journey.recipe, journey.run, journey.target.cloud
    if cloud is None:
        return journey.target.train(recipe, run, journey.progress)
    deploys = EndpointManifest in journey.to_come
    return cloud.train(recipe, run, journey.progress, deploys=deploys)


def _base_inputs(journey: Journey) -> Any:
    # Only a tiny model is made here, from `base`; any other is downloaded as it is.
    base = journey.recipe.base if journey.recipe.model.is_tiny else None
    copies = journey.recipe.data.casual_copies and base is not None
    return [
        section_values(journey, "model", "base"),
        copies,
        file_hashes(base.data if base else []),
    ]


def _evaluate_inputs(journey: Journey) -> Any:
    from .evaluate.questions import extra_files

    files = extra_files(journey.recipe.evaluate)
    hashes = file_hashes([path for _part, path in files])
    # The recipe's question is shown next to the metrics but is not one: `ask` asks it again.
    serve = journey.recipe.serve
    # Fewer bits change answers: another precision is another model to evaluate.
    own = serve.precision != "fp32" and serve.engine != "transformers" and not serve.adapters
    return [section_values(journey, "evaluate"), hashes, *([serve.precision] if own else [])]


def _gate(journey: Journey) -> GateManifest:
    from .evaluate import gate, report

    verdict = gate.check(journey.recipe, journey.run)
    return verdict.model_copy(update={"report": report.write(journey.run, verdict)})


def _gate_summary(manifest: GateManifest) -> str:
    from .evaluate import gate

    return gate.summary(manifest)


def _deploy(journey: Journey) -> EndpointManifest:
    from .evaluate import gate

    model = journey.run.require(ModelManifest).done_id
    before = journey.run.read(EndpointManifest)
    force = journey.force
    # What --force has deployed once is deployed again without it (after a restart of the machine,
    # say) while it is the same model and fails the same rules: that was decided already.
    if before is not None and before.gate is not None and before.gate.forced:
        same = before.of == model
        force |= same and before.gate.failed == gate.require_passed(journey.run, force=True).failed
    passed = gate.require_passed(journey.run, force=force)
    manifest = journey.target.deploy(journey.recipe, journey.run, journey.progress)
    remarks = [f"deployed by --force: {rule}" for rule in passed.failed]
    return manifest.model_copy(
        update={"gate": passed, "of": model, "choices": [*manifest.choices, *remarks]}
    )


def _answer_summary(manifest: AnswerManifest) -> str:
    if not manifest.through_flow:
        flow = f"the flow, which Prompt flow runs; add it with: {ADD_PROMPT_FLOW}"
        return f"{manifest.question!r} answered by the endpoint itself; left out: {flow}"
    places = ", ".join(manifest.asked_through)
    through = f"the connection of {places}" if places else "the flow"
    return f"{manifest.question!r} answered through {through}"


STAGES: tuple[Stage[Any], ...] = (
    Stage(
        DatasetManifest,
        title="prepare",
        needs=(),
        inputs=_data_inputs,
        work=_prepare,
        summary=lambda manifest: manifest.summary,
        outputs=lambda manifest: [part.path for part in manifest.outputs.values()],
    ),
    Stage(
        ProvisionManifest,
        title="provision",
        needs=(),  # what is there does not depend on the chats, nor they on it
        inputs=_at_target(ProvisionManifest),
        work=lambda j: _cloud(j).provide(j.recipe, j.run, j.progress, trains=_trains(j)),
        summary=lambda manifest: manifest.summary,
        still_good=lambda j, _manifest: _cloud(j).is_provided(j.recipe, j.run, trains=_trains(j)),
        only_in_cloud=True,
    ),
    Stage(
        BaseManifest,
        title="base",
        needs=(),
        inputs=_at_target(BaseManifest, _base_inputs),
        work=lambda j: j.target.prepare_base(j.recipe, j.run, j.progress),
        summary=lambda manifest: manifest.summary,
        outputs=lambda manifest: [manifest.path] if manifest.is_here else [],
    ),
    Stage(
        ModelManifest,
        title="finetune",
        needs=(DatasetManifest, BaseManifest),
        inputs=_at_target(ModelManifest, lambda j: section_values(j, "model", "finetune")),
        work=_train,
        summary=lambda manifest: manifest.summary,
        outputs=lambda manifest: [manifest.path] if manifest.is_here else [],
    ),
    Stage(
        MetricsManifest,
        title="evaluate",
        needs=(DatasetManifest, BaseManifest, ModelManifest),
        inputs=_at_target(MetricsManifest, _evaluate_inputs),
        work=lambda j: j.target.evaluate(j.recipe, j.run, j.progress),
        summary=lambda manifest: manifest.summary,
        outputs=lambda manifest: [manifest.rows],
    ),
    Stage(
        GateManifest,
        title="gate",
        needs=(MetricsManifest,),
        inputs=lambda j: section_values(j, "gate"),
        work=_gate,
        summary=_gate_summary,
        outputs=lambda manifest: [manifest.report],
        passed=lambda manifest: manifest.passed,
    ),
    Stage(
        RegistrationManifest,
        title="register",
        needs=(ModelManifest, MetricsManifest, GateManifest),
        inputs=_at_target(RegistrationManifest, lambda j: j.run.name),
        work=lambda j: j.target.register(j.recipe, j.run),
        summary=lambda manifest: manifest.summary,
        passed=lambda manifest: manifest.tags.get("gate_passed") != "False",
        outputs=lambda manifest: [manifest.store] if manifest.store else [],
    ),
    Stage(
        EndpointManifest,
        title="deploy",
        needs=(ModelManifest, GateManifest),
        needs_in_cloud=(RegistrationManifest, GateManifest),  # it deploys what was registered
        inputs=_at_target(EndpointManifest, lambda j: section_values(j, "serve")),
        work=_deploy,
        summary=lambda manifest: (
            f"{manifest.endpoint} ({manifest.engine if manifest.is_here else manifest.deployment})"
        ),
        still_good=lambda j, _manifest: j.target.is_up(j.recipe, j.run),
    ),
    Stage(
        ConnectionManifest,
        title="connect",
        needs=(EndpointManifest,),
        inputs=_at_target(ConnectionManifest, lambda j: section_values(j, "connection")),
        work=lambda j: j.target.connect(j.recipe, j.run, j.progress),
        summary=lambda manifest: f"Prompt flow connection {manifest.name}",
        still_good=lambda j, _manifest: j.target.is_connected(j.run),
        left_out=lambda j: "" if j.in_cloud or has_prompt_flow() else NO_PROMPT_FLOW,
    ),
    Stage(
        AnswerManifest,
        title="ask",
        needs=(ConnectionManifest,),
        inputs=lambda j: j.recipe.ask,
        work=lambda j: j.target.ask(j.flow, j.recipe, j.run, j.progress),
        summary=_answer_summary,
        # Asked through the flow as soon as there is one.
        still_good=lambda _journey, manifest: manifest.through_flow or not has_prompt_flow(),
    ),
)


def stages_of(*, in_cloud: bool) -> tuple[Stage[Any], ...]:
    """The stages of a journey on this machine, or away from it."""
    return tuple(stage for stage in STAGES if in_cloud or not stage.only_in_cloud)


def stages_until(last: type[Manifest], *, in_cloud: bool = False) -> tuple[Stage[Any], ...]:
    """The same up to and with the stage that makes the manifest `last`."""
    stages = stages_of(in_cloud=in_cloud)
    kinds = [stage.manifest for stage in stages]
    return stages[: kinds.index(last) + 1]
