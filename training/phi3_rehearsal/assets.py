"""Versioned assets: models, data, environments, components and code of a workspace, and the models
and components of the public registry `azureml`, which nobody can change.

Reads blobs where a model's files must exist; a version cannot be changed once made.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from . import offers, tiny_model
from .cloud import Cloud, listed, on_get, public, route, stamps
from .storage import BlobFiles, account_sas
from .wire import ARM, ML, REGIONAL, WORKSPACE, AzureError, Json, Reply, Request, bad, not_found
from .workspaces import container_of, need_workspace, storage_account

_FAMILY = WORKSPACE + "/{family:models|data|environments|components|codes}/{name}"
_ONE = _FAMILY + "/versions/{version}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-_.]{0,254}")
# Addresses of files, with the workspace in full or without it.
_BASE = (
    r"(?i)azureml://"
    r"(?:subscriptions/[^/]+/resourcegroups/[^/]+/(?:providers/[^/]+/)?workspaces/[^/]+/)?"
)
_STORE_URI = re.compile(_BASE + r"datastores/([^/]+)/paths/(.+)")
_JOB_URI = re.compile(_BASE + r"jobs/([^/]+)/outputs/([^/]+?)(?:/paths)?(?:/(.*))?$")
_BLOB_URI = re.compile(
    r"(?:https|wasbs)://([^.@]+)\.blob\.core\.windows\.net(?::443)?/([^/]+)/?(.*)"
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
        uri = str(given.get("modelUri") or "")
        address = datastore_uri(cloud, workspace, uri)
        if before and before["properties"]["modelUri"].rstrip("/") != address.rstrip("/"):
            text = "A model with this name and version already exists; its path cannot be changed."
            raise AzureError(409, "UserError", text)
        place = locate(cloud, workspace, uri)
        if not place.exists():
            raise bad(f"NoMatchingArtifactsFoundFromJob: no artifacts were found at '{uri}'.")
        kind = str(given.get("modelType", "")).lower().replace("_", "")
        if kind in ("mlflow", "mlflowmodel") and not (place / "MLmodel").is_file():
            raise bad(f"The model at '{uri}' has no MLmodel file.", "UserError")
        given = {"flavors": {}, "stage": "Development", **given, "modelUri": address}
    kind = f"{ML}/workspaces/{family}/versions"
    defaults: Json = {"isArchived": False, "isAnonymous": False, "tags": {}, "properties": {}}
    document = {
        "properties": {**defaults, "provisioningState": "Succeeded", **given},
        "systemData": before["systemData"] if before else stamps(),
    }
    return Reply(200 if before else 201, public(cloud.put(request.id(_ONE), kind, document)))


def datastore_uri(cloud: Cloud, workspace: Json, uri: str) -> str:
    """The address of an asset's files in a datastore, jobs' outputs resolved."""
    match = _JOB_URI.match(uri)
    if not match:
        return uri
    job, output, rest = match.groups()
    doc = cloud.get(f"{workspace['id']}/jobs/{job}")
    if doc is None:
        raise bad(f"The job '{job}' was not found.")
    outputs = doc["properties"].get("outputs") or {}
    if output not in outputs and output != "artifacts":
        raise bad(f"The job '{job}' has no output '{output}'.")
    base = str(outputs[output]["uri"] if output in outputs else doc["_artifacts"]).rstrip("/")
    return f"{base}/{rest}" if rest else base


def locate(cloud: Cloud, workspace: Json, uri: str) -> Path:
    """Where the files that `uri` names are. Raises AzureError if it names nothing here."""
    uri = datastore_uri(cloud, workspace, uri)
    files = BlobFiles(cloud.folder, storage_account(workspace))
    match = _STORE_URI.match(uri)
    if match:
        return files.path(container_of(workspace, match.group(1)), match.group(2))
    blob = _BLOB_URI.match(uri)
    if blob:
        account, container, name = blob.groups()
        store = BlobFiles(cloud.folder, account)
        return store.path(container, name) if name else store.data / container
    raise bad(f"The path '{uri}' is not supported.", "UserError")


@route("POST", ARM, _ONE + "/startPendingUpload")
def start_upload(cloud: Cloud, request: Request) -> Reply:
    """A container of its own for the files of an asset, with a signature to write there."""
    account = storage_account(need_workspace(cloud, request))
    # Derived: a repeated call gets the same container, and finds in it what was sent before.
    own = uuid.uuid5(uuid.NAMESPACE_URL, request.id(_ONE).lower())
    address = f"https://{account}.blob.core.windows.net/{own}"
    credential = {"credentialType": "SAS", "sasUri": f"{address}?{account_sas(cloud, account)}"}
    reference = {"blobUri": address, "storageAccountArmId": account, "credential": credential}
    upload = {"pendingUploadId": str(own), "pendingUploadType": "TemporaryBlobReference"}
    return Reply(200, {"blobReferenceForConsumption": reference, **upload})


@route("DELETE", ARM, _ONE)
def delete_version(cloud: Cloud, request: Request) -> Reply:
    """Delete a version."""
    return cloud.delete_now(request.id(_ONE))


@route("GET", ARM, _FAMILY)
def get_container(cloud: Cloud, request: Request) -> Reply:
    """The asset's container, with its latest and next version."""
    family = request.args["family"]
    versions, name = _versions(cloud, request), request.args["name"]
    if not versions:
        raise AzureError(404, "UserError", f"{family} container with name {name} not found.")
    numbers = [int(doc["name"]) for doc in versions if doc["name"].isdigit()]
    properties = {
        "latestVersion": versions[-1]["name"],
        "nextVersion": str(max(numbers, default=0) + 1),
        "isArchived": all(doc["properties"]["isArchived"] for doc in versions),
    }
    return Reply(200, {"id": request.id(_FAMILY), "name": name, "properties": properties})


