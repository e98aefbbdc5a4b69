"""What the rehearsed Azure knows: its resources, running operations, secrets and journal of calls.

Reads and writes state.json (atomically), seed (mode 0600) and calls.jsonl in its folder. Keys are
derived from the seed or sealed with it, so that none is on disk in clear text.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import datetime as dt
import hashlib
import hmac
import json
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken

from .faults import Faults
from .offers import REGIONS
from .processes import stop_server_of, write_atomically
from .wire import ARM, GROUP, ML, AzureError, Json, Reply, Request, Router, bad, not_found

# How long a poller should wait. Azure sends no header or 10 seconds and more; without one the
# SDK waits 30 seconds between two looks at a cluster or an endpoint.
POLL = {"Retry-After": "1", "x-ms-retry-after-ms": "200"}
# The states of a job that has not ended.
ACTIVE = ("NotStarted", "Queued", "Preparing", "Starting", "Provisioning", "Running", "Finalizing")


@dataclass
class Operation:
    """A long-running operation on a resource, as its poll address knows it."""

    name: str
    resource: str
    kind: str  # "delete" removes the resource at its end
    ends: float | None  # `Cloud.time()`; None: whoever does the work calls `finish`
    status: str = "InProgress"
    error: Json | None = None


class Cloud:
    """The state of one rehearsal. Handlers hold `lock`; what they change is saved after them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.faults = Faults(folder / "faults.json")
        folder.mkdir(parents=True, exist_ok=True)
        seed = folder / "seed"
        if not seed.is_file():
            descriptor = os.open(seed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(secrets.token_bytes(32))
        self._seed = seed.read_bytes()
        self._fernet = Fernet(base64.urlsafe_b64encode(hashlib.sha256(self._seed).digest()))
        self._state_file = folder / "state.json"
        state: Json = {"resources": {}, "operations": {}, "quota": {}, "clock": 0.0}
        if self._state_file.is_file():
            state |= json.loads(self._state_file.read_text(encoding="utf-8"))
        # The documents that Azure answers with; keys that begin with "_" are our own, never sent.
        # By id in lower case: Azure ignores case in ids and answers with the first spelling.
        self.resources: dict[str, Json] = state["resources"]
        self.operations = {k: Operation(**v) for k, v in state["operations"].items()}
        self.quota: dict[str, int] = state["quota"]  # cores granted, by "region/family"
        # Seconds by which the clock was moved. Operations and workflows go by it; tokens and stamps
        # by the machine's, as the clients do.
        self.clock: float = state["clock"]
        self._saved = ""

    def time(self) -> float:
        """Seconds since 1970 by the rehearsal's own clock."""
        return time.time() + self.clock

    def get(self, arm_id: str) -> Json | None:
        """The resource, or None."""
        return self.resources.get(arm_id.lower())

    def need(
        self, arm_id: str, what: str = "resource", *, code: str = "", message: str = ""
    ) -> Json:
        """The resource. Raises AzureError (404): `what` was not found, or `message`."""
        resource = self.get(arm_id)
        if resource is None and message:
            raise AzureError(404, code or "ResourceNotFound", message)
        if resource is None:
            raise not_found(what, arm_id)
        return resource

    def put(self, arm_id: str, kind: str, body: Json) -> Json:
        """Store `body` as the resource `arm_id`."""
        before = self.get(arm_id)
        real_id = before["id"] if before else arm_id
        document = {"id": real_id, "name": real_id.rsplit("/", 1)[-1], "type": kind, **body}
        self.resources[arm_id.lower()] = document
        return document

    def delete(self, arm_id: str) -> None:
        """Remove the resource and everything below it."""
        prefix = arm_id.lower()
        for key in [k for k in self.resources if k == prefix or k.startswith(prefix + "/")]:
            del self.resources[key]

    def delete_now(self, arm_id: str) -> Reply:
        """Remove a resource that takes no time to go: 200, or 204 if there is none."""
        existed = self.get(arm_id) is not None
        self.delete(arm_id)
        return Reply(200 if existed else 204)

    def release(self, arm_id: str) -> None:
        """Stop the servers at and below a resource; AzureError (409) while a job runs there."""
        own = self.get(arm_id)
        docs = [*self.children(arm_id), *([own] if own else [])]
        for doc in docs:
            if doc["type"].endswith("/jobs") and doc["properties"]["status"] in ACTIVE:
                raise AzureError(
                    409, "Conflict", f"'{arm_id}' cannot be deleted: the job '{doc['name']}' runs."
                )
        for doc in docs:
            stop_server_of(doc)

    def children(self, prefix: str, kind: str = "") -> list[Json]:
        """The resources below `prefix` (of one kind), oldest first."""
        start = prefix.lower().rstrip("/") + "/"
        docs = [doc for key, doc in self.resources.items() if key.startswith(start)]
        return [doc for doc in docs if not kind or doc["type"].lower() == kind.lower()]

    def save(self) -> None:
        """Write state.json if anything changed."""
        operations = {name: dataclasses.asdict(op) for name, op in self.operations.items()}
        state = {"resources": self.resources, "operations": operations, "quota": self.quota}
        state["clock"] = self.clock
        text = json.dumps(state)  # indented, it is encoded in Python, ten times as slow
        if text != self._saved:
            write_atomically(self._state_file, text)
            self._saved = text

    # --- long-running operations ---
    # Microsoft's REST guidelines for asynchronous calls: 201 or 202 with Azure-AsyncOperation (a
    # status to poll) and Location (the result).

    def operate(self, doc: Json, *, kind: str = "operations", by_itself: bool = True) -> Operation:
        """Begin an operation on `doc`; one that does not end `by_itself` ends by `finish` alone."""
        # At once, an injected delay aside: Azure's minutes would teach nothing here.
        ends = self.time() + self.faults.slowness(doc["id"], kind) if by_itself else None
        operation = Operation(str(uuid.uuid4()), doc["id"], kind, ends)
        self.operations[operation.name] = operation
        return operation

    def finish(self, name: str, error: Json | None = None) -> None:
        """End an operation; the resource's provisioning state follows it."""
        operation = self.operations[name]
        if operation.status != "InProgress":
            return
        operation.status = "Failed" if error else "Succeeded"
        operation.error = error
        resource = self.get(operation.resource)
        if resource is None:
            return
        # What a template makes is there at its end; of one that fails there is nothing.
        made: list[Json] = resource.pop("_makes", [])
        self.resources.update({doc["id"].lower(): doc for doc in made if not error})
        if operation.kind == "delete" and not error:
            self.delete(resource["id"])
        else:
            properties = resource.setdefault("properties", {})
            undo = resource.pop("_undo", {})
            properties.update(undo if error else {})
            properties["provisioningState"] = operation.status
            if error:
                properties["provisioningErrors"] = [{"error": error}]

    def settle(self) -> None:
        """End the operations whose time has come."""
        # Each call looks first, so that a poll finds what Azure would answer.
        for name, operation in list(self.operations.items()):
            ends = operation.ends
            if operation.status == "InProgress" and ends is not None and ends <= self.time():
                self.finish(name, self.faults.failure(operation.resource, operation.kind))

    def accepted(self, doc: Json, operation: Operation, status: int, *, body: bool = True) -> Reply:
        """The first answer of a long-running operation, with the addresses to poll."""
        subscription = doc["id"].split("/")[2]
        region = doc.get("location") or "eastus"
        base = f"https://{ARM}/subscriptions/{subscription}/providers/Microsoft.Rehearsal"
        tail = f"{operation.name}?api-version=2024-10-01"
        # azure-core polls the first where both are there, and fetches the result from the resource.
        headers = {
            "Azure-AsyncOperation": f"{base}/locations/{region}/operationsStatus/{tail}",
            "Location": f"{base}/locations/{region}/operationResults/{tail}",
            **POLL,
        }
        return Reply(status, public(doc) if body else None, headers)

    # --- secrets ---

    def derive(self, *parts: str) -> str:
        """A key that belongs to `parts`: the same in every process, written nowhere."""
        text = "\n".join(parts).lower()
        digest = hmac.new(self._seed, text.encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def seal(self, value: object) -> str:
        """`value` in a form that only this rehearsal reads."""
        return self._fernet.encrypt(json.dumps(value).encode()).decode()

    def unseal(self, sealed: str) -> Any:
        """What `seal` was given. Raises AzureError when the seed is another one."""
        try:
            return json.loads(self._fernet.decrypt(sealed.encode()))
        except InvalidToken:
            raise AzureError(500, "InternalServerError", "The secret cannot be read.") from None

    def journal(self, request: Request, status: int | str, deployment: str = "") -> None:
        """One line for a call that was answered: no query, no header, no body, so no secret.

        `deployment`: which one of an endpoint answered it.
        """
        entry = {
            "time": round(time.time(), 3),
            "method": request.method,
            "host": request.host,
            "path": request.path,
            "status": status,
            **({"deployment": deployment} if deployment else {}),
        }
        with self.lock, (self.folder / "calls.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


router: Router[Cloud] = Router()
route = router.route


def on_get(path: str, need: Callable[[Cloud, Request], Json]) -> None:
    """Answer GET on a path of the resource manager with the resource that `need` finds."""
    route("GET", ARM, path)(lambda cloud, request: Reply(200, public(need(cloud, request))))


def on_list(path: str, need: Callable[[Cloud, Request], Json], kind: str) -> None:
    """Answer GET with all resources of a kind below the one that `need` finds."""
    route("GET", ARM, path)(
        lambda cloud, request: listed(cloud.children(need(cloud, request)["id"], kind))
    )


def public(doc: Json) -> Json:
    """`doc` without the rehearsal's own keys."""
    return {k: copy.deepcopy(v) for k, v in doc.items() if not k.startswith("_")}


def listed(docs: list[Json], change: Callable[[Json], Json] = public) -> Reply:
    """A page of resources."""
    return Reply(200, {"value": [change(doc) for doc in docs]})


def now() -> str:
    """The time, as Azure writes it."""
    return dt.datetime.now(dt.timezone.utc).isoformat().replace("+00:00", "Z")


def stamps() -> Json:
    """`systemData` of something made now."""
    time_now = now()
    author = {"createdBy": "rehearsal", "createdByType": "Application"}
    return {"createdAt": time_now, "lastModifiedAt": time_now, **author}


def need_group(cloud: Cloud, request: Request) -> Json:
    """The resource group of the request. Raises AzureError (404)."""
    text = f"Resource group '{request.args['rg']}' could not be found."
    return cloud.need(request.id(GROUP), code="ResourceGroupNotFound", message=text)


def check_location(value: object) -> str:
    """The region, in Azure's own spelling. Raises AzureError (400)."""
    location = str(value or "").replace(" ", "").lower()
    if location not in REGIONS:
        text = f"The provided location '{value}' is not available for resource type "
        raise bad(text + f"'{ML}/workspaces'.", "LocationNotAvailableForResourceType")
    return location
