"""The stage `connect`: the Prompt flow connection here, in the workspace and in the project.

Reads the manifest `endpoint`; the key is fetched now and goes into the connections only.
"""

from __future__ import annotations

from typing import Any

from ... import promptflow_store
from ...connect import connect as connect_here
from ...console import ProgressCallback
from ...recipe import Recipe
from ...run import Run
from ..base import Manifest
from .clients import Clients
from .connections import leads_to, write_connection
from .place import Made, note
from .serving import access_to

HERE = "this machine"


def connect(clients: Clients, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
    """Write all three, read back the two in Azure; the manifest `connection`."""
    endpoint = run.require("endpoint", f"phi3 deploy --on azure --run {run.name}")
    name = recipe.connection.name
    access = access_to(clients, endpoint["endpoint_name"])
    # Without the deployment: the endpoint's traffic rules say who answers a flow.
    told = {"endpoint": access.endpoint}
    here = connect_here(run, told, access.key, name)
    states = {}
    for workspace in workspaces_of(clients):
        progress(0, 0, f"connection {name} in {workspace}")
        note(run, Made("connection", name, workspace))
        states[workspace] = write_connection(clients, workspace, name, access)
    return {
        **here,
        "target": "azure",
        "workspaces": list(states),
        "choices": [
            *here["choices"],
            *(f"connection in {place}: {how}" for place, how in states.items()),
            *([] if access.key else ["no key anywhere: the endpoint takes Entra tokens"]),
        ],
    }


def is_connected(clients: Clients, run: Run) -> bool:
    """Whether each of them still leads to the run's endpoint; another run may have taken them."""
    manifest = run.require("connection", f"phi3 connect --on azure --run {run.name}")
    name, url = manifest["name"], manifest["endpoint"]
    try:
        here, _key = promptflow_store.read_connection(name)
    except promptflow_store.StoreError:
        return False
    there = (leads_to(clients, workspace, name) for workspace in manifest["workspaces"])
    return here == url and all(found == url for found in there)


def workspaces_of(clients: Clients) -> list[str]:
    """The workspace and the Foundry project."""
    return [clients.workplace.workspace_name, clients.workplace.project]


def connections(clients: Clients, run: Run) -> dict[str, Any]:
    """Prompt flow's own objects, read as Prompt flow reads them: here and in the workspaces."""
    manifest = run.require("connection", f"phi3 connect --on azure --run {run.name}")
    place, name = clients.workplace, manifest["name"]
    found = {HERE: promptflow_store.stored_connection(name)}
    for workspace in manifest["workspaces"]:
        found[workspace] = promptflow_store.workspace_connection(
            (place.subscription_id, place.resource_group, workspace), name, clients.credential
        )
    return found
