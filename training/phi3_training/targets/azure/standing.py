"""`status` on Azure: the state of the run's endpoint, and all that stands in its workspace."""

from __future__ import annotations

from ...run import Run
from ..base import Manifest
from .clients import Clients
from .endpoints import shares
from .inventory import lines, take
from .waiting import look, state_of


def endpoint_state(clients: Clients, run: Run) -> Manifest:
    """`up` where the run's deployment is well and has the traffic, `down` where not, or `none`."""
    kept = run.manifest("endpoint")
    if kept is None:
        return {"state": "none"}
    name, deployment = kept["endpoint_name"], kept["deployment"]
    shown = {"url": kept["endpoint"], "name": name, "deployment": deployment}
    operations = clients.ml
    found = look(lambda: operations.online_endpoints.get(name), f"Looking for the endpoint {name}")
    if found is None:
        return {"state": "down", **shown, "reason": "the endpoint is gone"}
    answers = look(
        lambda: operations.online_deployments.get(deployment, name),
        f"Looking for the deployment {deployment}",
    )
    if answers is None or state_of(answers) != "succeeded":
        said = "is gone" if answers is None else f"is {state_of(answers)}"
        return {"state": "down", **shown, "reason": f"the deployment {said}"}
    if not shares(found.traffic).get(deployment):
        return {"state": "down", **shown, "reason": "the deployment has no traffic"}
    return {"state": "up", **shown}


def status(clients: Clients, run: Run) -> Manifest:
    """The endpoint's state and the lines for people."""
    found = take(clients, run)
    return {
        "endpoint": endpoint_state(clients, run),
        "lines": lines(found, run),
        "bills": found.billing(),
    }
