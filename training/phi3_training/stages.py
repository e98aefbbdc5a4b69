"""The nine stages of the journey on this machine, in order, each with what it depends on.

Heavy packages are imported inside the functions, so that a skipped stage costs nothing.
"""

from __future__ import annotations

from typing import Any

from phi3_tool.connection import same_endpoint

from .errors import StageError
from .journey import Journey, Manifest, Stage, file_hashes
from .models.catalogue import weights_folder

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


def _data_inputs(journey: Journey) -> Any:
    from .data import fingerprints

    data = journey.recipe.data
    sources = [*data.train, *data.validation, *data.replay]
    return [section_values(journey, "data"), fingerprints(sources)]


def _prepare(journey: Journey) -> Manifest:
    from .data import prepare

    model = weights_folder(journey.recipe.model.name_or_path)
    tokenizer = model if model and (model / "tokenizer.json").is_file() else None
    return prepare(journey.recipe.data, journey.run, tokenizer=tokenizer)


def _data_summary(manifest: Manifest) -> str:
    rows = {name: part["rows"] for name, part in manifest["outputs"].items()}
    return ", ".join(f"{count} {name}" for name, count in rows.items()) + " conversations"


def _base_inputs(journey: Journey) -> Any:
    base = journey.recipe.base if journey.recipe.model.is_tiny else None
    copies = journey.recipe.data.casual_copies and base is not None
    return [
        section_values(journey, "model", "base"),
        copies,
        file_hashes(base.data if base else []),
    ]


def _base(journey: Journey) -> Manifest:
    from .finetune import prepare_base

    return prepare_base(journey.recipe, journey.run, journey.progress)


def _finetune(journey: Journey) -> Manifest:
    return journey.target.train(journey.recipe, journey.run, journey.progress)


def _evaluate_inputs(journey: Journey) -> Any:
    from .evaluate.questions import extra_files

    files = extra_files(journey.recipe.evaluate)
    hashes = file_hashes([path for _part, path in files])
    # The recipe's question is shown next to the metrics but is not one: `ask` asks it again.
    serve = journey.recipe.serve
    # Four bits change answers: another precision is another model to evaluate.
    four_bits = serve.precision == "int4" and serve.engine != "transformers" and not serve.adapters
    return [section_values(journey, "evaluate"), hashes, *(["int4"] if four_bits else [])]


def _evaluate(journey: Journey) -> Manifest:
    from .evaluate import evaluate

    return evaluate(journey.recipe, journey.run, journey.progress)


def _metrics_summary(manifest: Manifest) -> str:
    before, after = manifest["before"], manifest["after"]
    parts = [
        f"{name} {before[name]['contains']:.0%} → {after[name]['contains']:.0%}"
        for name in after
        if "contains" in after[name]
    ]
    return "expected words: " + ", ".join(parts)


def _gate(journey: Journey) -> Manifest:
    from .evaluate import gate, report

    verdict = gate.check(journey.recipe, journey.run)
    return {**verdict, "report": report.write(journey.run, verdict)}


def _gate_summary(manifest: Manifest) -> str:
    from .evaluate import gate

    return gate.summary(manifest)


def _register(journey: Journey) -> Manifest:
    return journey.target.register(journey.recipe, journey.run)


def _deploy(journey: Journey) -> Manifest:
    from .evaluate import gate

    passed = gate.require_passed(journey.run, force=journey.force)
    manifest = journey.target.deploy(journey.recipe, journey.run, journey.progress)
    remarks = [f"deployed by --force: {rule}" for rule in passed["failed"]]
    return {**manifest, "gate": passed, "choices": [*manifest.get("choices", []), *remarks]}


def _endpoint_up(journey: Journey, manifest: Manifest) -> bool:
    """The endpoint runs and its key is known; else only a new one has a key to connect with."""
    if journey.target.status(journey.run)["endpoint"]["state"] != "up":
        return False
    return _key(journey, manifest) is not None


