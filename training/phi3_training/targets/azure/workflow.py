"""Logic Apps (plan Consumption) that send requests from set times on, also with this machine off.

Every request is guarded by its own time, so that none is sent early, whatever fires the workflow.
Workflow, recurrence, conditions and the doubled @: "Schedule and run recurring workflows" and
"Workflow Definition Language" (learn.microsoft.com/azure/logic-apps). Never verified on live Azure.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...progress import Progress
from .clients import ARM, Clients
from .failures import code_of
from .operations import create, delete, get_or_none
from .resources import Body, register_provider

WORKFLOW_TYPE = "Microsoft.Logic/workflows"
WORKFLOWS_API = "2019-05-01"
_SCHEMA = (
    "https://schema.management.azure.com/providers/Microsoft.Logic/schemas/2016-06-01/"
    "workflowdefinition.json#"
)
# A refused request (the endpoint is just being changed) is tried again, for so long.
TRIES_FOR = dt.timedelta(days=7)
# A trigger starts at least so long after it is saved: one without a time ahead runs at once.
_SOON = dt.timedelta(minutes=2)
# Azure's time of the next run may differ from what was asked by rounding alone; more means that
# this machine's clock is off, and that the deletion would come at another time than is said here.
SAME_TIME = dt.timedelta(minutes=5)
_WHATEVER = ["Succeeded", "Failed", "TimedOut", "Skipped"]  # happened to the action before
_DUE = re.compile(r"ticks\('([^']+)'\)\)$")
_TAGGED = re.compile(r"\?\['tags'\]\?\['([^']+)'\], '((?:[^']|'')*)'\)$")


@dataclass(frozen=True)
class Dated:
    """A request that is sent from a time on, every `minutes`, until it is taken away.

    `trigger` names the recurrence that sends it; `only_if`: a tag that the resource must then have.
    """

    name: str
    trigger: str
    at: dt.datetime
    method: str
    target: str  # ARM id
    api_version: str
    body: Body | None = None
    only_if: tuple[str, str] | None = None
    minutes: int = 60


def workflow_body(
    requests: Sequence[Dated], region: str, tags: Mapping[str, str], now: dt.datetime | None = None
) -> Body:
    """The workflow as ARM takes it: a recurrence for each trigger, a condition for each request.

    What one of them ends with does not keep the next from being sent. ValueError without a request.
    """
    if not requests:
        raise ValueError("a workflow needs a request to send")
    soonest = (now or utc_now()) + _SOON
    triggers: dict[str, Body] = {}
    for name in dict.fromkeys(each.trigger for each in requests):
        own = [each for each in requests if each.trigger == name]
        minutes = min(each.minutes for each in own)
        recurrence = {
            "frequency": "Hour" if minutes == 60 else "Minute",
            "interval": 1 if minutes == 60 else minutes,
            # Without a start time Logic Apps run as soon as they are saved.
            "startTime": iso(max(soonest, min(each.at for each in own))),
            "endTime": iso(max(soonest, max(each.at for each in own)) + TRIES_FOR),
            "timeZone": "UTC",
        }
        triggers[name] = {"type": "Recurrence", "recurrence": recurrence}
    actions: dict[str, Body] = {}
    before: str | None = None
    for request in requests:
        send: Body = {f"{request.name}_now": _http(request, request.method, request.body)}
        if request.only_if is not None:
            tag, value = request.only_if
            read, quoted = f"{request.name}_read", value.replace("'", "''")
            inner = {
                "type": "If",
                "expression": f"@equals(body('{read}')?['tags']?['{tag}'], '{quoted}')",
                "actions": send,
                "runAfter": {read: ["Succeeded"]},
            }
            send = {read: _http(request, "GET"), f"{request.name}_if": inner}
        actions[request.name] = {
            "type": "If",
            # Its own time, whatever fired the workflow: triggers are shared, and people fire them.
            "expression": f"@greaterOrEquals(ticks(utcNow()), ticks('{iso(request.at)}'))",
            "actions": send,
            "runAfter": {} if before is None else {before: _WHATEVER},
        }
        before = request.name
    definition = {
        "$schema": _SCHEMA,
        "contentVersion": "1.0.0.0",
        "triggers": triggers,
        "actions": actions,
        "outputs": {},
    }
    return {
        "location": region,
        "identity": {"type": "SystemAssigned"},
        "tags": dict(tags),
        "properties": {"state": "Enabled", "definition": definition},
    }


def _http(request: Dated, method: str, body: Body | None = None) -> Body:
    return {
        "type": "Http",
        # Azure ML answers 202 with an address outside the resource. Logic Apps would poll it, get
        # a 403 (the role ends at the resource) and call a deletion that works a failure.
        "operationOptions": "DisableAsyncPattern",
        "inputs": {
            "method": method,
            "uri": f"{ARM}{request.target}?api-version={request.api_version}",
            "authentication": {
                "type": "ManagedServiceIdentity",
                "audience": "https://management.core.windows.net/",
            },
            "retryPolicy": {"type": "exponential", "count": 4, "interval": "PT30S"},
            **({} if body is None else {"body": _escaped(body)}),
        },
    }


def requests_of(workflow: Any) -> list[Dated]:
    """What a workflow of `workflow_body` sends, without the triggers' names.

    Actions of another form, which somebody else has written, are left out.
    """
    definition = (workflow.properties or {}).get("definition") or {}
    found = []
    for name, action in (definition.get("actions") or {}).items():
        due = _DUE.search(str(action.get("expression", "")))
        inner: Body = action.get("actions") or {}
        only_if = None
        if f"{name}_if" in inner:
            tagged = _TAGGED.search(str(inner[f"{name}_if"].get("expression", "")))
            only_if = (tagged[1], tagged[2].replace("''", "'")) if tagged else None
            inner = inner[f"{name}_if"].get("actions") or {}
        inputs = (inner.get(f"{name}_now") or {}).get("inputs") or {}
        at = time_of(due[1]) if due else None
        if at is None or not inputs:
            continue
        target, _, version = str(inputs["uri"]).removeprefix(ARM).partition("?api-version=")
        body = _unescaped(inputs["body"]) if "body" in inputs else None
        found.append(Dated(name, "", at, inputs["method"], target, version, body, only_if))
    return found


def find_workflow(clients: Clients, arm_id: str) -> Any:
    """The workflow as ARM has it, or None. StageError where it may not be read."""
    read = partial(clients.resources.resources.get_by_id, arm_id, api_version=WORKFLOWS_API)
    return get_or_none(read, f"Looking for the workflow {arm_id.rsplit('/', 1)[-1]}")


def next_time(clients: Clients, arm_id: str, trigger: str) -> dt.datetime | None:
    """When Azure itself says that a workflow's trigger fires next; None: never again."""
    by_id = clients.resources.resources.get_by_id
    found: Any = get_or_none(
        partial(by_id, f"{arm_id}/triggers/{trigger}", api_version=WORKFLOWS_API),
        f"Reading when {arm_id.rsplit('/', 1)[-1]} runs",
    )
    return time_of(((found.properties if found else None) or {}).get("nextExecutionTime"))