@route("GET", ARM, _FAMILY + "/versions")
def list_versions(cloud: Cloud, request: Request) -> Reply:
    """The versions, newest first on request; archived ones are left out."""
    docs = _versions(cloud, request)
    digest = request.query.get("hash")
    if digest:  # the SDK asks before an upload: the same files, under whatever name
        docs = cloud.children(request.id(WORKSPACE) + "/" + request.args["family"])
        return listed([d for d in docs if digest in d["properties"]["properties"].values()])
    if "desc" in request.query.get("$orderby", request.query.get("orderby", "")).lower():
        docs = docs[::-1]
    # The default hides archived ones, so `latest` finds nothing of a model that is retired.
    if request.query.get("listviewtype", "ActiveOnly").lower() == "activeonly":
        docs = [doc for doc in docs if not doc["properties"]["isArchived"]]
    top = request.query.get("$top")
    return listed(docs[: int(top)] if top else docs)


def _need_version(cloud: Cloud, request: Request) -> Json:
    need_workspace(cloud, request)
    family, name, version = (request.args[key] for key in ("family", "name", "version"))
    text = f"{family} asset with name {name} and version {version} not found."
    return cloud.need(request.id(_ONE), code="UserError", message=text)


on_get(_ONE, _need_version)


def _versions(cloud: Cloud, request: Request) -> list[Json]:
    need_workspace(cloud, request)
    return cloud.children(request.id(_FAMILY) + "/versions")


# --- the registry `azureml`: one version of each asset, which nobody can change ---

# The registry's front: `MLClient(registry_name=…)` asks its region's discovery where it is.
_REGISTRY_HOST = "cert-{region}.experiments.azureml.net"
_REGISTRY = (
    f"/mferp/managementfrontend/subscriptions/{{sub}}/resourceGroups/{{rg}}/providers/{ML}"
    "/registries/azureml/{family:models|components|environments}/{name}"
)


@route("GET", REGIONAL, "/registrymanagement/v1.0/registries/{registry}/discovery", audience="")
def discover(_cloud: Cloud, request: Request) -> Reply:
    """Where the registry is managed."""
    name, region = request.args["registry"], request.args["region"]
    if name.lower() != "azureml":
        raise not_found("registry", name)
    place: Json = {
        "registryName": name,
        "subscriptionId": "00000000-0000-4000-8000-5e6157000000",
        "resourceGroup": "azureml-system",
        "primaryRegion": region,
        "primaryRegionResourceProviderUri": f"https://cert-{region}.experiments.azureml.net/",
        "regions": [region],
        "isPublic": True,
    }
    return Reply(200, place)


