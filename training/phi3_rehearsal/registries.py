"""The public registry `azureml`: discovery, and the models and components this road reads.

Nothing can be written to it.
"""

from __future__ import annotations

from . import component
from .cloud import Cloud, route
from .wire import ML, REGIONAL, Json, Reply, Request, not_found

HOST = "cert-{region}.experiments.azureml.net"
_GROUP, _SUBSCRIPTION = "azureml-system", "00000000-0000-4000-8000-5e6157000000"
_REGISTRY = (
    f"/mferp/managementfrontend/subscriptions/{{sub}}/resourceGroups/{{rg}}/providers/{ML}"
    "/registries/azureml"
)
_STAMP = {"createdAt": "2026-06-18T00:00:00Z", "lastModifiedAt": "2026-07-01T00:00:00Z"}
_DEFAULTS = (
    "{'apply_lora': 'true', 'apply_deepspeed': 'true', 'deepspeed_stage': 2, 'apply_ort': 'false', "
    "'precision': 16, 'ignore_mismatched_sizes': 'false', 'num_train_epochs': 1, "
    "'per_device_train_batch_size': 1, 'per_device_eval_batch_size': 1, "
    "'gradient_accumulation_steps': 1, 'learning_rate': 5e-06, 'learning_rate_min': 5e-07, "
    "'learning_rate_max': 5e-05, 'lr_scheduler_type': 'cosine', 'logging_strategy': 'steps', "
    "'logging_steps': 10, 'save_total_limit': 1}"
)
_A100 = [
    "Standard_NC24ads_A100_v4",
    "Standard_NC48ads_A100_v4",
    "Standard_NC96ads_A100_v4",
    "Standard_ND96amsr_A100_v4",
]
_H100 = ["Standard_NC40ads_H100_v5", "Standard_NC80adis_H100_v5", "Standard_ND96isr_H100_v5"]
# name: version, archived, fine-tuning sizes, inference sizes, created
_MODELS: dict[str, tuple[str, bool, list[str], list[str], str]] = {
    "Phi-3-mini-4k-instruct": (
        "15",
        True,
        [*_A100, "Standard_ND96asr_v4"],
        ["Standard_NC6s_v3", "Standard_NC12s_v3", "Standard_NC24s_v3", *_A100],
        "2025-06-10T00:00:00Z",
    ),
    "Phi-3-mini-128k-instruct": ("13", True, _A100, _A100, "2025-06-10T00:00:00Z"),
    "Phi-3.5-mini-instruct": ("6", True, _A100, _A100, "2025-06-10T00:00:00Z"),
    "Phi-4-mini-instruct": (
        "1",
        False,
        [*_A100, *_H100],
        [*_A100, *_H100],
        "2026-02-01T00:00:00Z",
    ),
    "Phi-4": ("8", False, [*_A100, *_H100], [*_A100, *_H100], "2026-06-18T00:00:00Z"),
}


@route("GET", REGIONAL, "/registrymanagement/v1.0/registries/{registry}/discovery", audience="")
def discover(_cloud: Cloud, request: Request) -> Reply:
    """Where the registry is managed."""
    name = request.args["registry"]
    if name.lower() != "azureml":
        raise not_found("registry", name)
    region = request.args["region"]
    return Reply(
        200,
        {
            "registryName": name,
            "subscriptionId": _SUBSCRIPTION,
            "resourceGroup": _GROUP,
            "primaryRegion": region,
            "primaryRegionResourceProviderUri": f"https://cert-{region}.experiments.azureml.net/",
            "regions": [region],
            "isPublic": True,
        },
    )


@route("GET", HOST, _REGISTRY + "/models/{name}", audience="regional")
def get_model(_cloud: Cloud, request: Request) -> Reply:
    """A model's container, with its latest version."""
    version = _model(request.args["name"])[0]
    properties = {"latestVersion": version, "nextVersion": str(int(version) + 1)}
    return Reply(200, {"name": request.args["name"], "properties": properties})


@route("GET", HOST, _REGISTRY + "/models/{name}/versions", audience="regional")
def list_model_versions(_cloud: Cloud, request: Request) -> Reply:
    """The versions; archived ones only where the view asks for them."""
    name = request.args["name"]
    view = request.query.get("listviewtype", "ActiveOnly").lower()
    archived = _model(name)[1]
    hidden = (archived and view == "activeonly") or (not archived and view == "archivedonly")
    return Reply(200, {"value": [] if hidden else [_version(name)]})


@route("GET", HOST, _REGISTRY + "/models/{name}/versions/{version}", audience="regional")
def get_model_version(_cloud: Cloud, request: Request) -> Reply:
    """One version, archived or not."""
    name, version = request.args["name"], request.args["version"]
    if version != _model(name)[0]:
        raise not_found("model version", f"{name}:{version}")
    return Reply(200, _version(name))


