"""Logic Apps of the plan Consumption: recurrences that send HTTP requests as the app's identity.

They go by the rehearsal's clock, which `clock` moves: what would have fired in between fires then,
with no client alive. A recurrence as in "Schedule recurring automated workflows" and "Recurrence
trigger" (learn.microsoft.com/azure/logic-apps): without a start time it fires at once, with one in
the past at the next slot. Of actions it knows Http and If.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .cloud import Cloud, check_location, need_group, on_get, public, route
from .identity import TENANT, token_for
from .proxy import CutError, answer
from .wire import ARM, GROUP, AzureError, Json, Reply, Request, bad

KIND = "Microsoft.Logic/workflows"
_WORKFLOW = GROUP + "/providers/Microsoft.Logic/workflows/{workflow}"
_SECONDS = {"Second": 1, "Minute": 60, "Hour": 3600, "Day": 86400, "Week": 7 * 86400}
# The default of an HTTP action's retry policy: four repeats after 408, 429 and 5xx.
_RETRIES = 4
_RUNS_KEPT = 50
_MOST_TRIGGERS = 10  # "Limits and configuration reference for Azure Logic Apps"


@route("PUT", ARM, _WORKFLOW)
def put_workflow(cloud: Cloud, request: Request) -> Reply:
    """Make a workflow or change it; its recurrence starts over."""
    need_group(cloud, request)
    arm_id, body = request.id(_WORKFLOW), request.json()
    location = check_location(body.get("location"))
    before = cloud.get(arm_id)
    given = body.get("properties") or {}
    definition = given.get("definition") or {}
    if not definition.get("$schema") or not definition.get("triggers"):
        raise bad("The workflow's definition has no schema or no trigger.", "InvalidTemplate")
    if len(definition["triggers"]) > _MOST_TRIGGERS:
        raise bad(f"The workflow has more than {_MOST_TRIGGERS} triggers.", "InvalidTemplate")
    for trigger in definition["triggers"].values():
        if trigger.get("type") != "Recurrence":
            raise AzureError(501, "NotRehearsed", f"Triggers of type {trigger.get('type')}")
        _period(trigger.get("recurrence") or {})
    # The identity that the service makes stays the same until the workflow is deleted.
    asked, identity = body.get("identity") or {}, None
    if asked and asked.get("type") != "None":
        if asked.get("type") != "SystemAssigned":
            raise AzureError(501, "NotRehearsed", f"Workflows with identity {asked.get('type')}")
        principal = ((before or {}).get("identity") or {}).get("principalId") or str(uuid.uuid4())
        identity = {"type": "SystemAssigned", "principalId": principal, "tenantId": TENANT}
    _check_actions(definition.get("actions") or {}, set(), has_identity=identity is not None)
    document: Json = {
        "location": location,
        "tags": body.get("tags") or {},
        "properties": {
            "state": "Enabled",
            **given,
            "provisioningState": "Succeeded",
            "createdTime": before["properties"]["createdTime"] if before else _text(cloud.time()),
            "changedTime": _text(cloud.time()),
            "version": uuid.uuid4().hex,
        },
        **({"identity": identity} if identity else {}),
        "_saved": cloud.time(),
        "_fired": {},
        "_runs": before["_runs"] if before else [],
    }
    workflow = cloud.put(arm_id, KIND, document)
    _fire_due(cloud, cloud.time())  # at once, where there is no start time
    return Reply(200 if before else 201, public(workflow))


def _check_actions(actions: Json, names: set[str], *, has_identity: bool) -> None:
    """Refuse what the service refuses and what is not rehearsed; `names`: of all actions so far."""
    for name, action in actions.items():
        if name in names or len(name) > 80:
            raise bad(f"The action name '{name}' is taken or too long.", "InvalidTemplate")
        names.add(name)
        if not set(action.get("runAfter") or {}) <= set(actions):
            text = f"The action '{name}' runs after one of another level."
            raise bad(text, "InvalidTemplate")
        if action.get("type") == "If":
            Condition.of(action.get("expression"))
            if (action.get("else") or {}).get("actions"):
                raise AzureError(501, "NotRehearsed", "Conditions with an else")
            _check_actions(action.get("actions") or {}, names, has_identity=has_identity)
        elif action.get("type") == "Http":
            check_literal(action.get("inputs"))
            if "authentication" in (action.get("inputs") or {}) and not has_identity:
                text = "The workflow has no managed identity."
                raise bad(text, "WorkflowManagedIdentityNotSpecified")
        else:
            raise AzureError(501, "NotRehearsed", f"Actions of type {action.get('type')}")


def _need(cloud: Cloud, request: Request) -> Json:
    text = f"The workflow '{request.args['workflow']}' could not be found."
    return cloud.need(request.id(_WORKFLOW), code="ResourceNotFound", message=text)


on_get(_WORKFLOW, _need)


@route("DELETE", ARM, _WORKFLOW)
def delete_workflow(cloud: Cloud, request: Request) -> Reply:
    """Delete it, and its identity with it; role assignments stay and name nobody."""
    return cloud.delete_now(request.id(_WORKFLOW))


@route("GET", ARM, _WORKFLOW + "/triggers/{trigger}")
def get_trigger(cloud: Cloud, request: Request) -> Reply:
    """When it fires next, and when it did last."""
    workflow, name = _need(cloud, request), request.args["trigger"]
    properties = workflow["properties"]
    trigger = properties["definition"]["triggers"].get(name)
    if trigger is None:
        raise AzureError(404, "WorkflowTriggerNotFound", f"No trigger '{name}'.")
    times = {
        "lastExecutionTime": workflow["_fired"].get(name),
        "nextExecutionTime": _next(workflow, name),
    }
    shown = {key: _text(value) for key, value in times.items() if value is not None}
    state = {"state": properties["state"], "recurrence": trigger["recurrence"], **shown}
    arm_id = request.id(_WORKFLOW + "/triggers/{trigger}")
    own = {"id": arm_id, "name": name, "type": f"{KIND}/triggers"}
    return Reply(200, {**own, "properties": {"provisioningState": "Succeeded", **state}})


@route("POST", ARM, _WORKFLOW + "/triggers/{trigger}/run")
def fire_trigger(cloud: Cloud, request: Request) -> Reply:
    """Fire it now; its own times stay ("Workflow Triggers - Run")."""
    workflow, name = _need(cloud, request), request.args["trigger"]
    if name not in workflow["properties"]["definition"]["triggers"]:
        raise AzureError(404, "WorkflowTriggerNotFound", f"No trigger '{name}'.")
    workflow["_runs"] = [*workflow["_runs"], _run(cloud, workflow)][-_RUNS_KEPT:]
    return Reply(202)


@route("GET", ARM, _WORKFLOW + "/runs")
def list_runs(cloud: Cloud, request: Request) -> Reply:
    """What it did, newest first."""
    workflow = _need(cloud, request)
    base = {"type": f"{KIND}/runs"}
    runs = [
        {**base, "id": f"{workflow['id']}/runs/{run['name']}", "name": run["name"]}
        | {"properties": {k: v for k, v in run.items() if k != "name"}}
        for run in reversed(workflow["_runs"])
    ]
    return Reply(200, {"value": runs})


# --- the clock ---


@route("POST", "rehearsal.invalid", "/clock", audience="")
def move_clock(cloud: Cloud, request: Request) -> Reply:
    """The control interface's call: move the clock by `seconds`, and do what is due until then."""
    seconds = request.json().get("seconds")
    if not isinstance(seconds, int | float) or seconds < 0:
        raise bad("seconds: expected a number of 0 or more; the clock only moves forward")
    runs = _fire_due(cloud, cloud.time() + seconds)
    return Reply(200, {"time": _text(cloud.time()), "moved": cloud.clock, "runs": runs})


