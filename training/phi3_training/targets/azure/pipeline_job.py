"""The route `pipeline`: the registry's chat_completion_pipeline on a model of Azure's catalogue.

Finds the model, its sizes for fine-tuning and its own defaults; what the registry says counts, and
a dated table is used where it no longer lists any. Parameters are the tutorial's, then the
model's, then the recipe's; only what the component has as an input is sent, in its type.
"""

from __future__ import annotations

import ast
import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import StageError
from ...progress import Progress
from ...recipe import Recipe
from ...recipe.azure import FoundationModelSection, Scalar
from ...run import Run
from .clients import Clients
from .command_job import data_files
from .failures import explained
from .operations import is_absent
from .place import JOB_RUN_TAG, resource_tags
from .sizes import gpus_in
from .storage import output_path, upload

if TYPE_CHECKING:
    from azure.ai.ml import Input
    from azure.ai.ml.entities import Model, PipelineJob

PIPELINE_OUTPUT = "trained_model"
_COMPONENT_OUTPUT = "mlflow_model_folder"

# From the models' specifications in Azure/azureml-assets (assets/models/system/<model>/spec.yaml).
# Their tags with the sizes were removed on 2026-06-16; these are their values until then.
TABLE_DATE = "2026-11-21"
_NC = ("Standard_NC24ads_A100_v4", "Standard_NC48ads_A100_v4", "Standard_NC96ads_A100_v4")
_ND_80, _ND_40 = "Standard_ND96amsr_A100_v4", "Standard_ND96asr_v4"
_H100 = (
    "Standard_NC40ads_H100_v5",
    "Standard_NC80adis_H100_v5",
    "Standard_ND96isr_H100_v5",
)
SIZES = {
    "phi-3-mini-4k-instruct": (*_NC, _ND_40, _ND_80),
    "phi-3-mini-128k-instruct": (*_NC, _ND_80),
    "phi-3.5-mini-instruct": (*_NC, _ND_80),
    "phi-4": (*_NC, _ND_80, _ND_40, *_H100),
}
# Foundry's "Retired models" page, and `isArchived` of the specifications.
_RETIRED = "retired 2025-08-30, archived in the catalogue since 2026-06-02"
ARCHIVED = {
    "phi-3-mini-4k-instruct": _RETIRED,
    "phi-3-mini-128k-instruct": _RETIRED,
    "phi-3-small-8k-instruct": _RETIRED,
    "phi-3-small-128k-instruct": _RETIRED,
    "phi-3-medium-4k-instruct": _RETIRED,
    "phi-3-medium-128k-instruct": _RETIRED,
    "phi-3.5-mini-instruct": _RETIRED,
    "phi-3.5-moe-instruct": _RETIRED,
}
# The last versions of archived models: the registry does not list them, so `latest` finds none.
LAST_VERSIONS = {
    "phi-3-mini-4k-instruct": "15",
    "phi-3-mini-128k-instruct": "13",
    "phi-3.5-mini-instruct": "6",
}
SIZES_TAG, DEFAULTS_TAG = "finetune_compute_allow_list", "model_specific_defaults"

# The tutorial's training and optimisation parameters (chat-completion.ipynb of azureml-examples).
# The switches are the words "true" and "false": a Python True would be sent as "True", which is
# none of the component's values.
TUTORIAL: dict[str, Scalar] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "apply_lora": "true",
    "apply_deepspeed": "true",
    "deepspeed_stage": 2,
}
# Inputs that the route itself sets: model, data and machines.
SET_BY_ROUTE = frozenset(
    (
        "mlflow_model_path",
        "pytorch_model_path",
        "huggingface_id",
        "train_file_path",
        "validation_file_path",
        "test_file_path",
        "compute_model_import",
        "compute_preprocess",
        "compute_finetune",
        "compute_model_evaluation",
        "number_of_gpu_to_use_finetuning",
        "num_nodes_finetune",
        "shm_size_finetune",
    )
)


@dataclass(frozen=True)
class FoundationModel:
    """A model of the catalogue. `allowed` None: no list of sizes, every GPU size is taken."""

    name: str
    version: str
    id: str
    allowed: tuple[str, ...] | None
    allowed_from: str
    defaults: Mapping[str, Scalar]
    archived: str | None  # why it should not be used any more


