"""The parts of the rehearsal that need no network: routes, faults, the component's inputs."""

from __future__ import annotations

import io
import json
import socket
import ssl
import threading
from pathlib import Path

import pytest

pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import control, offers
from phi3_rehearsal.cloud import Cloud, route, router
from phi3_rehearsal.faults import Fault, Faults
from phi3_rehearsal.job_process import JobInput, JobPlan
from phi3_rehearsal.processes import UsageError
from phi3_rehearsal.proxy import Authority, Proxy
from phi3_rehearsal.wire import Reply, Request, asset_id


def request_of(method: str, host: str, target: str) -> Request:
    return Request(method, host, target, {}, b"")


@route("GET", "{name}.unit.test", "/a/{kind:one/x|two}/{rest*}", audience="")
def answer(_cloud: Cloud, _request: Request) -> Reply:
    """A route of this test alone."""
    return Reply()


def test_routes_take_any_case_and_keep_what_was_written() -> None:
    found = router.find(request_of("GET", "me.unit.test", "/A/ONE/x/Some/Thing%20else?q=1"))
    assert found is not None
    assert found[1] == {"name": "me", "kind": "ONE/x", "rest": "Some/Thing else"}
    assert router.find(request_of("PUT", "me.unit.test", "/a/two/b")) is None
    assert router.find(request_of("GET", "me.unit.test", "/a/three/b")) is None
    assert router.find(request_of("GET", "me.other.test", "/a/two/b")) is None


def test_an_id_loses_its_scheme_and_a_registry_address_keeps_it() -> None:
    assert asset_id("azureml:/subscriptions/s") == "/subscriptions/s"
    assert asset_id("azureml://registries/azureml") == "azureml://registries/azureml"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "PUT",
        "PUT */jobs/*",
        "PUT */jobs/* explode",
        "PUT '* 429",
        "PUT * 429 times=many",
        "PUT * 429 when=now",
    ],
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected|is not a fault"):
        Fault.parse(text)


def test_a_fault_is_typed_as_it_is_shown() -> None:
    text = "PUT '*/jobs/*' 429 times=2 retry-after=3 code=Busy 'message=not now'"
    assert Fault.parse(text).as_typed() == text


def test_faults_happen_as_often_as_they_say(tmp_path: Path) -> None:
    faults = Faults(tmp_path / "faults.json")
    faults.add("PUT */computes/* 429 times=2")
    faults.add("PUT */computes/* failed")
    call = request_of("PUT", "management.azure.com", "/a/computes/b")
    other = request_of("GET", "management.azure.com", "/a/computes/b")
    assert faults.of_call(other) is None
    kinds = [fault.kind if fault else None for fault in map(faults.of_call, [call] * 3)]
    assert kinds == ["429", "429", None]
    faults.add("DELETE */computes/* slow seconds=4")
    assert faults.slowness("/a/computes/b", "job") == 0.0
    assert faults.slowness("/a/computes/b", "delete") == 4.0
    assert faults.failure("/a/computes/b", "delete") is None
    assert faults.failure("/a/computes/b", "operations") is not None
    assert faults.failure("/a/computes/b", "operations") is None


def test_the_component_has_the_inputs_of_the_registry() -> None:
    assert len(offers.INPUTS) == 69
    by_type: dict[str, int] = {}
    for item in offers.INPUTS.values():
        by_type[item.kind] = by_type.get(item.kind, 0) + 1
    assert by_type["mlflow_model"] == by_type["custom_model"] == 1
    assert offers.INPUTS["learning_rate"].fault("5e-06") is None
    assert offers.INPUTS["learning_rate"].fault("fast") == "'fast' is not of type number"
    assert offers.INPUTS["apply_lora"].fault("True") is not None  # the enum is lower case
    assert offers.INPUTS["optim"].fault("adamw_hf") is not None
    assert "learning_rate_max" not in offers.INPUTS


