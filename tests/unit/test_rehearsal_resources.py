"""Quota in the rehearsal: what nodes at work, idling nodes and deployments hold of it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import compute, jobs
from phi3_rehearsal.cloud import Cloud

WORKSPACE = "/subscriptions/s/resourceGroups/g/providers/M/workspaces/w"
FAMILY = "standardNCADSA100v4Family"


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
