"""An endpoint with two deployments behind the wire: takes changes, refuses them, keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from phi3_training.recipe.azure import AzureSection

from .azure_wire import SUBSCRIPTION, Answer, Wire

BLUE = {"blue": 100}
# The SDK takes ids apart.
WORKSPACE = (
    f"/subscriptions/{SUBSCRIPTION}/resourceGroups/group/providers/"
    "Microsoft.MachineLearningServices/workspaces/place"
)


def section(**values: Any) -> AzureSection:
    return AzureSection.model_validate({"poll": {"interval": 0.05}, **values})


@dataclass
class Service:
    """An endpoint `chat` with two deployments; `refusals` are its next answers to a change."""

    refusals: list[Answer] = field(default_factory=list)
    traffic: dict[str, int] = field(default_factory=lambda: dict(BLUE))
    mirror: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=lambda: {"team": "ours"})
    states: list[str] = field(default_factory=lambda: ["Succeeded"])  # one for each look, then last
    deployments: dict[str, Answer] = field(default_factory=dict)
    keeps: bool = False  # says yes, and changes nothing
    requests: int = 0  # that Azure Monitor has counted for each deployment
    failed: dict[str, int] = field(default_factory=dict)  # of them

    def __post_init__(self) -> None:
        self.wire = Wire(self.answer)
        for name in ("blue", "green"):
            self.deployments[name] = deployment(name, "1" if name == "blue" else "2")

    @property
    def puts(self) -> list[Any]:
        return [body for method, url, body in self.wire.sent if method == "PUT"]

    def answer(self, method: str, url: str) -> Answer:
        path = url.split("?")[0]
        if path.endswith("/Microsoft.Insights/metrics"):
            return 200, {"value": [{"timeseries": self.counts(unquote(url))}]}
        if path.endswith("/deployments"):
            return 200, {"value": [content for _, content in self.deployments.values()]}
        if "/deployments/" in path:
            missing: Answer = (404, {"error": {"code": "ResourceNotFound", "message": "no"}})
            return self.deployments.get(path.rsplit("/", 1)[-1], missing)
        if path.endswith("/onlineEndpoints/chat"):
            return self.change() if method == "PUT" else (200, self.endpoint())
        return 200, {"location": "eastus", "properties": {}}

    def counts(self, url: str) -> list[dict[str, Any]]:
        failed = next((n for name, n in self.failed.items() if f"'{name}'" in url), 0)
        return [
            {
                "metadatavalues": [{"name": {"value": "statuscodeclass"}, "value": status}],
                "data": [{"average": float(count)}],
            }
            for status, count in (("2xx", self.requests - failed), ("4xx", failed))
        ]

    def change(self) -> Answer:
        if self.refusals:
            return self.refusals.pop(0)
        body = self.wire.sent[-1][2]
        if not self.keeps:
            self.traffic = body["properties"].get("traffic") or {}
            self.mirror = body["properties"].get("mirrorTraffic") or {}
            self.tags = body["tags"]
        self.states = ["Succeeded"]
        return 200, self.endpoint()

    def endpoint(self) -> dict[str, Any]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return {
            "id": f"{WORKSPACE}/onlineEndpoints/chat",
            "name": "chat",
            "location": "eastus",
            "kind": "Managed",
            "tags": self.tags,
            "properties": {
                "authMode": "Key",
                "provisioningState": state,
                "traffic": self.traffic,
                "mirrorTraffic": self.mirror,
                "scoringUri": "https://chat.eastus.inference.ml.azure.com/score",
            },
        }


def deployment(name: str, version: str, state: str = "Succeeded") -> Answer:
    return 200, {
        "id": f"{WORKSPACE}/onlineEndpoints/chat/deployments/{name}",
        "name": name,
        "location": "eastus",
        "sku": {"name": "Default", "capacity": 1},
        "properties": {
            "endpointComputeType": "Managed",
            "model": f"{WORKSPACE}/models/phi3/versions/{version}",
            "provisioningState": state,
            "instanceType": "Standard_NC24ads_A100_v4",
            "scaleSettings": {"scaleType": "Default"},
        },
    }


def refusal(status: int, code: str, message: str) -> Answer:
    return status, {"error": {"code": code, "message": message}}
