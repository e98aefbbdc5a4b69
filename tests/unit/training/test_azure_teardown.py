"""`down` and refused deployments: what is deleted, what the user reads, what a fault stops."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

from phi3_training.errors import StageError
from phi3_training.recipe.azure import AzureSection, PollSection
from phi3_training.run import Run
from phi3_training.targets.azure.deploy import ServedModel, ensure_deployment
from phi3_training.targets.azure.place import RunResource, record, recorded_resources
from phi3_training.targets.azure.provision import ensure_cluster
from phi3_training.targets.azure.teardown import remove_run
from phi3_training.targets.azure.traffic import DeploymentId

from .azure_wire import place

ENDPOINT = "ep"
SECTION = AzureSection(poll=PollSection(interval=0.05, job_interval=0.05))


def refused(status: int, message: str) -> HttpResponseError:
    error = (ResourceNotFoundError if status == 404 else HttpResponseError)(message)
    error.status_code = status
    return error


class Kind:
    """Operations on one kind of thing; `faults` are raised by name and verb, one each time."""

    def __init__(self, **things: Any) -> None:
        self.things = things
        self.faults: dict[tuple[str, str], list[HttpResponseError]] = {}
        self.deleted: list[str] = []
        self.puts = 0

    def _fault(self, verb: str, name: str) -> None:
        waiting = self.faults.get((verb, name))
        if waiting:
            raise waiting.pop(0)

    def get(self, name: str, *_parent: str) -> Any:
        self._fault("get", name)
        if name not in self.things:
            raise refused(404, f"no {name}")
        return self.things[name]

    def list(self, *_parent: str, **_filters: Any) -> list[Any]:
        return list(self.things.values())

    def list_nodes(self, _name: str) -> list[Any]:
        return []

    def get_logs(self, *_names: str, **_options: Any) -> str:
        return "cannot load the weights"

    def begin_create_or_update(self, entity: Any) -> None:
        self.puts += 1
        self._fault("put", entity.name)
        self.things.setdefault(entity.name, thing(entity.name))

    def begin_delete(self, name: str, *_parent: str) -> None:
        self._fault("delete", name)
        self.deleted.append(name)
        self.things.pop(name, None)


def thing(name: str, state: str = "Succeeded", **more: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "name": name,
        "provisioning_state": state,
        "tags": {"created-by": "phi3-promptflow"},
        "traffic": {},
        "instance_type": "Standard_NC24ads_A100_v4",
        "instance_count": 1,
        "model": "azureml:phi3:1",
        "auth_mode": "key",
        "scoring_uri": "https://ep",
        "type": "amlcompute",
        "size": "Standard_NC24ads_A100_v4",
    }
    return SimpleNamespace(**{**values, **more})


class Cloud:
    """What `down` and `deploy` use of the clients."""

    def __init__(self, folder: Path) -> None:
        self.place = place(folder)
        self.poll = SECTION.poll
        self.online_endpoints = Kind(ep=thing(ENDPOINT))
        self.online_deployments = Kind()
        self.compute = Kind()
        self.jobs = Kind()
        self.resource_groups = Kind(**{self.place.resource_group: thing("group")})
        self.subscription: Any = None
        self.prices = SimpleNamespace(hourly=lambda _size, _region: None)
        self.ml = self.resources = self

    def get_by_id(self, arm_id: str, **_options: Any) -> Any:
        raise refused(404, f"no {arm_id}")

    def list(self, **_options: Any) -> list[Any]:
        return []  # of phi3's other resources


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "mine")


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def down(cloud: Cloud, run: Run, only: str) -> list[str]:
    return remove_run(cloud, SECTION, run, only, lambda _d, _t, _text: None)  # type: ignore[arg-type]


def deploy(cloud: Cloud, run: Run, name: str = "new") -> str:
    model = ServedModel("phi3", "1", "pipeline")
    return ensure_deployment(
        cloud, SECTION, run, DeploymentId(ENDPOINT, name), model, lambda _d, _t, _text: None  # type: ignore[arg-type]
    )  # fmt: skip


def deployed(cloud: Cloud, run: Run, **states: str) -> None:
    for name, state in states.items():
        cloud.online_deployments.things[name] = thing(name, state)
        record(run, RunResource("deployment", name, ENDPOINT))


def test_failed_deletes_what_failed_and_is_ours_and_nothing_else(cloud: Cloud, run: Run) -> None:
    deployed(cloud, run, good="Succeeded", bad="Failed")
    cloud.online_deployments.things["theirs"] = thing("theirs", "Failed")
    cloud.compute.things["gpu-cluster"] = thing("gpu-cluster", "Failed")

    told = down(cloud, run, "failed")

    assert cloud.online_deployments.deleted == ["bad"]
    assert cloud.compute.deleted == ["gpu-cluster"]
    assert cloud.online_endpoints.deleted == []
    assert "deleted: deployment bad of ep" in told
    assert [made.name for made in recorded_resources(run, "deployment")] == ["good"]
    assert any("theirs" in line for line in told if line.startswith("still bills"))


def test_failed_leaves_a_cluster_that_is_well_or_not_ours(cloud: Cloud, run: Run) -> None:
    cloud.compute.things["gpu-cluster"] = thing("gpu-cluster")
    assert down(cloud, run, "failed")[0] == "deleted: nothing (nothing existed)"
    cloud.compute.things["gpu-cluster"] = thing("gpu-cluster", "Failed", tags={})
    assert "left alone: cluster gpu-cluster: phi3 did not create it" in down(cloud, run, "failed")
    assert cloud.compute.deleted == []


def test_what_cannot_be_looked_at_does_not_keep_the_rest_billing(cloud: Cloud, run: Run) -> None:
    cloud.online_endpoints.faults["get", ENDPOINT] = [refused(403, "no right")]
    record(run, RunResource("endpoint", ENDPOINT))
    cloud.compute.things["gpu-cluster"] = thing("gpu-cluster")

    with pytest.raises(StageError, match="Not everything could be deleted") as caught:
        down(cloud, run, "run")

    assert cloud.compute.deleted == ["gpu-cluster"]
    assert "deleted: cluster gpu-cluster" in str(caught.value)
    assert "FAILED: Looking for the endpoint ep" in str(caught.value)


def test_a_group_that_is_gone_bills_nothing(cloud: Cloud, run: Run) -> None:
    cloud.online_endpoints.things.clear()
    assert any("storage account" in line for line in down(cloud, run, "run"))
    cloud.resource_groups.things.clear()
    assert down(cloud, run, "run")[-1] == "still bills: nothing by the hour"


def test_a_refused_deployment_is_not_reported_as_billing(cloud: Cloud, run: Run) -> None:
    cloud.online_deployments.faults["put", "new"] = [refused(400, "BadArgument: no such model")]
    with pytest.raises(StageError, match="no such model") as caught:
        deploy(cloud, run)
    assert "nothing new bills" in str(caught.value)
    assert "--failed" not in str(caught.value)
    assert cloud.online_deployments.puts == 1


def test_a_failed_deployment_is_reported_as_billing_and_replaced(cloud: Cloud, run: Run) -> None:
    def fails(entity: Any) -> None:
        cloud.online_deployments.things[entity.name] = thing(entity.name, "Failed")
        raise refused(200, "ResourceNotReady: the container stopped")

    cloud.online_deployments.begin_create_or_update = fails  # type: ignore[method-assign]
    with pytest.raises(StageError, match="bills until it is") as caught:
        deploy(cloud, run)
    assert "cannot load the weights" in str(caught.value)
    assert "phi3 down --on azure --failed --run mine" in str(caught.value)
    del cloud.online_deployments.begin_create_or_update
    assert deploy(cloud, run) == "created"
    assert cloud.online_deployments.deleted == ["new"]


def test_a_deployment_that_is_being_made_is_waited_for(cloud: Cloud, run: Run) -> None:
    """Killed while Azure made it: the same PUT again is refused with 409."""
    being_made = thing("new", "Creating")
    cloud.online_deployments.things["new"] = being_made
    looks = 0

    def progress(_done: int, _total: int, text: str) -> None:
        nonlocal looks
        looks += "creating" in text
        if looks == 3:
            being_made.provisioning_state = "Succeeded"

    cloud.online_deployments.faults["put", "new"] = [refused(409, "being created")]
    model = ServedModel("phi3", "1", "pipeline")
    how = ensure_deployment(
        cloud, SECTION, run, DeploymentId(ENDPOINT, "new"), model, progress  # type: ignore[arg-type]
    )  # fmt: skip
    assert (how, cloud.online_deployments.puts) == ("created", 1)
    assert cloud.online_deployments.deleted == []


def test_an_endpoint_that_is_busy_for_minutes_is_waited_for(cloud: Cloud, run: Run) -> None:
    busy = [refused(409, "the endpoint is being updated") for _ in range(9)]
    cloud.online_deployments.faults["put", "new"] = busy
    assert deploy(cloud, run) == "created"
    assert cloud.online_deployments.puts == 10


def test_a_cluster_that_is_being_deleted_is_made_again(cloud: Cloud) -> None:
    going = thing("gpu-cluster", "Deleting")
    cloud.compute.things["gpu-cluster"] = going
    size = thing("Standard_NC24ads_A100_v4", gpus=1, family="standardNCADSA100v4Family")
    cloud.subscription = SimpleNamespace(
        compute=SimpleNamespace(list_sizes=lambda **_where: [size])
    )
    cloud.compute.faults["put", "gpu-cluster"] = [refused(409, "being deleted")]

    def progress(_done: int, _total: int, text: str) -> None:
        if "deleting" in text:
            cloud.compute.things.pop("gpu-cluster", None)

    made = ensure_cluster(cloud, SECTION.compute, {}, progress)  # type: ignore[arg-type]
    assert (made, cloud.compute.puts) == ("created", 2)


@pytest.mark.parametrize(
    "where",
    [{"compute": "gpu-cluster"}, {"settings": SimpleNamespace(default_compute="gpu-cluster")}],
)
def test_a_cluster_under_another_runs_job_is_left(
    cloud: Cloud, run: Run, where: dict[str, Any]
) -> None:
    cloud.compute.things["gpu-cluster"] = thing("gpu-cluster")
    cloud.jobs.things["theirs"] = thing("theirs", status="Running", **where)
    cloud.jobs.things["elsewhere"] = thing("elsewhere", status="Running", compute="other")
    told = down(cloud, run, "run")
    assert cloud.compute.deleted == []
    assert any("theirs" in line and "--all" in line for line in told if "left alone" in line)
    cloud.jobs.things["theirs"].status = "Completed"
    down(cloud, run, "run")
    assert cloud.compute.deleted == ["gpu-cluster"]
