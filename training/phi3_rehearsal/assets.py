"""Versioned assets: models, data, environments, components and code of a workspace, and the models
and components of the public registry `azureml`, which nobody can change.

Reads blobs where a model's files must exist; a version cannot be changed once made.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from . import offers, tiny_model
from .cloud import Cloud, listed, public, route, stamps
from .storage import BlobFiles, account_sas
from .wire import ARM, ML, REGIONAL, WORKSPACE, AzureError, Json, Reply, Request, bad, not_found
from .workspaces import container_of, need_workspace, storage_account

_FAMILY = WORKSPACE + "/{family:models|data|environments|components|codes}/{name}"
_ONE = _FAMILY + "/versions/{version}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-_.]{0,254}")
_STORE_URI = re.compile(
    r"azureml://(?:subscriptions/[^/]+/resourcegroups/[^/]+/(?:providers/[^/]+/)?workspaces/[^/]+/)?"
    r"datastores/([^/]+)/paths/(.+)",
    re.IGNORECASE,
)
_JOB_URI = re.compile(
    r"azureml://(?:subscriptions/[^/]+/resourcegroups/[^/]+/(?:providers/[^/]+/)?workspaces/[^/]+/)?"
    r"jobs/([^/]+)/outputs/([^/]+?)(?:/paths)?(?:/(.*))?$",
    re.IGNORECASE,
)


@route("PUT", ARM, _ONE)
def put_version(cloud: Cloud, request: Request) -> Reply:
    """Make a version; of an existing one only tags and description change."""
    family, workspace = request.args["family"].lower(), need_workspace(cloud, request)
    name, given = request.args["name"], request.json().get("properties") or {}
    if not _NAME.fullmatch(name):
        raise bad(f"Asset name '{name}' is invalid.", "ValidationError")
    before = cloud.get(request.id(_ONE))
    if family == "models":
        given = _checked_model(cloud, workspace, given, before)
    kind = f"{ML}/workspaces/{family}/versions"
    properties = {
        "isArchived": False,
        "isAnonymous": False,
        "tags": {},
        "properties": {},
        "provisioningState": "Succeeded",
        **given,
    }
    document = {
        "properties": properties,
        "systemData": before["systemData"] if before else stamps(),
    }
    made = cloud.put(request.id(_ONE), kind, document)
    return Reply(200 if before else 201, public(made))


def _checked_model(cloud: Cloud, workspace: Json, given: Json, before: Json | None) -> Json:
    uri = str(given.get("modelUri") or "")
    found = datastore_uri(cloud, workspace, uri)
    if before and before["properties"]["modelUri"].rstrip("/") != found.rstrip("/"):
        raise AzureError(
            409,
            "UserError",
            "A model with this name and version already exists; its path cannot be changed.",
        )
    place = locate(cloud, workspace, uri)
    if not place.exists():
        raise bad(
            f"NoMatchingArtifactsFoundFromJob: no artifacts were found at '{uri}'.", "UserError"
        )
    mlflow = str(given.get("modelType", "")).lower().replace("_", "") in ("mlflow", "mlflowmodel")
    if mlflow and not (place / "MLmodel").is_file():
        raise bad(f"The model at '{uri}' has no MLmodel file.", "UserError")
    return {"flavors": {}, "stage": "Development", **given, "modelUri": found}


def datastore_uri(cloud: Cloud, workspace: Json, uri: str) -> str:
    """The address of an asset's files in a datastore, jobs' outputs resolved."""
    match = _JOB_URI.match(uri)
    if not match:
        return uri
    job, output, rest = match.groups()
    doc = cloud.get(f"{workspace['id']}/jobs/{job}")
    if doc is None:
        raise bad(f"The job '{job}' was not found.", "UserError")
    known = doc["properties"].get("outputs") or {}
    if output not in known and output != "artifacts":
        raise bad(f"The job '{job}' has no output '{output}'.", "UserError")
    base = str(known[output]["uri"] if output in known else doc["_artifacts"]).rstrip("/")
    return f"{base}/{rest}" if rest else base


def locate(cloud: Cloud, workspace: Json, uri: str) -> Path:
    """Where the files that `uri` means lie. Raises AzureError when it means nothing here."""
    uri = datastore_uri(cloud, workspace, uri)
    files = BlobFiles(cloud.folder, storage_account(workspace))
    match = _STORE_URI.match(uri)
    if match:
        return files.path(container_of(workspace, match.group(1)), match.group(2))
    blob = re.match(
        r"(?:https|wasbs)://([^.@]+)\.blob\.core\.windows\.net(?::443)?/([^/]+)/?(.*)", uri
    )
    if blob:
        account, container, name = blob.groups()
        store = BlobFiles(cloud.folder, account)
        return store.path(container, name) if name else store.data / container
    raise bad(f"The path '{uri}' is not supported.", "UserError")


@route("POST", ARM, _ONE + "/startPendingUpload")
def start_upload(cloud: Cloud, request: Request) -> Reply:
    """A container of its own for the files of an asset, with a signature to write there."""
    account = storage_account(need_workspace(cloud, request))
    own = uuid.uuid5(uuid.NAMESPACE_URL, request.id(_ONE).lower())
    address = f"https://{account}.blob.core.windows.net/{own}"
    credential = {"credentialType": "SAS", "sasUri": f"{address}?{account_sas(cloud, account)}"}
    reference = {"blobUri": address, "storageAccountArmId": account, "credential": credential}
    upload = {"pendingUploadId": str(own), "pendingUploadType": "TemporaryBlobReference"}
    return Reply(200, {"blobReferenceForConsumption": reference, **upload})


@route("GET", ARM, _ONE)
def get_version(cloud: Cloud, request: Request) -> Reply:
    """One version."""
    return Reply(200, public(need_version(cloud, request)))


@route("DELETE", ARM, _ONE)
def delete_version(cloud: Cloud, request: Request) -> Reply:
    """Delete a version."""
    return cloud.delete_now(request.id(_ONE))


@route("GET", ARM, _FAMILY)
def get_container(cloud: Cloud, request: Request) -> Reply:
    """The asset's container, with its latest and next version."""
    family = request.args["family"]
    found = _versions(cloud, request)
    if not found:
        raise AzureError(
            404, "UserError", f"{family} container with name {request.args['name']} not found."
        )
    numbers = [int(doc["name"]) for doc in found if doc["name"].isdigit()]
    properties = {
        "latestVersion": found[-1]["name"],
        "nextVersion": str(max(numbers, default=0) + 1),
        "isArchived": all(doc["properties"]["isArchived"] for doc in found),
    }
    arm_id = request.id(_FAMILY)
    return Reply(200, {"id": arm_id, "name": request.args["name"], "properties": properties})


