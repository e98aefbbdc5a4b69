"""The whole Azure road against a rehearsed Azure: killed, disturbed, taken down.

It is killed in each stage that makes something on Azure, and while it is taken down.

The tests share one journey and go on where the one before ended, as a user does.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator

import psutil
import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from tests.integration.asking import Asking

from phi3_rehearsal import held
from phi3_training.stages import stages_of
from phi3_training.targets.base import Access

from .azure_road import RUN, UP, Road

TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}")
SIGNATURE = re.compile(rb"[?&]sig=(?!\[hidden\])[A-Za-z0-9%+/=]{10,}")
# One kill in each stage that makes something on Azure, right after the call that makes it.
KILLS = {
    "provision": r"Microsoft\.Resources/deployments/",
    "finetune": r"/jobs/[^/]+$",
    "register": r"/models/[^/]+/versions/[^/]+$",
    "deploy": r"/onlineEndpoints/[^/]+/deployments/[^/]+$",
    "connect": r"/connections/[^/]+$",
}
ENDPOINTS = "workspaces/onlineendpoints"


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """`up`, killed once in each stage of KILLS, then typed once more."""
    road = Road.begin(tmp_path_factory.mktemp("azure-home"), tmp_path_factory.mktemp("azure-work"))
    try:
        for path in KILLS.values():
            road.kill_at("PUT", path)
        done = road.up()
        assert done.returncode == 0, done.stderr
        yield road
    finally:
        road.close()
        left = road.laptop.processes()
        for process in left:
            process.terminate()
        psutil.wait_procs(left, timeout=10)


def counts(road: Road) -> dict[str, int]:
    """How many of each type of resource stand."""
    return {kind.lower(): number for kind, number in held(road.rehearsal.folder).items()}


def deployments(road: Road) -> dict[str, int]:
    """The deployments of the run's endpoint and their shares of the traffic."""
    state = json.loads(road.phi3("status", "--on", "azure", "-o", "json").stdout)[0]
    pattern = r"  deployment (\S+): \w+, (\d+) % of the traffic"
    found = [re.match(pattern, line) for line in state["lines"]]
    return {match[1]: int(match[2]) for match in found if match is not None}


def test_ends_with_an_answer_through_an_azure_host(road: Road) -> None:
    endpoint, answer = road.manifest("endpoint"), road.manifest("answer")
    host = f"https://{endpoint['endpoint_name']}.eastus.inference.ml.azure.com/score"

    assert endpoint["endpoint"] == host
    assert answer["answer"]
    assert answer["asked_through"] == ["this machine", "phi3-workspace", "phi3-workspace-project"]


def test_killed_in_each_stage_nothing_was_made_twice(road: Road) -> None:
    assert len(road.made("jobs")) == 1
    assert len(road.made("models/small-azure/versions")) == 1
    assert len(road.made("onlineEndpoints")) == 1
    assert len(road.made("deployments")) == 1
    assert road.made("computes") == {"gpu-cluster"}
    created = [c for c in road.rehearsal.calls() if c["method"] == "PUT" and c["status"] == 201]
    twice = [c["path"] for c in created if re.search(r"/(jobs|deployments)/[^/]+$", str(c["path"]))]
    assert len(twice) == len(set(twice))


def test_the_second_up_changes_nothing_also_as_a_rehearsal(road: Road) -> None:
    before = len(road.rehearsal.calls())

    done = road.rehearse("up", "small.yaml", "--on", "azure")

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("already done") == len(stages_of(in_cloud=True))
    calls = [c for c in road.rehearsal.calls()[before:] if "oauth2" not in str(c["path"])]
    assert {call["method"] for call in calls} == {"GET"}
    assert "rehearsal: 200 GET management.azure.com" in done.stderr


def test_status_says_what_bills(road: Road) -> None:
    done = road.phi3("status", "--on", "azure", "--run", RUN)

    assert done.returncode == 0, done.stderr
    assert "endpoint: up https://small-azure-" in done.stdout
    assert re.search(
        r"bills now: deployment v1-\w+ of small-azure-\w+: 1 x .*3\.67 USD", done.stdout
    )
    assert "100 % of the traffic" in done.stdout
    assert re.search(rf"job phi3-train-{RUN}-1-\w+: Completed", done.stdout)
    assert re.search(r"model small-azure:1$", done.stdout, re.MULTILINE)
    assert re.search(
        r"cluster gpu-cluster: succeeded, (?i:Standard_NC24ads_A100_v4), "
        r"0 to \d+ nodes, \d+ nodes now",
        done.stdout,
    )