def find_foundation_model(
    clients: Clients, section: FoundationModelSection, name: str
) -> FoundationModel | None:
    """The model by name and version; None where the registry has none.

    StageError where the model's defaults cannot be read.
    """
    from azure.ai.ml.exceptions import ValidationException
    from azure.core.exceptions import HttpResponseError

    models = clients.registry(section.registry_name).models
    version: str | None = section.version
    with explained(f"Looking for the model {name} in the registry {section.registry_name}"):
        try:
            if version == "latest":
                try:  # the version that was created last, not the highest number
                    version = str(models.get(name=name, label="latest").version)
                except ValidationException:  # so the SDK says that no version is listed
                    version = LAST_VERSIONS.get(name.lower())
            if version is None:
                return None
            model = models.get(name=name, version=version)
        except HttpResponseError as error:
            if not is_absent(error):
                raise
            return None
    answers = clients.model_answers(section.registry_name)
    return foundation_model(model, answers.properties(str(model.name), str(model.version)))


def foundation_model(model: Model, properties: Mapping[str, object]) -> FoundationModel:
    """What phi3 needs of a catalogue model; `properties` are the registry's own answer.

    The sizes for fine-tuning are in a tag (until June 2026), in the system metadata (since), or
    only in our table.
    """
    name = str(model.name)
    tags: dict[str, object] = dict(model.tags or {})
    metadata = _mapping(
        properties.get("systemMetadata") or getattr(model, "_system_metadata", None)
    )
    allowed: tuple[str, ...] | None
    if sizes := _size_list(tags.get(SIZES_TAG)):
        allowed, source = sizes, f"the model's tag {SIZES_TAG}"
    elif sizes := _size_list(_mapping(metadata.get("supportedComputes")).get("finetuneComputes")):
        allowed, source = sizes, "the model's system_metadata"
    elif name.lower() in SIZES:
        allowed, source = SIZES[name.lower()], f"our table of {TABLE_DATE}"
    else:
        allowed, source = None, "no list is published"

    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    deprecation = _mapping(metadata.get("deprecation"))
    retired = str(deprecation.get("finetuneRetirementDate") or "")[:10]
    archived = ARCHIVED.get(name.lower())
    if archived is None and properties.get("isArchived") is True:
        archived = "archived in the catalogue"
    if archived is None and retired[:1] >= "2" and retired <= today:  # ISO dates sort as text
        archived = f"retired {retired}"
    return FoundationModel(
        name=name,
        version=str(model.version),
        id=str(model.id),
        allowed=allowed,
        allowed_from=source,
        defaults=parse_defaults(tags.get(DEFAULTS_TAG), name),
        archived=archived,
    )


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _size_list(value: object) -> tuple[str, ...] | None:
    """A list of sizes, or the text of one, as the tag has it."""
    if isinstance(value, str):
        value = _literal(value)
    if not isinstance(value, (list, tuple)):
        return None
    return tuple(item for item in value if isinstance(item, str)) or None


def parse_defaults(value: object, model: str) -> dict[str, Scalar]:
    """The model's own parameters: the text of a Python dictionary, read and never run as code."""
    if value in (None, ""):
        return {}
    content = _literal(value) if isinstance(value, str) else value
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(item, (str, int, float, bool))
        for key, item in content.items()
    ):
        raise StageError(
            f"The model {model} has a tag {DEFAULTS_TAG} that is not a plain dictionary of "
            "values, so it is not used. Use our own trainer: azure.train.route=job"
        )
    return dict(content)


def _literal(text: str) -> object:
    try:  # the limit keeps a hostile tag from costing minutes
        return ast.literal_eval(text) if len(text) <= 20_000 else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


@dataclass(frozen=True)
class Parameters:
    """What is sent, where each value came from, and what the component does not take."""

    values: dict[str, Scalar]
    sources: dict[str, str]
    dropped: tuple[str, ...]

    def lines(self) -> list[str]:
        """The choices and their reasons."""
        by_source: dict[str, list[str]] = {}
        for key, source in self.sources.items():
            by_source.setdefault(source, []).append(f"{key} {self.values[key]}")
        lines = [f"{', '.join(items)}: {source}" for source, items in by_source.items()]
        if self.dropped:
            lines.append(
                f"left out, because the component has no such input: {', '.join(self.dropped)}"
            )
        return lines