@route("GET", ARM, _FAMILY + "/versions")
def list_versions(cloud: Cloud, request: Request) -> Reply:
    """The versions, newest first where that is asked for; archived ones are left out."""
    found = _versions(cloud, request)
    digest = request.query.get("hash")
    if digest:  # asked before an upload: under whatever name, the same files
        everything = cloud.children(request.id(WORKSPACE) + "/" + request.args["family"])
        return listed(
            [doc for doc in everything if digest in doc["properties"]["properties"].values()]
        )
    if "desc" in request.query.get("$orderby", request.query.get("orderby", "")).lower():
        found = found[::-1]
    view = request.query.get("listviewtype", "ActiveOnly").lower()
    if view == "activeonly":
        found = [doc for doc in found if not doc["properties"]["isArchived"]]
    top = request.query.get("$top")
    return listed(found[: int(top)] if top else found)


@route("GET", ARM, WORKSPACE + "/models")
def list_models(cloud: Cloud, request: Request) -> Reply:
    """The containers of all models."""
    workspace = need_workspace(cloud, request)
    docs = cloud.children(f"{workspace['id']}/models")
    names = dict.fromkeys(doc["id"].split("/")[-3] for doc in docs)
    values = []
    for name in names:
        own = [doc for doc in docs if doc["id"].split("/")[-3] == name]
        properties = {"latestVersion": own[-1]["name"], "isArchived": False, "tags": {}}
        values.append(
            {"id": f"{workspace['id']}/models/{name}", "name": name, "properties": properties}
        )
    return Reply(200, {"value": values})