def put_workflow(clients: Clients, arm_id: str, body: Body, doing: str, progress: Progress) -> Any:
    """Make or change a workflow, and register its provider where needed. StageError if refused."""
    from azure.core.exceptions import HttpResponseError

    poll, resources = clients.poll, clients.resources.resources
    content: Any = body  # the SDK asks for a model of its own, and takes JSON
    put = partial(
        resources.begin_create_or_update_by_id, arm_id, content, api_version=WORKFLOWS_API
    )

    def start() -> object:
        try:
            return put()
        except HttpResponseError as error:
            if (code_of(error) or "").lower() != "missingsubscriptionregistration":
                raise
            register_provider(clients, WORKFLOW_TYPE.split("/")[0], progress)
            return put()

    return create(
        doing,
        start,
        partial(resources.get_by_id, arm_id, api_version=WORKFLOWS_API),
        progress,
        limit=poll.provision_timeout,
        pause=poll.interval,
    )


def delete_workflow(clients: Clients, arm_id: str, progress: Progress) -> bool:
    """Delete a workflow by its id and wait until it is gone; False where there is none."""
    resources, poll = clients.resources.resources, clients.poll
    return delete(
        f"Deleting the workflow {arm_id.rsplit('/', 1)[-1]}",
        partial(resources.begin_delete_by_id, arm_id, api_version=WORKFLOWS_API),
        partial(resources.get_by_id, arm_id, api_version=WORKFLOWS_API),
        progress,
        limit=poll.delete_timeout,
        pause=poll.interval,
    )


def _escaped(value: Any) -> Any:
    """`value` with each text as a literal: one that looks like an expression would be evaluated."""
    if isinstance(value, str):
        starts = value.startswith("@") and not value.startswith("@{")
        return ("@" if starts else "") + value.replace("@{", "@@{")
    return _each(value, _escaped)


def _unescaped(value: Any) -> Any:
    if isinstance(value, str):
        return (value[1:] if value.startswith("@@") else value).replace("@@{", "@{")
    return _each(value, _unescaped)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: change(item) for name, item in value.items()}
    return [change(item) for item in value] if isinstance(value, list) else value


def shown(at: dt.datetime, now: dt.datetime | None = None) -> str:
    """`2026-11-28 18:00 UTC (in 3 h 20 min)`."""
    left = int((at - (now or utc_now())).total_seconds()) // 60
    text = f"{at:%Y-%m-%d %H:%M} UTC"
    if left < 1:
        return f"{text} (due now)"
    hours, minutes = divmod(left, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes and hours < 48 else ""]
    return f"{text} (in {' '.join(part for part in parts if part)})"


def utc_now() -> dt.datetime:
    """Now, in whole seconds: Azure's times have no more."""
    return dt.datetime.now(dt.timezone.utc).replace(microsecond=0)


def iso(at: dt.datetime) -> str:
    """The time as Azure takes it."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def time_of(text: object) -> dt.datetime | None:
    """The time that Azure wrote; None where it wrote none."""
    # Azure writes seven digits of a second, which Python 3.10 does not read.
    whole = str(text).split(".")[0].removesuffix("Z")
    try:
        return dt.datetime.fromisoformat(whole).replace(tzinfo=dt.timezone.utc)
    except ValueError:
        return None