def merge_parameters(
    defaults: Mapping[str, Scalar], from_recipe: Mapping[str, Scalar], inputs: Mapping[str, object]
) -> Parameters:
    """The parameters for a component; StageError with every fault of the recipe."""
    # What the model's defaults have and the component has not is left out: since February 2025 they
    # have learning_rate_min and _max, which make the SDK's call fail. The recipe's own are refused.
    values: dict[str, Scalar] = {}
    sources: dict[str, str] = {}
    dropped: list[str] = []
    faults: list[str] = []
    for source, items in (
        ("as in the tutorial", TUTORIAL),
        ("the model's own default", defaults),
        ("azure.train.parameters", from_recipe),
    ):
        is_recipe = source == "azure.train.parameters"
        for key, value in items.items():
            if key in SET_BY_ROUTE or key not in inputs:
                if not is_recipe:
                    dropped.append(key)
                elif key in SET_BY_ROUTE:
                    faults.append(f"{key}: phi3 sets this from the rest of the recipe")
                else:
                    near = sorted(name for name in inputs if name.startswith(key[:5]))
                    hint = f"; it has {', '.join(near[:5])}" if near else ""
                    faults.append(f"{key}: the component has no such input{hint}")
                continue
            try:
                values[key] = fitted(value, inputs[key])
                sources[key] = source
            except ValueError as error:
                (faults if is_recipe else dropped).append(f"{key} {value!r}: {error}")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise StageError(f"azure.train.parameters has faults:\n{lines}")
    return Parameters(values, sources, tuple(dict.fromkeys(dropped)))


def fitted(value: Scalar, spec: object) -> Scalar:
    """The value in the type of a component's input. ValueError if it is not an allowed value."""

    def of_spec(name: str) -> Any:
        return spec.get(name) if isinstance(spec, Mapping) else getattr(spec, name, None)

    # The SDK sends every value as text: 5e-6 travels as "5e-06", 2 as "2".
    kind = str(of_spec("type") or "string").lower()
    if kind in ("integer", "number"):
        if isinstance(value, bool):
            raise ValueError("expected a number")
        number: int | float = float(value)
        if kind == "integer":
            if number != int(number):
                raise ValueError("expected a whole number")
            number = int(number)
        low, high = of_spec("min"), of_spec("max")
        if low is not None and number < float(low):
            raise ValueError(f"expected at least {low}")
        if high is not None and number > float(high):
            raise ValueError(f"expected at most {high}")
        return number
    text = str(value)
    if kind == "boolean" or isinstance(value, bool):
        text = text.lower()
        if text not in ("true", "false"):
            raise ValueError("expected true or false")
    if kind == "boolean":
        return text == "true"
    # An input with choices is a string, even where they look like numbers (`precision`: "32",
    # "16").
    choices = [str(item) for item in of_spec("enum") or ()]
    if choices and text not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}")
    return text


def display_name(model: str, data: str, values: Mapping[str, Scalar], gpus: int, nodes: int) -> str:
    """What the job is shown as: model, data, batch over all GPUs, schedule and memory settings."""
    batch = (
        int(values.get("per_device_train_batch_size", 1))
        * int(values.get("gradient_accumulation_steps", 1))
        * gpus
        * nodes
    )
    deepspeed = values.get("apply_deepspeed", "false") == "true"
    parts = (
        model,
        data,
        f"bs{batch}",
        str(values.get("lr_scheduler_type", "linear")),
        f"ds{values.get('deepspeed_stage', '2')}" if deepspeed else "nods",
        "lora" if values.get("apply_lora", "false") == "true" else "nolora",
        f"save_limit{values.get('save_total_limit', -1)}",
        f"seqlen{values.get('max_seq_length', -1)}",
    )
    return "-".join(parts)


@dataclass(frozen=True)
class PreparedPipeline:
    """The component with all that it is given, except the chats."""

    component: Any  # a pipeline component of the SDK: called with its inputs as keywords
    parameters: Parameters
    gpus: int
    display_name: str