@route("GET", _REGISTRY_HOST, _REGISTRY, audience="regional")
def get_registry_container(_cloud: Cloud, request: Request) -> Reply:
    """The asset's container, with its latest version."""
    version = _registry_asset(request)["name"]
    properties = {"latestVersion": version, "isArchived": False}
    return Reply(200, {"name": request.args["name"], "properties": properties})


@route("GET", _REGISTRY_HOST, _REGISTRY + "/versions", audience="regional")
def list_registry_versions(_cloud: Cloud, request: Request) -> Reply:
    """The versions; an archived one only where the view asks for it: `latest` then finds none."""
    asset = _registry_asset(request)
    view = request.query.get("listviewtype", "ActiveOnly").lower()
    archived = bool(asset["properties"]["isArchived"])
    hidden = (archived and view == "activeonly") or (not archived and view == "archivedonly")
    return Reply(200, {"value": [] if hidden else [asset]})


@route("GET", _REGISTRY_HOST, _REGISTRY + "/versions/{version}", audience="regional")
def get_registry_version(_cloud: Cloud, request: Request) -> Reply:
    """One version, archived or not."""
    asset = _registry_asset(request)
    if request.args["version"] != asset["name"]:
        raise not_found("version", f"{request.args['name']}:{request.args['version']}")
    return Reply(200, asset)


def _registry_asset(request: Request) -> Json:
    """The asset that the request names, in its one version. Raises AzureError (404)."""
    family, name = request.args["family"].lower(), request.args["name"]
    properties: Json = {"tags": {}, "properties": {}, "isArchived": False, "isAnonymous": False}
    if family == "models" and name in offers.MODELS:
        model = offers.MODELS[name]
        version = model.version
        properties |= _model_properties(name, model)
    elif family == "components" and name == offers.COMPONENT:
        version = offers.COMPONENT_VERSION
        properties |= {"componentSpec": offers.component_spec(), "provisioningState": "Succeeded"}
    elif family == "environments":  # any curated one
        version = request.args.get("version", "1")
        image = f"mcr.microsoft.com/azureml/curated/{name}:{version}"
        properties |= {"image": image, "osType": "Linux", "environmentType": "Curated"}
    else:
        raise not_found(family.removesuffix("s"), name)
    return {
        "id": f"azureml://registries/azureml/{family}/{name}/versions/{version}",
        "name": version,
        "type": f"{ML}/registries/{family}/versions",
        "systemData": dict.fromkeys(("createdAt", "lastModifiedAt"), "2026-06-18T00:00:00Z"),
        "properties": properties,
    }


def _model_properties(name: str, model: offers.CatalogueModel) -> Json:
    # Since June 2026 the sizes are here; the tags that listed them before are gone.
    metadata: Json = {
        "supportedComputes": {
            "finetuneComputes": list(model.finetune_sizes),
            "inferenceComputes": list(model.inference_sizes),
        },
        "tasks": ["chat-completion"],
    }
    if model.archived:
        dates = ("inferenceRetirementDate", "finetuneRetirementDate")
        metadata["deprecation"] = dict.fromkeys(dates, offers.RETIRED_ON)
    return {
        "description": f"{name} as the catalogue has it.",
        "tags": {"task": "chat-completion", "model_specific_defaults": model.defaults},
        "isArchived": model.archived,
        "modelType": "mlflow_model",
        "modelUri": f"https://rehearsal.blob.core.windows.net/azureml/{name}/mlflow_model_folder",
        "flavors": {},
        "stage": "Development",
        "provisioningState": "Succeeded",
        "systemMetadata": metadata,
    }


def catalogue_folder(cloud: Cloud, uri: str) -> Path | None:
    """Where the files of a registry's model will be; None if `uri` names something else."""
    if not uri.startswith("azureml://registries/"):
        return None
    if offers.find_model(uri) is None:
        raise bad(f"The asset '{uri}' was not found.")
    return tiny_model.folder_in(catalogue(cloud))


def catalogue(cloud: Cloud) -> Path:
    """Where the files of the catalogue's models are."""
    return cloud.folder / "catalogue"