def test_secrets_are_sealed_by_the_folder_alone(tmp_path: Path) -> None:
    first, second = Cloud(tmp_path / "a"), Cloud(tmp_path / "b")
    sealed = first.seal({"key": "planted"})
    assert "planted" not in sealed
    assert Cloud(tmp_path / "a").unseal(sealed) == {"key": "planted"}
    assert first.derive("x") != second.derive("x")
    assert first.derive("endpoint", "A") == Cloud(tmp_path / "a").derive("Endpoint", "a")


def test_what_is_shown_of_the_calls(tmp_path: Path) -> None:
    """A poll that repeats once, storage in one line, everything again after a change."""
    account, group = "a.blob.core.windows.net", "/subscriptions/s/resourceGroups/g/providers/X/y"
    arm = "management.azure.com"
    calls = [
        ("GET", arm, group, 200),
        ("GET", arm, group, 200),
        ("PUT", account, "/box/one", 201),
        ("PUT", account, "/box/two", 201),
        ("PUT", arm, f"{group}/z", 201),
        ("GET", arm, group, 200),
    ]
    names = ("method", "host", "path", "status")
    lines = [json.dumps(dict(zip(names, call, strict=True))) + "\n" for call in calls]
    journal = tmp_path / "calls.jsonl"
    ended, out = threading.Event(), io.StringIO()
    follower = threading.Thread(target=control.follow, args=(journal, ended, out))
    follower.start()
    journal.write_text("".join(lines) + '{"half a li')
    ended.set()
    follower.join(30)
    assert out.getvalue().splitlines() == [
        "rehearsal: 200 GET management.azure.com/…/X/y",
        "rehearsal: PUT a.blob.core.windows.net/…",
        "rehearsal: 201 PUT management.azure.com/…/X/y/z",
        "rehearsal: 200 GET management.azure.com/…/X/y",
        "rehearsal: 6 calls answered",
    ]


def test_it_listens_where_it_did_unless_that_is_taken(tmp_path: Path) -> None:
    told = tmp_path / "process.json"
    assert control.last_port(told) == 0
    authority, cloud = Authority(tmp_path), Cloud(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        told.write_text(json.dumps({"pid": 1, "create_time": 1.0, "port": taken}))
        assert control.last_port(told) == taken
        proxy = Proxy(cloud, authority, taken)
        assert proxy.port not in (0, taken)
        proxy.close()


def test_a_restart_presents_certificates_of_the_same_authority(tmp_path: Path) -> None:
    """A program that trusts ca.pem still believes the rehearsal when it has been started again."""
    first = Authority(tmp_path)
    before = first.ca_file.read_bytes()
    again = Authority(tmp_path)
    assert again.ca_file.read_bytes() == before
    client = ssl.create_default_context(cafile=str(first.ca_file))
    ours, theirs = socket.socketpair()
    server = threading.Thread(
        target=lambda: again.context("any.host.test").wrap_socket(theirs, server_side=True).close()
    )
    server.start()
    with client.wrap_socket(ours, server_hostname="any.host.test") as connection:
        assert connection.version() is not None
    server.join(30)


def test_what_a_job_has_to_do_survives_its_file(tmp_path: Path) -> None:
    plan = JobPlan(
        inputs={"data": JobInput(path="/a/b"), "rate": JobInput(literal="0.1")},
        command="echo ${{inputs.rate}}",
        nodes=2,
        failure={"code": "OutOfMemory", "message": "no room"},
    )
    plan.write(tmp_path / "job.json")
    assert JobPlan.read(tmp_path / "job.json") == plan


def test_state_that_is_saved_comes_back(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    made = cloud.put("/subscriptions/s/resourceGroups/Mine", "Microsoft.Resources/x", {"_own": 1})
    operation = cloud.operate(made, by_itself=False)
    cloud.save()
    again = Cloud(tmp_path)
    assert again.need("/SUBSCRIPTIONS/s/resourcegroups/mine")["name"] == "Mine"
    again.finish(operation.name, {"code": "Broken", "message": "it broke"})
    assert made["name"] == "Mine"
    assert again.need(made["id"])["properties"]["provisioningState"] == "Failed"
    assert control.held(tmp_path) == {"x": 1}