def _key(journey: Journey, endpoint: Manifest) -> str | None:
    """The endpoint's key: from the target, else from the store if that leads to this endpoint.

    Neither has it after a stop between `deploy` and `connect`, or when another run connected since.
    """
    from .flow.store import StoreError, read_connection

    key = journey.target.key(journey.run)
    if key is not None:
        return key
    try:
        stored, stored_key = read_connection(journey.recipe.connection.name)
    except StoreError:
        return None
    return stored_key if same_endpoint(stored, endpoint["endpoint"]) else None


def _connect(journey: Journey) -> Manifest:
    from .flow.connect import connect

    endpoint = journey.run.require("endpoint", "phi3 deploy")
    key = _key(journey, endpoint)
    if key is None:
        raise StageError(
            "No running process holds the endpoint's key any more; restart the endpoint with: "
            "phi3 down && phi3 up"
        )
    asked = journey.recipe.connection
    return connect(journey.run, endpoint, key, asked.name, asked.dialect)


def _ask(journey: Journey) -> Manifest:
    from .flow.ask import ask

    question = journey.recipe.ask
    answer = ask(journey.flow, question, connection_name=journey.recipe.connection.name)
    return {"question": question, "answer": answer}


STAGES: tuple[Stage, ...] = (
    Stage(
        manifest="dataset",
        title="prepare",
        needs=(),
        inputs=_data_inputs,
        work=_prepare,
        summary=_data_summary,
        outputs=lambda manifest: [part["path"] for part in manifest["outputs"].values()],
    ),
    Stage(
        manifest="base",
        title="base",
        needs=(),
        inputs=_base_inputs,
        work=_base,
        summary=lambda manifest: str(manifest["summary"]),
        outputs=lambda manifest: [manifest["path"]],
    ),
    Stage(
        manifest="model",
        title="finetune",
        needs=("dataset", "base"),
        inputs=lambda journey: section_values(journey, "model", "finetune"),
        work=_finetune,
        summary=lambda manifest: str(manifest["summary"]),
        outputs=lambda manifest: [manifest["path"]],
    ),
    Stage(
        manifest="metrics",
        title="evaluate",
        needs=("dataset", "base", "model"),
        inputs=_evaluate_inputs,
        work=_evaluate,
        summary=_metrics_summary,
        outputs=lambda manifest: [manifest["rows"]],
    ),
    Stage(
        manifest="gate",
        title="gate",
        needs=("metrics",),
        inputs=lambda journey: section_values(journey, "gate"),
        work=_gate,
        summary=_gate_summary,
        outputs=lambda manifest: [manifest["report"]],
        passed=lambda manifest: bool(manifest["passed"]),
    ),
    Stage(
        manifest="registration",
        title="register",
        needs=("model", "metrics"),
        inputs=lambda journey: journey.recipe.name,
        work=_register,
        summary=lambda manifest: f"{manifest['model']} version {manifest['model_version']}",
        outputs=lambda manifest: [manifest["store"]],
    ),
    Stage(
        manifest="endpoint",
        title="deploy",
        needs=("model", "gate"),
        inputs=lambda journey: section_values(journey, "serve"),
        work=_deploy,
        summary=lambda manifest: f"{manifest['endpoint']} ({manifest['engine']})",
        still_good=_endpoint_up,
    ),
    Stage(
        manifest="connection",
        title="connect",
        needs=("endpoint",),
        inputs=lambda journey: section_values(journey, "connection"),
        work=_connect,
        summary=lambda manifest: f"Prompt flow connection {manifest['name']}",
    ),
    Stage(
        manifest="answer",
        title="ask",
        needs=("connection",),
        inputs=lambda journey: journey.recipe.ask,
        work=_ask,
        summary=lambda manifest: f"{manifest['question']!r} answered through the flow",
    ),
)


def stages_until(manifest: str) -> tuple[Stage, ...]:
    """The stages up to and with the one that writes `<manifest>.json`."""
    names = [stage.manifest for stage in STAGES]
    return STAGES[: names.index(manifest) + 1]