def need_version(cloud: Cloud, request: Request) -> Json:
    """The version that the request names. Raises AzureError (404)."""
    need_workspace(cloud, request)
    family, name, version = (request.args[key] for key in ("family", "name", "version"))
    text = f"{family} asset with name {name} and version {version} not found."
    return cloud.need(request.id(_ONE), code="UserError", message=text)


def _versions(cloud: Cloud, request: Request) -> list[Json]:
    need_workspace(cloud, request)
    return cloud.children(request.id(_FAMILY) + "/versions")


# --- the registry `azureml` ---

_REGISTRY_HOST = "cert-{region}.experiments.azureml.net"
_REGISTRY_GROUP, _REGISTRY_SUBSCRIPTION = "azureml-system", "00000000-0000-4000-8000-5e6157000000"
_REGISTRY = (
    f"/mferp/managementfrontend/subscriptions/{{sub}}/resourceGroups/{{rg}}/providers/{ML}"
    "/registries/azureml"
)
_STAMP = {"createdAt": "2026-06-18T00:00:00Z", "lastModifiedAt": "2026-07-01T00:00:00Z"}


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
            "subscriptionId": _REGISTRY_SUBSCRIPTION,
            "resourceGroup": _REGISTRY_GROUP,
            "primaryRegion": region,
            "primaryRegionResourceProviderUri": f"https://cert-{region}.experiments.azureml.net/",
            "regions": [region],
            "isPublic": True,
        },
    )


@route("GET", _REGISTRY_HOST, _REGISTRY + "/models/{name}", audience="regional")
def get_model(_cloud: Cloud, request: Request) -> Reply:
    """A model's container, with its latest version."""
    version = _model(request.args["name"]).version
    properties = {"latestVersion": version, "nextVersion": str(int(version) + 1)}
    return Reply(200, {"name": request.args["name"], "properties": properties})


@route("GET", _REGISTRY_HOST, _REGISTRY + "/models/{name}/versions", audience="regional")
def list_model_versions(_cloud: Cloud, request: Request) -> Reply:
    """The versions; archived ones only where the view asks for them."""
    name = request.args["name"]
    view = request.query.get("listviewtype", "ActiveOnly").lower()
    archived = _model(name).archived
    hidden = (archived and view == "activeonly") or (not archived and view == "archivedonly")
    return Reply(200, {"value": [] if hidden else [_version(name)]})


@route("GET", _REGISTRY_HOST, _REGISTRY + "/models/{name}/versions/{version}", audience="regional")
def get_model_version(_cloud: Cloud, request: Request) -> Reply:
    """One version, archived or not."""
    name, version = request.args["name"], request.args["version"]
    if version != _model(name).version:
        raise not_found("model version", f"{name}:{version}")
    return Reply(200, _version(name))


@route("GET", _REGISTRY_HOST, _REGISTRY + "/components/{name}", audience="regional")
def get_component(_cloud: Cloud, request: Request) -> Reply:
    """A component's container, with its latest version."""
    _check_component(request)
    properties = {"latestVersion": offers.COMPONENT_VERSION, "isArchived": False}
    return Reply(200, {"name": offers.COMPONENT, "properties": properties})


@route("GET", _REGISTRY_HOST, _REGISTRY + "/components/{name}/versions", audience="regional")
def list_component_versions(_cloud: Cloud, request: Request) -> Reply:
    """Its one version."""
    _check_component(request)
    return Reply(200, {"value": [_component()]})


