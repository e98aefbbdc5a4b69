"""What Azure Monitor counts is a second voice in a rollout, over the rehearsed Azure in process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import endpoints, metrics, workspaces
from phi3_rehearsal.cloud import stamps
from phi3_rehearsal.compute import DEPLOYMENT_KIND
from phi3_rehearsal.endpoints import key_of
from phi3_rehearsal.identity import CALLER, token_for
from phi3_rehearsal.proxy import answer
from phi3_rehearsal.wire import ARM, Request
from phi3_training.errors import StageError
from phi3_training.evaluate.questions import Question
from phi3_training.evaluate.rows import Answered, Said, make_rows, write_rows
from phi3_training.progress import no_progress
from phi3_training.recipe import Recipe
from phi3_training.run import Run
from phi3_training.targets.azure.deadline import endpoint_id
from phi3_training.targets.azure.probes import counted
from phi3_training.targets.azure.rollout import Rollout
from phi3_training.targets.azure.traffic import DeploymentId
from phi3_training.targets.base import Access

from .azure_rehearsed import Rehearsed, rehearsed
from .azure_wire import place

SERVICES = (metrics,)  # importing a service's module declares its calls
HOST = "chat.eastus.inference.ml.azure.com"
QUESTIONS = [
    Question("validation", i, [{"role": "user", "content": f"What is {i}?"}], f"It is {i}")
    for i in range(20)
]


@pytest.fixture
def azure(tmp_path: Path) -> Rehearsed:
    """An endpoint with the deployments blue, which has the traffic, and green; both answer."""
    here = place(tmp_path)
    clients = rehearsed(tmp_path, here)
    cloud, ready = clients.cloud, {"provisioningState": "Succeeded"}
    for arm_id, kind in (
        (here.group_scope, "Microsoft.Resources/resourceGroups"),
        (here.workspace_id(), workspaces.KIND),
    ):
        cloud.put(arm_id, kind, {"location": "eastus", "kind": "Default", "properties": ready})
    endpoint = endpoint_id(here, "chat")
    own: dict[str, Any] = {
        "authMode": "Key",
        "traffic": {"blue": 100},
        "scoringUri": f"https://{HOST}/score",
        "properties": {},
    }
    document = {"location": "eastus", "tags": {}, "kind": "Managed", "systemData": stamps()}
    cloud.put(endpoint, endpoints.KIND, {**document, "properties": {**ready, **own}})
    own = {"endpointComputeType": "Managed", "scaleSettings": {"scaleType": "Default"}}
    for name in ("blue", "green"):
        served = {"sku": {"capacity": 1}, "_server": {"port": 9}}  # the faults answer, not it
        document = {**document, **served, "properties": {**ready, **own}}
        cloud.put(f"{endpoint}/deployments/{name}", DEPLOYMENT_KIND, document)
        cloud.faults.add(f"POST */deployments/{name} parrot times=99999")
    return clients


def ask(azure: Rehearsed, deployment: str | None = None) -> int:
    """One request as a client of the endpoint sends it; the status of its answer."""
    endpoint = azure.cloud.get(endpoint_id(azure.place, "chat"))
    assert endpoint is not None
    headers = {"authorization": f"Bearer {key_of(azure.cloud, endpoint, 'primary')}"}
    if deployment:
        headers["azureml-model-deployment"] = deployment
    return answer(azure.cloud, Request("POST", HOST, "/score", headers, b"{}")).status


def failing(azure: Rehearsed) -> None:
    """From now on green fails requests that do not name it, as the golden questions do."""
    faults = azure.cloud.faults
    known = [fault.as_typed() for fault in faults.pending()]
    faults.clear()
    for text in ("POST */deployments/green 500 times=9999 named=no", *known):
        faults.add(text)


def test_requests_are_counted_by_deployment_and_class_of_status(azure: Rehearsed) -> None:
    failing(azure)
    assert [ask(azure), ask(azure, "green"), ask(azure, "green")] == [200, 200, 200]
    endpoint = azure.cloud.get(endpoint_id(azure.place, "chat"))
    assert endpoint is not None
    endpoint["properties"]["traffic"] = {"green": 100}
    assert ask(azure) == 500
    now = datetime.now(UTC)
    soon = now + timedelta(seconds=2)  # a span is of whole seconds
    blue, green = (counted(azure, "chat", name, minutes=2, now=soon) for name in ("blue", "green"))
    assert blue is not None
    assert green is not None
    assert (blue.requests, blue.failed) == (1, 0)
    assert (green.requests, green.failed) == (3, 1)
    later = now + timedelta(minutes=10)
    assert counted(azure, "chat", "green", minutes=1, now=later) is None


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"metricnames": "RequestLatency"}, 501),
        ({"interval": "PT5M"}, 501),
        ({"timespan": "yesterday"}, 400),
        ({"timespan": "2026-11-29T11:00:00Z/2026-11-29T10:00:00Z"}, 400),
        ({"$filter": "colour eq 'green'"}, 400),
        ({"$filter": "deployment ne '*'"}, 200),
    ],
)
def test_what_azure_monitor_would_refuse(
    azure: Rehearsed, change: dict[str, str], status: int
) -> None:
    asked = {
        "metricnames": "RequestsPerMinute",
        "aggregation": "Average",
        "timespan": "2026-11-29T10:00:00Z/2026-11-29T11:00:00Z",
        **change,
    }
    query = "&".join(f"{name}={quote(value)}" for name, value in asked.items())
    path = f"{endpoint_id(azure.place, 'chat')}/providers/Microsoft.Insights/metrics?{query}"
    token = token_for(azure.cloud, CALLER, f"https://{ARM}")
    request = Request("GET", ARM, path, {"authorization": f"Bearer {token}"}, b"")
    ask(azure)
    reply = answer(azure.cloud, request)
    assert reply.status == status
    if status == 200:
        assert isinstance(reply.body, dict)
        assert reply.body["value"][0]["timeseries"] == []


class Scripted(Access):
    """Deployments that answer every golden question rightly; `asked` hears of each."""

    asked: Callable[[], None]

    def client(self, **_options: Any) -> Any:
        return _Client(self.asked)


class _Client:
    def __init__(self, asked: Callable[[], None]) -> None:
        self._asked = asked

    def chat(self, messages: list[dict[str, str]], **_parameters: Any) -> Any:
        self._asked()

        class Reply:
            text = f"It is {messages[-1]['content'].removeprefix('What is ').rstrip('?')}"

        return Reply

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.patient
@pytest.mark.parametrize("fails", [True, False])
def test_errors_that_the_golden_questions_do_not_see_undo_the_rollout(
    azure: Rehearsed, tmp_path: Path, fails: bool
) -> None:
    random.seed(7)  # of the front's choice between the deployments
    if fails:
        failing(azure)
    run = Run.open(tmp_path / "my-run")
    said = [Answered(Said(question.expected), None) for question in QUESTIONS]
    write_rows(run, make_rows(QUESTIONS, said, said))
    endpoint = endpoint_id(azure.place, "chat")
    statuses: list[int] = []

    def shares() -> dict[str, int]:
        document = azure.cloud.get(endpoint)
        assert document is not None
        return {name: n for name, n in document["properties"]["traffic"].items() if n}

    def traffic() -> None:
        """While green has 5 %, people ask, too: 1,400 requests, so 70 of them to green."""
        if shares().get("green") == 5 and not statuses:
            statuses.extend(ask(azure) for _ in range(1400))
            time.sleep(1.1)  # a span of time is of whole seconds

    access = Scripted(f"https://{HOST}/score", "key")
    object.__setattr__(access, "asked", traffic)
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "data": {"train": ["chats.jsonl"]},
            "model": {"name_or_path": "microsoft/Phi-4-mini-instruct"},
            # What is worse is undone at the first look; what is not is watched to the end.
            "azure": {
                "poll": {"interval": 0.05},
                "rollout": {"minutes": 1 if fails else 0.01, "steps": [5, 100]},
            },
        }
    )
    target = DeploymentId("chat", "green")
    work = Rollout(azure, recipe, run, target, {"blue": 100}, access, no_progress, "green bills")
    if not fails:
        work.go()
        assert shares() == {"green": 100}
        assert set(statuses) == {200}
        return
    with pytest.raises(StageError) as caught:
        work.go()
    told = str(caught.value)
    assert "with 5 % of the traffic" in told
    assert "requests failed (blue: 0.0%)" in told
    assert "20 of 20 answered (blue: 20 of 20), 20 of 20 right (20)" in told  # nothing seen there
    assert "read back from Azure: blue 100 %" in told
    assert shares() == {"blue": 100}
    assert 50 <= statuses.count(500) < 100