def test_plan_says_what_is_there(road: Road) -> None:
    done = road.phi3("plan", "small.yaml", "--on", "azure")

    assert done.returncode == 0, done.stderr
    assert "To do: nothing" in done.stdout
    assert re.search(r"workspace phi3-workspace exists", done.stdout)
    assert "route job" in done.stdout


def test_plan_stops_at_a_retired_size(road: Road) -> None:
    size = "azure.endpoint.instance_type=Standard_NC6s_v3"
    done = road.phi3("plan", "small.yaml", "--on", "azure", size)

    assert done.returncode == 1
    assert re.search(r"STOPS deploy .*Standard_NC6s_v3.*retired 2025-09-30", done.stdout)


def test_invoke_scores_a_held_out_row(road: Road) -> None:
    done = road.phi3("invoke", "--on", "azure", "--seed", "3", "-o", "json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = (road.run_folder / "data" / "validation.jsonl").read_text("utf-8").splitlines()
    assert json.loads(rows[found["line"] - 1])["messages"][:-1] == found["messages"]
    assert found["answer"]
    assert found["deployment"] == road.manifest("endpoint")["deployment"]


def test_chat_answers_through_azure(road: Road) -> None:
    done = road.phi3("chat", "What does lamp number 1 cost?", "--run", RUN)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(road.manifest("answer")["answer"]).strip()


@pytest.mark.slow  # test_rehearsal_flows pushes in seconds
def test_the_flow_is_pushed_once(road: Road) -> None:
    first = road.phi3("flow", "push", "--to", "project", "-o", "json")
    assert first.returncode == 0, first.stderr
    again = road.phi3("flow", "push", "--to", "project", "-o", "json")
    assert again.returncode == 0, again.stderr

    (made,), (found,) = json.loads(first.stdout), json.loads(again.stdout)
    assert (made["state"], found["state"]) == ("made", "exists")
    assert made["flow"] == found["flow"]
    assert made["page"].startswith("https://ml.azure.com/prompts/flow/")
    assert len(road.called("POST", r"/Flows$")) == 1
    assert road.called("PUT", r"/phi3_tool/client\.py")  # the flow runs there without our wheel

    both = road.phi3("flow", "push", "-o", "json")
    assert both.returncode == 0, both.stderr
    states = {flow["workspace"]: flow["state"] for flow in json.loads(both.stdout)}
    assert states == {"phi3-workspace": "made", "phi3-workspace-project": "exists"}
    assert len(road.called("POST", r"/Flows$")) == 2


def test_a_failed_deployment_is_reported_and_takes_no_traffic(road: Road) -> None:
    before = deployments(road)
    road.rehearsal.fault("* */deployments/* failed code=ResourceNotReady")

    failed = road.up("azure.endpoint.request_timeout_ms=80000")

    assert failed.returncode == 1
    assert "ResourceNotReady" in failed.stderr
    assert "The end of its log" in failed.stderr
    assert "bills until it is deleted: phi3 down --on azure --failed" in failed.stderr
    after = deployments(road)
    assert {name: share for name, share in after.items() if name in before} == before
    assert [share for name, share in after.items() if name not in before] == [0]
    assert road.phi3("invoke", "--on", "azure").returncode == 0


def test_the_same_command_again_makes_it_beside_the_old_one(road: Road) -> None:
    """Through a fault in every call of the way; the old one answers until the new one has."""
    old = str(road.manifest("endpoint")["deployment"])
    deleted = len(road.called("DELETE", "/deployments/"))
    (failed,) = set(deployments(road)) - {old}
    for fault in (
        "PUT */onlineEndpoints/*/deployments/* 429 retry-after=0 times=2",
        "PUT */onlineEndpoints/*/deployments/* reset-after times=1",
        "GET */deployments/* 500 times=1",
        "PUT */onlineEndpoints/* 409 times=1",
        "POST */listKeys 503 times=1",
        "POST */listsecrets 500 times=1",
    ):
        road.rehearsal.fault(fault)

    done = road.up("azure.endpoint.request_timeout_ms=80000")

    assert done.returncode == 0, done.stderr
    assert road.manifest("endpoint")["deployment"] == failed
    assert deployments(road) == {old: 0, failed: 100}
    assert f"without traffic, but billing: {old}" in done.stderr
    assert len(road.made("onlineEndpoints")) == 1
    # The failed one alone, which served nobody.
    assert len(road.called("DELETE", "/deployments/")) == deleted + 1


def test_idle_deployments_are_deleted_on_request(road: Road) -> None:
    done = road.phi3("down", "--on", "azure", "--idle")

    assert done.returncode == 0, done.stderr
    assert re.search(r"deleted: deployment \S+ of small-azure", done.stdout)
    assert list(deployments(road).values()) == [100]


def test_failed_deployments_are_deleted_on_request(road: Road) -> None:
    before = deployments(road)
    road.rehearsal.fault("* */deployments/* failed code=ResourceNotReady")
    assert road.up("azure.endpoint.request_timeout_ms=70000").returncode == 1
    (failed,) = set(deployments(road)) - set(before)

    done = road.phi3("down", "--on", "azure", "--failed")

    assert done.returncode == 0, done.stderr
    assert re.findall(r"deleted: deployment (\S+) of", done.stdout) == [failed]
    assert deployments(road) == before
    assert list(before.values()) == [100]


@pytest.mark.slow
def test_killed_at_a_step_the_clock_alone_puts_the_traffic_back(
    road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at 5 %: no client is alive, and one that asks all the time notices nothing."""
    old = str(road.manifest("endpoint")["deployment"])
    access = Access(str(road.manifest("endpoint")["endpoint"]), _key(road))
    for name, value in road.rehearsal.env.items():
        monkeypatch.setenv(name, value)
    settings = "azure.endpoint.request_timeout_ms=60000"
    with Asking(access) as client:
        # In this `up` the endpoint's first change is its first step.
        road.kill_at("PUT", r"/onlineEndpoints/[^/]+$", command=(*UP, settings))
        (new,) = set(half := deployments(road)) - {old}
        assert half == {old: 95, new: 5}
        road.rehearsal.advance(3600)
        assert deployments(road) == {old: 100, new: 0}
        asked = len(client.answers)

        done = road.up(settings)

        assert done.returncode == 0, done.stderr
        assert deployments(road) == {old: 0, new: 100}
    assert client.failures == []
    assert len(client.answers) > asked > 0
    lines = road.phi3("status", "--on", "azure", "--run", RUN).stdout
    assert re.search(rf"deployment {old}, if it has no traffic then, deletes itself at 20", lines)
    assert road.phi3("down", "--on", "azure", "--idle").returncode == 0


def test_with_entra_sign_in_there_is_no_key(road: Road) -> None:
    done = road.up("azure.endpoint.auth_mode=aad_token", "azure.endpoint.name=small-entra")

    assert done.returncode == 0, done.stderr
    assert "no key: the endpoint uses Entra tokens" in done.stderr
    assert road.manifest("endpoint")["endpoint_name"] == "small-entra"
    assert not road.called("POST", r"/small-entra/listKeys$")
    assert road.phi3("invoke", "--on", "azure").returncode == 0


def test_secrets_are_nowhere(road: Road) -> None:
    keys = _keys(road)
    secrets = [_key(road), road.rehearsal.env["AZURE_CLIENT_SECRET"], *keys]
    assert len(keys) >= 2
    plain = [secret.encode() for secret in secrets]
    wanted = [*plain, *(base64.b64encode(secret) for secret in plain)]
    folders = [road.laptop.home, road.laptop.work]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    texts = {str(path): path.read_bytes() for path in files}
    texts.update({f"output {i}": text.encode() for i, text in enumerate(road.printed)})

    found = [
        name
        for name, text in texts.items()
        if any(secret in text for secret in wanted) or TOKEN.search(text) or SIGNATURE.search(text)
    ]

    assert len(texts) > 50
    assert found == []


def _key(road: Road) -> str:
    return str(
        json.loads(road.phi3("env", "--run", RUN, "-o", "json", secret=True).stdout)["PHI3_KEY"]
    )


def _keys(road: Road) -> list[str]:
    """The keys of the endpoints and of the storage account, as the rehearsed Azure has them."""
    from phi3_rehearsal.cloud import Cloud
    from phi3_rehearsal.endpoints import KEYS, KIND, key_of
    from phi3_rehearsal.storage import account_key

    cloud = Cloud(road.rehearsal.folder)
    endpoints = cloud.children("/subscriptions", KIND)
    keys = [key_of(cloud, doc, which) for doc in endpoints for which in KEYS]
    place = road.manifest("place")
    return [*keys, account_key(cloud, str(place["storage_account"]))]


def test_down_leaves_nothing_that_bills(road: Road) -> None:
    down = ("down", "--on", "azure", RUN)
    road.rehearsal.fault("DELETE */onlineEndpoints/* slow seconds=3")
    road.kill_at("DELETE", r"/onlineEndpoints/[^/]+$", command=down)
    made = road.run_folder / "azure" / "made.json"
    kinds = [item["kind"] for item in json.loads(made.read_text())["made"]]
    assert kinds.count("endpoint") == 2  # not struck before it is gone
    road.rehearsal.fault("DELETE */onlineEndpoints/* 409 times=1")

    done = road.phi3(*down)

    assert done.returncode == 0, done.stderr
    assert "deleted: endpoint small-entra and its deployments" in done.stdout
    kinds = [item["kind"] for item in json.loads(made.read_text())["made"]]
    assert not {"endpoint", "deployment"} & set(kinds)
    assert "deleted: cluster gpu-cluster" in done.stdout
    found = counts(road)
    assert not found.get(ENDPOINTS)
    assert not found.get(f"{ENDPOINTS}/deployments")
    assert not found.get("workspaces/computes")
    assert not found.get("workspaces/connections")
    assert not found.get("workflows")
    state, place = json.loads(road.phi3("status", "--on", "azure", "-o", "json").stdout)
    assert state["bills"] == place["bills"] == []


def test_up_after_down_serves_again_without_training(road: Road) -> None:
    done = road.up()

    assert done.returncode == 0, done.stderr
    assert re.search(r"finetune .*already done", done.stderr)
    assert len(road.made("jobs")) == 1
    assert "workspaces/computes" not in counts(road)


def test_another_machine_sees_it_and_when_it_ends(road: Road) -> None:
    done = road.phi3("status", "--on", "azure", "--workspace", "phi3-workspace")

    assert done.returncode == 0, done.stderr
    assert re.search(rf"endpoint small-azure-\w+: succeeded, key, owner {RUN}", done.stdout)
    assert re.search(r"deadline 20\S+ \S+ UTC \(in 7 h 5\d min\), then it", done.stdout)
    assert re.search(r"sum: \S+ USD per hour, about \S+ so far .* at most 2[89]\.", done.stdout)


def test_the_deadline_is_moved(road: Road) -> None:
    done = road.phi3("azure", "extend", "4h", "--workspace", "phi3-workspace")  # by tags alone

    assert done.returncode == 0, done.stderr
    assert re.search(r"deadline .* \(in 11 h 5\d min\).*; was .* \(in 7 h 5\d min\)", done.stdout)
    assert road.rehearsal.advance(10 * 3600)["runs"] == []
    assert counts(road)[ENDPOINTS] == 1


def test_at_the_deadline_nothing_is_left_that_bills(road: Road) -> None:
    runs = road.rehearsal.advance(2 * 3600)["runs"]

    assert [run["status"] for run in runs] == ["Succeeded"]
    found = counts(road)
    assert not found.get(ENDPOINTS)
    assert not found.get(f"{ENDPOINTS}/deployments")
    done = road.phi3("down", "--on", "azure", "--workspace", "phi3-workspace", "--yes")
    assert done.returncode == 0, done.stderr
    assert "deleted: deadline of small-azure-" in done.stdout
    assert "still bills: nothing by the hour" in done.stdout


def test_down_all_asks_first_and_leaves_what_is_not_ours(road: Road) -> None:
    refused = road.phi3("down", "--on", "azure", RUN, "--all")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr

    done = road.phi3("down", "--on", "azure", RUN, "--all", "--yes")

    assert done.returncode == 0, done.stderr
    assert "soft-deleted: key vault phi3-kv-" in done.stdout
    assert "still bills: nothing by the hour" in done.stdout
    left = {kind for kind, number in counts(road).items() if number}
    assert not {kind for kind in left if "storage" in kind or "workspaces" in kind}
    plan = road.phi3("plan", "small.yaml", "--on", "azure")
    assert "To do: provision, finetune, evaluate" in plan.stdout.replace("base, ", "")