def prepare_pipeline(
    clients: Clients, recipe: Recipe, foundation: FoundationModel
) -> PreparedPipeline:
    """Find the component, count GPUs, and settle its parameters."""
    train = recipe.azure.train
    section = train.component
    components = clients.registry(section.registry_name).components
    with explained(f"Looking for the component {section.name}"):
        if section.version == "latest":
            component = components.get(name=section.name, label="latest")
        else:
            component = components.get(name=section.name, version=section.version)
    inputs: dict[str, object] = dict(component.inputs)
    # What this route relies on. The component had 69 inputs in version 0.0.82; most are optional.
    missing = sorted({"mlflow_model_path", "train_file_path", "compute_finetune"} - inputs.keys())
    missing += [] if _COMPONENT_OUTPUT in component.outputs else [f"output {_COMPONENT_OUTPUT}"]
    if missing:
        raise StageError(
            f"The component {component.name} {component.version} lacks {', '.join(missing)}: it is "
            "not the fine-tuning pipeline that phi3 knows. Set azure.train.component, or use "
            "azure.train.route=job"
        )
    # The component's own default is 1, whatever the machine has.
    gpus = gpus_in(clients, recipe.azure.compute.size, "azure.compute.size")
    parameters = merge_parameters(foundation.defaults, train.parameters, inputs)
    shown = display_name(
        foundation.name, recipe.name, parameters.values, gpus, train.instance_count
    )
    return PreparedPipeline(component, parameters, gpus, shown)


def send_chats(clients: Clients, run: Run, progress: Progress) -> dict[str, str]:
    """Upload the chats that are not there yet; the address of each part."""
    files = data_files(run)
    parts = [part for part in ("train", "validation") if part in files]
    return {part: upload(clients, files[part], progress).path for part in parts}


def pipeline_inputs(
    recipe: Recipe,
    foundation: FoundationModel,
    prepared: PreparedPipeline,
    chats: Mapping[str, str],
) -> dict[str, Input | Scalar]:
    """Every input that is sent, by name: values, and the SDK's Input for files and models.

    `chats`: the address of each part.
    """
    from azure.ai.ml import Input

    cluster = recipe.azure.compute.name
    # mlflow_model_path takes precedence over the component's huggingface_id.
    inputs: dict[str, Input | Scalar] = {
        "mlflow_model_path": Input(type="mlflow_model", path=foundation.id),
        "number_of_gpu_to_use_finetuning": prepared.gpus,
        "num_nodes_finetune": recipe.azure.train.instance_count,
        "shm_size_finetune": recipe.azure.train.shm_size,
        "train_file_path": Input(type="uri_file", path=chats["train"]),
    }
    # A cluster's name takes precedence over the component's instance_type_* inputs, whose defaults
    # are V100 sizes that Azure retired in 2025.
    for stage in ("model_import", "preprocess", "finetune", "model_evaluation"):
        inputs[f"compute_{stage}"] = cluster
    if "validation" in chats:
        # Both, because the component takes a fifth of the training chats for one that is missing.
        for key in ("validation_file_path", "test_file_path"):
            inputs[key] = Input(type="uri_file", path=chats["validation"])
    known = prepared.component.inputs
    inputs = {key: value for key, value in inputs.items() if key in known}
    return {**inputs, **prepared.parameters.values}


def pipeline_job(
    recipe: Recipe,
    run: Run,
    name: str,
    foundation: FoundationModel,
    prepared: PreparedPipeline,
    chats: Mapping[str, str],
) -> PipelineJob:
    """The pipeline job, under a name that was written down before."""
    from azure.ai.ml import Output
    from azure.ai.ml.dsl import pipeline

    inputs = pipeline_inputs(recipe, foundation, prepared, chats)

    # As in the tutorial: no step is taken from an earlier job, none runs after one that failed.
    @pipeline(  # type: ignore[call-overload,untyped-decorator,unused-ignore]
        display_name=prepared.display_name, force_rerun=True, continue_on_step_failure=False
    )
    def tuned() -> Any:
        step = prepared.component(**inputs)
        return {PIPELINE_OUTPUT: step.outputs[_COMPONENT_OUTPUT]}

    with explained("Building the pipeline"):
        job: PipelineJob = tuned()
    job.name = name
    job.display_name = prepared.display_name
    job.experiment_name = recipe.azure.train.experiment_name
    job.tags = {JOB_RUN_TAG: run.name, **resource_tags(recipe.azure)}
    job.outputs[PIPELINE_OUTPUT] = Output(
        type="mlflow_model", path=output_path(name, PIPELINE_OUTPUT), mode="rw_mount"
    )
    return job
