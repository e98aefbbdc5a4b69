"""The endpoint waits for cores that the cluster's idling node still holds, and not for ever."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.exceptions import HttpResponseError

from phi3_training.errors import StageError
from phi3_training.recipe.azure import AzureSection, PollSection
from phi3_training.targets.azure import sizes
from phi3_training.targets.azure.sizes import Need, taking_turns, when_cores_are_free

from .azure_wire import place

A100, FAMILY = "Standard_NC24ads_A100_v4", "standardNCADSA100v4Family"


class Region:
    """A region with 24 cores and a cluster; `nodes` is how many it has at each look."""

    def __init__(self, folder: Path, nodes: list[int], counts_idle: bool = True) -> None:
        self.place = place(folder)
        self.poll = PollSection(interval=0.05)
        self.ml = self.subscription = self
        self.compute = self
        self._nodes, self._counts_idle = nodes, counts_idle
        self.now = nodes[0]
        self.started = 0

    def get(self, _name: str) -> Any:
        return SimpleNamespace(size=A100, min_instances=0, provisioning_state="Succeeded")

    def list_nodes(self, _name: str) -> list[Any]:
        self.now = self._nodes.pop(0) if len(self._nodes) > 1 else self._nodes[0]
        return [SimpleNamespace()] * self.now

    def list_usage(self, location: str) -> list[Any]:
        used = 24 * self.now if self._counts_idle else 0
        return [SimpleNamespace(name={"value": FAMILY}, current_value=used, limit=24)]

    def list_sizes(self, location: str) -> list[Any]:
        return [SimpleNamespace(name=A100, v_cp_us=24, gpus=1, family=FAMILY)]

    def start(self) -> str:
        """What Azure answers to the deployment."""
        self.started += 1
        if self.now:
            error = HttpResponseError("no cores")
            error.status_code = 400
            error.error = SimpleNamespace(code="OutOfQuota", message="no cores", details=[])
            raise error
        return "up"


def section(idle: int = 60) -> AzureSection:
    return AzureSection.model_validate({"compute": {"idle_time_before_scale_down": idle}})


@pytest.mark.parametrize("counts_idle", [True, False])
def test_the_deployment_starts_when_the_node_is_gone(tmp_path: Path, counts_idle: bool) -> None:
    region, shown = Region(tmp_path, [1, 1, 1, 0], counts_idle), list[str]()

    def progress(_done: int, _total: int, text: str) -> None:
        shown.append(text)

    assert when_cores_are_free(region, section(), region.start, progress) == "up"  # type: ignore[arg-type]
    assert shown[0].startswith("waiting for 24 cores: 1 node(s) of gpu-cluster hold them")
    # Where the figures already say that there is too little, there is no need to ask Azure.
    assert region.started == (1 if counts_idle else 4)


def test_without_nodes_a_refusal_is_what_it_is(tmp_path: Path) -> None:
    region = Region(tmp_path, [0])
    region.now = 1

    def refuse() -> None:
        region.now = 1  # somebody else has the cores
        region.start()

    with pytest.raises(HttpResponseError):
        when_cores_are_free(region, section(), refuse, lambda *_: None)  # type: ignore[arg-type]
    assert region.started == 1


def test_a_node_that_stays_ends_the_wait_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "RELEASE_SECONDS", -60.0)
    region = Region(tmp_path, [1])
    with pytest.raises(StageError, match=r"still holds 1 node.*--request 48"):
        when_cores_are_free(region, section(), region.start, lambda *_: None)  # type: ignore[arg-type]
    assert region.started == 0


def _needs(limit: int, family: str = FAMILY) -> list[Need]:
    training = Need("training", "azure.compute.size", A100, 1, FAMILY, 24, "", 0, limit)
    endpoint = Need("endpoint", "azure.endpoint.instance_type", A100, 1, family, 24, "", 0, limit)
    return [training, endpoint]


def test_the_plan_says_beforehand_that_one_waits_for_the_other() -> None:
    line = taking_turns(_needs(24), section(120))
    assert "together need 48 cores" in line
    assert "120 s after the last job" in line
    assert taking_turns(_needs(48), section()) == ""
    assert taking_turns(_needs(12), section()) == ""  # neither fits: another message says so
    assert taking_turns(_needs(24, "another"), section()) == ""