def run_due(cloud: Cloud) -> None:
    """Do what has become due by itself; called from time to time."""
    _fire_due(cloud, cloud.time())


def _fire_due(cloud: Cloud, until: float) -> list[Json]:
    """Let the time pass, from one slot to the next; each run's workflow, time and status."""
    runs = []
    while True:
        # Looked for again after each run: what a workflow did may have changed or ended another.
        slots = [
            (when, workflow, trigger)
            for workflow in cloud.children("/subscriptions", KIND)
            for trigger in workflow["properties"]["definition"]["triggers"]
            if (when := _next(workflow, trigger)) is not None
        ]
        when, workflow, trigger = min(slots, key=lambda slot: slot[0], default=(math.inf, {}, ""))
        if when > until:
            break
        cloud.clock += max(0.0, when - cloud.time())
        cloud.settle()
        workflow["_fired"][trigger] = when
        run = _run(cloud, workflow)
        workflow["_runs"] = [*workflow["_runs"], run][-_RUNS_KEPT:]
        runs.append({"workflow": workflow["name"], "time": _text(when), "status": run["status"]})
    cloud.clock += max(0.0, until - cloud.time())
    cloud.settle()
    return runs


def _next(workflow: Json, trigger: str) -> float | None:
    """When the trigger fires next; None where it is switched off or over."""
    properties = workflow["properties"]
    if properties["state"] != "Enabled":
        return None
    recurrence = properties["definition"]["triggers"][trigger]["recurrence"]
    period, saved = _period(recurrence), float(workflow["_saved"])
    fired = workflow["_fired"].get(trigger)
    start = _time(recurrence["startTime"]) if recurrence.get("startTime") else None
    base = saved if start is None else start
    if fired is not None:
        when = base + (round((fired - base) / period) + 1) * period
    elif base >= saved:
        when = base
    else:  # times that are past are left out, not made up
        when = base + (math.floor((saved - base) / period) + 1) * period
    ends = recurrence.get("endTime")
    return None if ends and when > _time(ends) else when


