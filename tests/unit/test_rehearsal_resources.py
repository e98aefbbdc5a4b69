"""What comes late, holds quota or dies with something else in the rehearsal."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import compute, jobs, resources, workspaces
from phi3_rehearsal.cloud import Cloud
from phi3_rehearsal.identity import CALLER, token_for
from phi3_rehearsal.processes import ProcessId
from phi3_rehearsal.proxy import answer
from phi3_rehearsal.wire import ARM, Reply, Request

WORKSPACE = "/subscriptions/s/resourceGroups/g/providers/M/workspaces/w"
FAMILY = "standardNCADSA100v4Family"
DEPLOYMENTS = "Microsoft.Resources/deployments"
SERVICES = (resources,)  # importing a service's module declares its calls


@pytest.mark.parametrize(
    ("ago", "idle_time", "held"),
    [(10, "PT2M", 24), (10, None, 24), (130, "PT2M", 0), (3000, "PT1H", 24), (10, "PT5S", 0)],
)
def test_a_node_holds_its_cores_until_its_idle_time_is_over(
    tmp_path: Path, ago: int, idle_time: str | None, held: int
) -> None:
    cloud = Cloud(tmp_path)
    scale = {"maxNodeCount": 2, "minNodeCount": 0, "nodeIdleTimeBeforeScaleDown": idle_time}
    cluster = f"{WORKSPACE}/computes/gpu"
    inner = {"vmSize": "STANDARD_NC24ADS_A100_V4", "scaleSettings": scale}
    cloud.put(cluster, compute.KIND, {"location": "eastus", "properties": {"properties": inner}})
    ended = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=ago)
    job = {
        "properties": {"status": "Completed", "computeId": cluster},
        "_times": {"end": ended.isoformat().replace("+00:00", "Z")},
    }
    cloud.put(f"{WORKSPACE}/jobs/one", jobs.KIND, job)
    assert compute.used(cloud, "eastus", FAMILY) == held


def test_a_job_dies_with_its_cluster(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    cluster = f"{WORKSPACE}/computes/gpu"
    inner = {"vmSize": "STANDARD_NC24ADS_A100_V4"}
    cloud.put(cluster, compute.KIND, {"location": "eastus", "properties": {"properties": inner}})
    work = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        own = dataclasses.asdict(ProcessId.of(work.pid))
        job = {"properties": {"status": "Running", "computeId": cluster}, "_process": own}
        status = tmp_path / "jobs" / "one" / "status.json"
        status.parent.mkdir(parents=True)
        status.write_text('{"status": "Running"}')
        known = cloud.put(f"{WORKSPACE}/jobs/one", jobs.KIND, job)
        assert jobs.nodes_on(cloud, cluster) == ["one"]
        jobs.die_with(cloud, cluster)
        assert ProcessId(**own).find() is None
    finally:
        work.kill()
    assert known["properties"]["status"] == "Failed"
    assert known["_error"]["code"] == "ComputeDeleted"
    assert jobs.nodes_on(cloud, cluster) == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_workspace_is_there_once_its_template_has_ended(tmp_path: Path, fails: bool) -> None:
    cloud = Cloud(tmp_path)
    group = "/subscriptions/s/resourceGroups/g"
    ready = {"location": "eastus", "properties": {"provisioningState": "Succeeded"}}
    cloud.put(group, "Microsoft.Resources/resourceGroups", ready)
    parts = {
        "storageAccount": "Microsoft.Storage/storageAccounts",
        "keyVault": "Microsoft.KeyVault/vaults",
    }
    for part, kind in parts.items():
        cloud.put(f"{group}/providers/{kind}/{part}", kind, ready)
    values = {"workspaceName": "home", "location": "eastus", "applicationInsightsOption": "none"}
    values |= {f"{part}Name": part for part in parts}
    values |= {f"{part}Option": "existing" for part in parts}
    template = {"resources": [{"type": workspaces.KIND}]}
    parameters = {name: {"value": value} for name, value in values.items()}
    body = {"properties": {"template": template, "parameters": parameters}}
    if fails:
        cloud.faults.add("PUT */deployments/home-1 failed code=Conflict")
    token = token_for(cloud, CALLER, f"https://{ARM}")

    def call(method: str, path: str, body: object = None) -> Reply:
        sent = b"" if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {token}"}
        return answer(cloud, Request(method, ARM, f"{path}?api-version=1", headers, sent))

    cloud.faults.add("PUT */deployments/home-1 slow seconds=60")
    made = f"{group}/providers/{workspaces.KIND}/home"
    assert call("PUT", f"{group}/providers/{DEPLOYMENTS}/home-1", body).status == 201
    assert call("GET", made).status == 404
    cloud.clock += 61
    assert call("GET", made).status == (404 if fails else 200)