@route("GET", HOST, _REGISTRY + "/components/{name}", audience="regional")
def get_component(_cloud: Cloud, request: Request) -> Reply:
    """A component's container, with its latest version."""
    _check_component(request)
    properties = {"latestVersion": component.VERSION, "isArchived": False}
    return Reply(200, {"name": component.NAME, "properties": properties})


@route("GET", HOST, _REGISTRY + "/components/{name}/versions", audience="regional")
def list_component_versions(_cloud: Cloud, request: Request) -> Reply:
    """Its one version."""
    _check_component(request)
    return Reply(200, {"value": [_component()]})


@route("GET", HOST, _REGISTRY + "/components/{name}/versions/{version}", audience="regional")
def get_component_version(_cloud: Cloud, request: Request) -> Reply:
    """The component with its inputs."""
    _check_component(request)
    if request.args["version"] != component.VERSION:
        raise not_found("component version", request.args["version"])
    return Reply(200, _component())


@route("GET", HOST, _REGISTRY + "/environments/{name}", audience="regional")
def get_environment(_cloud: Cloud, request: Request) -> Reply:
    """Any curated environment, with one version."""
    name = request.args["name"]
    return Reply(200, {"name": name, "properties": {"latestVersion": "1", "isArchived": False}})


@route("GET", HOST, _REGISTRY + "/environments/{name}/versions", audience="regional")
def list_environment_versions(_cloud: Cloud, request: Request) -> Reply:
    """Its one version."""
    return Reply(200, {"value": [_environment(request.args["name"], "1")]})


@route("GET", HOST, _REGISTRY + "/environments/{name}/versions/{version}", audience="regional")
def get_environment_version(_cloud: Cloud, request: Request) -> Reply:
    """A curated environment."""
    return Reply(200, _environment(request.args["name"], request.args["version"]))


def find_model(asset_id: str) -> tuple[str, bool] | None:
    """Name of the registry's model that `azureml://registries/…` means, and if it is archived."""
    parts = asset_id.split("/")
    if len(parts) < 8 or parts[2:5] != ["registries", "azureml", "models"]:
        return None
    known = _MODELS.get(parts[5])
    return (parts[5], known[1]) if known and known[0] == parts[7] else None


def _model(name: str) -> tuple[str, bool, list[str], list[str], str]:
    if name not in _MODELS:
        raise not_found("model", name)
    return _MODELS[name]


def _version(name: str) -> Json:
    version, archived, tunes, serves, created = _MODELS[name]
    asset_id = f"azureml://registries/azureml/models/{name}/versions/{version}"
    computes = {"finetuneComputes": tunes, "inferenceComputes": serves}
    return {
        "id": asset_id,
        "name": version,
        "type": f"{ML}/registries/models/versions",
        "systemData": {**_STAMP, "createdAt": created},
        "properties": {
            "description": f"{name} as the catalogue has it.",
            "tags": {"task": "chat-completion", "model_specific_defaults": _DEFAULTS},
            "properties": {},
            "isArchived": archived,
            "isAnonymous": False,
            "modelType": "mlflow_model",
            "modelUri": f"https://rehearsal.blob.core.windows.net/azureml/{name}/mlflow_model_folder",
            "flavors": {},
            "stage": "Development",
            "provisioningState": "Succeeded",
            "systemMetadata": {"supportedComputes": computes, "tasks": ["chat-completion"]},
        },
    }


def _check_component(request: Request) -> None:
    if request.args["name"] != component.NAME:
        raise not_found("component", request.args["name"])


def _component() -> Json:
    asset_id = f"azureml://registries/azureml/components/{component.NAME}/versions/"
    return {
        "id": asset_id + component.VERSION,
        "name": component.VERSION,
        "type": f"{ML}/registries/components/versions",
        "systemData": dict(_STAMP),
        "properties": {
            "description": "Pipeline component for chat completion fine-tuning",
            "tags": {},
            "properties": {},
            "isArchived": False,
            "isAnonymous": False,
            "componentSpec": component.spec(),
            "provisioningState": "Succeeded",
        },
    }


def _environment(name: str, version: str) -> Json:
    return {
        "id": f"azureml://registries/azureml/environments/{name}/versions/{version}",
        "name": version,
        "systemData": dict(_STAMP),
        "properties": {
            "image": f"mcr.microsoft.com/azureml/curated/{name}:{version}",
            "osType": "Linux",
            "isArchived": False,
            "tags": {},
            "properties": {},
            "environmentType": "Curated",
        },
    }