def _period(recurrence: Json) -> float:
    frequency, interval = recurrence.get("frequency"), recurrence.get("interval")
    if frequency not in _SECONDS or not isinstance(interval, int) or interval < 1:
        raise bad(f"The recurrence '{frequency}' x {interval} is invalid.", "InvalidTemplate")
    return float(_SECONDS[frequency] * interval)


def _time(text: str) -> float:
    value = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (value if value.tzinfo else value.replace(tzinfo=dt.timezone.utc)).timestamp()


def _text(seconds: float) -> str:
    when = dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


# --- one run ---


def _run(cloud: Cloud, workflow: Json) -> Json:
    """Do all that the workflow does when it fires."""
    done: dict[str, Json] = {}
    _do(cloud, workflow, workflow["properties"]["definition"].get("actions") or {}, done, {})
    failed = any(action["status"] == "Failed" for action in done.values())
    return {
        "name": uuid.uuid4().hex,
        "startTime": _text(cloud.time()),
        "status": "Failed" if failed else "Succeeded",
        "actions": done,
    }


def _do(
    cloud: Cloud, workflow: Json, actions: Json, done: dict[str, Json], bodies: dict[str, Json]
) -> None:
    """Do actions of one level, in the order of their `runAfter`."""
    waiting = dict(actions)
    while waiting:
        name = next(
            (n for n, a in waiting.items() if set(a.get("runAfter") or {}) <= set(done)), ""
        )
        if not name:
            raise bad("The actions' runAfter form a circle.", "InvalidTemplate")
        action = waiting.pop(name)
        allowed = (action.get("runAfter") or {}).items()
        if not all(done[other]["status"] in states for other, states in allowed):
            done[name] = {"status": "Skipped"}
        elif action["type"] == "Http":
            done[name], bodies[name] = _send(cloud, workflow, action)
        elif Condition.of(action["expression"]).holds(cloud.time(), bodies):
            inner: dict[str, Json] = {}
            _do(cloud, workflow, action["actions"], inner, bodies)
            failed = any(each["status"] == "Failed" for each in inner.values())
            done |= {**inner, name: {"status": "Failed" if failed else "Succeeded"}}
        else:
            done[name] = {"status": "Succeeded"}  # a condition that does not hold is no failure


def _send(cloud: Cloud, workflow: Json, action: Json) -> tuple[Json, Json]:
    """Send an HTTP action's request, and follow a 202 unless the action says not to.

    The action's outcome, and the body that it got.
    """
    inputs = literal(action["inputs"])
    count = (inputs.get("retryPolicy") or {}).get("count", _RETRIES)
    for _ in range(1 + int(count)):
        status, headers, body = _call(cloud, workflow, inputs, inputs["method"], inputs["uri"])
        if status not in (408, 429) and status < 500:
            break
    follows = "DisableAsyncPattern" not in str(action.get("operationOptions", ""))
    if status == 202 and "Location" in headers and follows:
        status, _, body = _call(cloud, workflow, inputs, "GET", headers["Location"])
    return {"status": "Succeeded" if status < 400 else "Failed", "code": status}, body


