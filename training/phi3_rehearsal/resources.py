"""What a workspace stands on: storage account, key vault, logs, insights, container registry."""

from __future__ import annotations

import re
import shutil
from typing import Any

from .cloud import Cloud, listed, public, route
from .regions import check_location, need_group
from .wire import ARM, GROUP, AzureError, Json, Reply, Request, bad

# What a workspace stands on. The pattern is Azure's rule for the name.
PLAIN = {
    "Microsoft.Storage/storageAccounts": r"[a-z0-9]{3,24}",
    "Microsoft.KeyVault/vaults": r"[A-Za-z](?!.*--)[A-Za-z0-9-]{1,22}[A-Za-z0-9]",
    "Microsoft.Insights/components": r"[^%&\\?/]{1,260}",
    "Microsoft.OperationalInsights/workspaces": r"[A-Za-z0-9][A-Za-z0-9-]{2,61}[A-Za-z0-9]",
    "Microsoft.ContainerRegistry/registries": r"[A-Za-z0-9]{5,50}",
}
_STORAGE, _VAULT = "Microsoft.Storage/storageAccounts", "Microsoft.KeyVault/vaults"
_ANY = "|".join(PLAIN)
_PLAIN_ID = GROUP + f"/providers/{{kind:{_ANY}}}/{{name}}"


def _plain_kind(request: Request) -> str:
    wanted = request.args["kind"].lower()
    return next(kind for kind in PLAIN if kind.lower() == wanted)


def put_plain(cloud: Cloud, arm_id: str, kind: str, body: Json) -> Json:
    """Store a storage account, key vault, registry … after a look at its name."""
    name = arm_id.rsplit("/", 1)[-1]
    if not re.fullmatch(PLAIN[kind], name):
        raise bad(f"'{name}' is not a valid name for {kind}.", "AccountNameInvalid")
    _check_deleted(cloud, arm_id, kind, body)
    document: Json = {k: body[k] for k in ("location", "sku", "kind", "tags") if k in body}
    given: dict[str, Any] = body.get("properties") or {}
    document["properties"] = {**given, "provisioningState": "Succeeded"}
    if kind.startswith("Microsoft.Storage"):
        document["properties"]["primaryEndpoints"] = {
            "blob": f"https://{name}.blob.core.windows.net/"
        }
    if kind.startswith("Microsoft.ContainerRegistry"):
        document["properties"]["loginServer"] = f"{name}.azurecr.io"
    if kind.startswith("Microsoft.KeyVault"):
        document["properties"]["vaultUri"] = f"https://{name}.vault.azure.net/"
    return cloud.put(arm_id, kind, document)


@route("PUT", ARM, _PLAIN_ID)
def put_resource(cloud: Cloud, request: Request) -> Reply:
    """Make one of the things that a workspace stands on."""
    kind = _plain_kind(request)
    need_group(cloud, request)
    body = request.json()
    check_location(body.get("location"))
    before = cloud.get(request.id(_PLAIN_ID))
    made = put_plain(cloud, request.id(_PLAIN_ID), kind, body)
    return Reply(200 if before else 201, public(made))


@route("GET", ARM, _PLAIN_ID)
def get_resource(cloud: Cloud, request: Request) -> Reply:
    """One of them."""
    return Reply(200, public(cloud.need(request.id(_PLAIN_ID), request.args["kind"])))


@route("HEAD", ARM, _PLAIN_ID)
def check_resource(cloud: Cloud, request: Request) -> Reply:
    """Whether it exists."""
    return Reply(204 if cloud.get(request.id(_PLAIN_ID)) else 404)


@route("DELETE", ARM, _PLAIN_ID)
def delete_resource(cloud: Cloud, request: Request) -> Reply:
    """Delete one of them."""
    found = cloud.get(request.id(_PLAIN_ID))
    if found is None:
        return Reply(204)
    before_delete(cloud, found)
    cloud.delete(found["id"])
    return Reply(200)


def before_delete(cloud: Cloud, doc: Json) -> None:
    """A storage account takes its files along; a key vault leaves its name behind."""
    if doc["type"] == _STORAGE:
        for kind in ("blobs", "blobmeta", "shares"):
            shutil.rmtree(cloud.folder / kind / doc["name"], ignore_errors=True)
    if doc["type"] == _VAULT:
        _keep_deleted(cloud, doc)


# --- key vaults stay reserved for 90 days after they are deleted ---

_DELETED_KIND = "Microsoft.KeyVault/deletedVaults"
_SUBSCRIPTION = "/subscriptions/{sub}/providers/Microsoft.KeyVault"
_DELETED = _SUBSCRIPTION + "/locations/{loc}/deletedVaults/{name}"


def _keep_deleted(cloud: Cloud, doc: Json) -> None:
    """Remember a vault that is being deleted: its name is not free yet."""
    arm_id = _deleted_id(doc)
    properties = {"vaultId": doc["id"], "location": doc["location"], "tags": doc.get("tags") or {}}
    cloud.put(arm_id, _DELETED_KIND, {"properties": properties})


def _deleted_id(doc: Json) -> str:
    parts = doc["id"].split("/")
    return _DELETED.format(sub=parts[2], loc=doc["location"], name=parts[-1])


def _check_deleted(cloud: Cloud, arm_id: str, kind: str, body: Json) -> None:
    if kind != _VAULT:
        return
    deleted = _deleted_id({"id": arm_id, "location": body["location"]})
    if cloud.get(deleted) is None:
        return
    if (body.get("properties") or {}).get("createMode") != "recover":
        raise AzureError(
            409,
            "ConflictError",
            "A vault with the same name already exists in deleted state. You need to either "
            "recover or purge existing key vault.",
        )
    cloud.delete(deleted)


@route("GET", ARM, _SUBSCRIPTION + "/deletedVaults")
def list_deleted_vaults(cloud: Cloud, request: Request) -> Reply:
    """The vaults that can be recovered or purged."""
    return listed(cloud.children(request.id(_SUBSCRIPTION), _DELETED_KIND))


@route("GET", ARM, _DELETED)
def get_deleted_vault(cloud: Cloud, request: Request) -> Reply:
    """One of them."""
    return Reply(200, public(cloud.need(request.id(_DELETED), "deleted vault")))


@route("POST", ARM, _DELETED + "/purge")
def purge_vault(cloud: Cloud, request: Request) -> Reply:
    """Free its name."""
    found = cloud.need(request.id(_DELETED), "deleted vault")
    return cloud.accepted(found, cloud.operate(found, kind="delete"), 202, body=False)