@route(
    "GET", _REGISTRY_HOST, _REGISTRY + "/components/{name}/versions/{version}", audience="regional"
)
def get_component_version(_cloud: Cloud, request: Request) -> Reply:
    """The component with its inputs."""
    _check_component(request)
    if request.args["version"] != offers.COMPONENT_VERSION:
        raise not_found("component version", request.args["version"])
    return Reply(200, _component())


@route("GET", _REGISTRY_HOST, _REGISTRY + "/environments/{name}", audience="regional")
def get_environment(_cloud: Cloud, request: Request) -> Reply:
    """Any curated environment, with one version."""
    name = request.args["name"]
    return Reply(200, {"name": name, "properties": {"latestVersion": "1", "isArchived": False}})


@route("GET", _REGISTRY_HOST, _REGISTRY + "/environments/{name}/versions", audience="regional")
def list_environment_versions(_cloud: Cloud, request: Request) -> Reply:
    """Its one version."""
    return Reply(200, {"value": [_environment(request.args["name"], "1")]})


@route(
    "GET",
    _REGISTRY_HOST,
    _REGISTRY + "/environments/{name}/versions/{version}",
    audience="regional",
)
def get_environment_version(_cloud: Cloud, request: Request) -> Reply:
    """A curated environment."""
    return Reply(200, _environment(request.args["name"], request.args["version"]))


def _model(name: str) -> offers.CatalogueModel:
    if name not in offers.MODELS:
        raise not_found("model", name)
    return offers.MODELS[name]


def _version(name: str) -> Json:
    model = offers.MODELS[name]
    # Since June 2026 the sizes are here; the tags that listed them before are gone.
    metadata: Json = {
        "supportedComputes": {
            "finetuneComputes": list(model.finetune_sizes),
            "inferenceComputes": list(model.inference_sizes),
        },
        "tasks": ["chat-completion"],
    }
    if model.archived:
        names = ("inferenceRetirementDate", "finetuneRetirementDate")
        metadata["deprecation"] = dict.fromkeys(names, offers.RETIRED_ON)
    return {
        "id": f"azureml://registries/azureml/models/{name}/versions/{model.version}",
        "name": model.version,
        "type": f"{ML}/registries/models/versions",
        "systemData": {**_STAMP, "createdAt": model.created},
        "properties": {
            "description": f"{name} as the catalogue has it.",
            "tags": {"task": "chat-completion", "model_specific_defaults": model.defaults},
            "properties": {},
            "isArchived": model.archived,
            "isAnonymous": False,
            "modelType": "mlflow_model",
            "modelUri": f"https://rehearsal.blob.core.windows.net/azureml/{name}/mlflow_model_folder",
            "flavors": {},
            "stage": "Development",
            "provisioningState": "Succeeded",
            "systemMetadata": metadata,
        },
    }


def _check_component(request: Request) -> None:
    if request.args["name"] != offers.COMPONENT:
        raise not_found("component", request.args["name"])


def _component() -> Json:
    asset_id = f"azureml://registries/azureml/components/{offers.COMPONENT}/versions/"
    return {
        "id": asset_id + offers.COMPONENT_VERSION,
        "name": offers.COMPONENT_VERSION,
        "type": f"{ML}/registries/components/versions",
        "systemData": dict(_STAMP),
        "properties": {
            "description": "Pipeline component for chat completion fine-tuning",
            "tags": {},
            "properties": {},
            "isArchived": False,
            "isAnonymous": False,
            "componentSpec": offers.component_spec(),
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


def catalogue_folder(cloud: Cloud, uri: str) -> Path | None:
    """Where the files of a registry's model will lie; None when `uri` means something else."""
    if not uri.startswith("azureml://registries/"):
        return None
    if offers.find_model(uri) is None:
        raise bad(f"The asset '{uri}' was not found.")
    return tiny_model.folder_in(catalogue(cloud))


def catalogue(cloud: Cloud) -> Path:
    """Where the files of the catalogue's models lie."""
    return cloud.folder / "catalogue"