def _call(
    cloud: Cloud, workflow: Json, inputs: Json, method: str, uri: str
) -> tuple[int, dict[str, str], Json]:
    parts = urlsplit(uri)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    headers = {name.lower(): str(value) for name, value in (inputs.get("headers") or {}).items()}
    authentication = inputs.get("authentication")
    if authentication:
        if authentication.get("type") != "ManagedServiceIdentity":
            raise AzureError(501, "NotRehearsed", f"Authentication {authentication.get('type')}")
        audience = str(authentication.get("audience") or f"https://{ARM}/").rstrip("/")
        token = token_for(cloud, workflow["identity"]["principalId"], audience)
        headers["authorization"] = f"Bearer {token}"
    body = json.dumps(inputs["body"]).encode() if "body" in inputs and method != "GET" else b""
    try:
        reply = answer(cloud, Request(method, parts.hostname or "", target, headers, body))
    except CutError:
        return 502, {}, {}
    return reply.status, reply.headers, reply.body if isinstance(reply.body, dict) else {}


# --- conditions and literal text ---
# As in "Workflow Definition Language schema" (learn.microsoft.com/azure/logic-apps): a text that
# begins with @ or holds @{ is an expression, @@ stands for a literal @. Of expressions two
# conditions are rehearsed; every other one is answered with 501.

_DUE = re.compile(r"@greaterOrEquals\(ticks\(utcNow\(\)\), ?ticks\('([^']+)'\)\)")
# A quote inside of quotes is doubled.
_TAGGED = re.compile(r"@equals\(body\('([^']+)'\)\?\['tags'\]\?\['([^']+)'\], ?'((?:[^']|'')*)'\)")
_EXPRESSION = re.compile(r"^@(?!@)|(?<!@)@\{")


@dataclass(frozen=True)
class Condition:
    """What an If asks: whether a time has come, or whether a read resource has a tag."""

    due: float | None = None  # seconds since 1970
    read: str = ""  # the action that read the resource
    tag: tuple[str, str] = ("", "")

    @classmethod
    def of(cls, expression: object) -> Condition:
        """Read it. Raises AzureError: 501 for another expression, 400 for a time that is none."""
        text = expression if isinstance(expression, str) else ""
        if match := _DUE.fullmatch(text):
            try:
                when = dt.datetime.fromisoformat(match[1].replace("Z", "+00:00"))
            except ValueError:
                raise bad(f"'{match[1]}' is no timestamp.", "InvalidTemplate") from None
            zoned = when if when.tzinfo else when.replace(tzinfo=dt.timezone.utc)
            return cls(due=zoned.timestamp())
        if match := _TAGGED.fullmatch(text):
            return cls(read=match[1], tag=(match[2], match[3].replace("''", "'")))
        raise AzureError(501, "NotRehearsed", f"The condition {expression}")

    def holds(self, now: float, bodies: Mapping[str, Json]) -> bool:
        """Whether it is true now; `bodies`: what each action has read."""
        if self.due is not None:
            return now >= self.due
        name, value = self.tag
        return (bodies.get(self.read, {}).get("tags") or {}).get(name) == value


def check_literal(value: Any) -> None:
    """Raise AzureError (501) where a text anywhere in `value` is an expression."""
    if isinstance(value, dict):
        for item in value.values():
            check_literal(item)
    elif isinstance(value, list):
        for item in value:
            check_literal(item)
    elif isinstance(value, str) and _EXPRESSION.search(value):
        raise AzureError(501, "NotRehearsed", f"The expression {value}")


def literal(value: Any) -> Any:
    """`value` as it is sent: with @ for @@ at the beginning of a text and before a brace."""
    if isinstance(value, dict):
        return {name: literal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):
        text = value[1:] if value.startswith("@@") else value
        return text.replace("@@{", "@{")
    return value
