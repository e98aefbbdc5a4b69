"""The process of a rehearsal: what survives it, what it tells, what it never writes down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import Rehearsal, find, run_inside, start, stop
from phi3_training.cli import main
from phi3_training.commands.rehearse import azure_folder as folder_of

GROUP = "/subscriptions/5ab5c817-0000-4000-8000-5ab5c8170000/resourceGroups/rg-kept"
PHI3 = (sys.executable, "-m", "phi3_training.cli")
LOGIN = "https://login.microsoftonline.com"


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    stop(folder_of(tmp_path))


def session(rehearsal: Rehearsal) -> requests.Session:
    """A client that has signed in by hand."""
    env = rehearsal.env
    made = requests.Session()
    made.trust_env = False
    made.proxies = {"https": rehearsal.url}
    made.verify = str(rehearsal.ca_file)
    form = {
        "grant_type": "client_credentials",
        "client_id": env["AZURE_CLIENT_ID"],
        "client_secret": env["AZURE_CLIENT_SECRET"],
        "scope": "https://management.azure.com/.default",
    }
    answer = made.post(f"{LOGIN}/{env['AZURE_TENANT_ID']}/oauth2/v2.0/token", form, timeout=30)
    assert answer.status_code == 200, answer.text
    made.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
    return made


def put_group(rehearsal: Rehearsal) -> int:
    answer = session(rehearsal).put(
        f"https://management.azure.com{GROUP}", json={"location": "eastus"}, timeout=30
    )
    return answer.status_code


def kill(rehearsal: Rehearsal) -> None:
    process = psutil.Process(rehearsal.pid)
    process.kill()
    process.wait(10)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_what_it_knows_survives_it(runs: Path, end: str) -> None:
    folder = folder_of(runs)
    first = start(folder)
    assert put_group(first) == 201
    assert start(folder).pid == first.pid
    if end == "stop":
        assert stop(folder)
    else:
        kill(first)
    assert find(folder) is None
    second = start(folder)
    assert second.pid != first.pid
    assert put_group(second) == 200  # it existed


def call(rehearsal: Rehearsal, method: str, path: str, body: object = None) -> requests.Response:
    url = f"https://management.azure.com{path}"
    return session(rehearsal).request(method, url, json=body, timeout=30)


def test_a_job_outlives_it(runs: Path) -> None:
    first = start(folder_of(runs))
    parts = f"{GROUP}/providers"
    storage = f"{parts}/Microsoft.Storage/storageAccounts/stkept"
    vault = f"{parts}/Microsoft.KeyVault/vaults/kv-kept"
    workspace = f"{parts}/Microsoft.MachineLearningServices/workspaces/ws-kept"
    for path in (GROUP, storage, vault):
        body: dict[str, object] = {"location": "eastus", "properties": {}}
        assert call(first, "PUT", path, body).status_code == 201
    body["properties"] = {"storageAccount": storage, "keyVault": vault}
    assert call(first, "PUT", workspace, body).status_code == 201
    job = {
        "jobType": "Command",
        "command": "until [ -e ../../../../go-on ]; do sleep 0.05; done; echo done",
        "environmentId": "azureml:any:1",
        "resources": {"instanceType": "Standard_NC24ads_A100_v4"},
    }
    path = f"{workspace}/jobs/patient"
    assert call(first, "PUT", path, {"properties": job}).status_code == 201
    kill(first)
    second = start(folder_of(runs))
    deadline = time.monotonic() + 240
    wanted = ["Running", "Completed"]
    while wanted and time.monotonic() < deadline:
        status = call(second, "GET", path).json()["properties"]["status"]
        if status == wanted[0]:
            wanted.pop(0)
            (second.folder / "go-on").touch()
        time.sleep(0.05)
    assert not wanted
    logs = list((second.folder / "blobs").rglob("std_log.txt"))
    assert [log.read_text() for log in logs] == ["done\n"]


def test_only_those_who_trust_its_authority_believe_it(runs: Path) -> None:
    rehearsal = start(folder_of(runs))
    proxies = {"https": rehearsal.url}
    with pytest.raises(requests.exceptions.SSLError):
        requests.get("https://management.azure.com/", proxies=proxies, timeout=30, verify=True)
    assert (rehearsal.folder / "ca.key").stat().st_mode & 0o077 == 0
    assert (rehearsal.folder / "seed").stat().st_mode & 0o077 == 0


def test_no_secret_is_written_down(runs: Path) -> None:
    rehearsal = start(folder_of(runs))
    client = session(rehearsal)
    token = str(client.headers["Authorization"]).split()[1]
    planted = "PlantedKey-0123456789"
    base = f"https://management.azure.com{GROUP}"
    parts = f"{base}/providers"
    body: dict[str, object] = {"location": "eastus", "properties": {}}
    for path in ("", "/providers/Microsoft.Storage/storageAccounts/stkept",
                 "/providers/Microsoft.KeyVault/vaults/kv-kept"):  # fmt: skip
        assert client.put(base + path, json=body, timeout=30).status_code == 201
    ids = {
        "storageAccount": f"{GROUP}/providers/Microsoft.Storage/storageAccounts/stkept",
        "keyVault": f"{GROUP}/providers/Microsoft.KeyVault/vaults/kv-kept",
    }
    workspace = f"{parts}/Microsoft.MachineLearningServices/workspaces/ws-kept"
    body["properties"] = ids
    assert client.put(workspace, json=body, timeout=30).status_code == 201
    properties = {
        "authType": "CustomKeys",
        "category": "CustomKeys",
        "target": "_",
        "credentials": {"keys": {"key": planted}},
    }
    connection = f"{workspace}/connections/phi3"
    assert client.put(connection, json={"properties": properties}, timeout=30).ok
    assert planted not in client.get(connection, timeout=30).text
    told = client.post(f"{connection}/listsecrets", timeout=30).json()
    assert told["properties"]["credentials"] == {"keys": {"key": planted}}
    store = f"{workspace}/datastores/workspaceblobstore/listSecrets"
    sas = client.post(store, json={"expirableSecret": True}, timeout=30).json()["sasToken"]
    blob = f"https://stkept.blob.core.windows.net/box/a.txt?{sas}"
    assert requests.put(
        blob,
        data=b"x",
        headers={"x-ms-blob-type": "BlockBlob"},
        proxies=client.proxies,
        verify=str(rehearsal.ca_file),
        timeout=30,
    ).status_code == 201  # fmt: skip
    signature = sas.split("sig=")[1]
    secrets = [planted, token, signature, rehearsal.env["AZURE_CLIENT_SECRET"]]
    for path in rehearsal.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [s for s in secrets if s.encode() in content], path
    assert rehearsal.env["AZURE_CLIENT_SECRET"] not in repr(rehearsal)


def test_a_command_runs_inside(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The child has the variables; its exit status is handed on."""
    assert run_inside([*PHI3, "recipes", "-o", "json"], folder_of(runs)) == 0
    assert "phi3-tiny.yaml" in capfd.readouterr().out
    assert run_inside([*PHI3, "no-such-command"], folder_of(runs)) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's own")
def test_a_killed_command_takes_its_other_half_along() -> None:
    script = (
        "import subprocess, sys\n"
        "from phi3_rehearsal.control import ends_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],\n"
        "                         preexec_fn=ends_with_parent())\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    command = [sys.executable, "-c", script]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(30)
    parent.stdout.close()
    gone, _alive = psutil.wait_procs([child], 30)
    assert gone == [child]


def test_the_variables_lead_a_program_there(runs: Path) -> None:
    rehearsal = start(folder_of(runs))
    script = (
        "import requests; r = requests.get('https://management.azure.com/anything'); "
        "print(r.status_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **rehearsal.env},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "501"
    last = rehearsal.calls()[-1]
    assert (last["method"], last["path"], last["status"]) == ("GET", "/anything", 501)


def test_the_commands(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--runs", str(runs), "-o", "json"]
    assert main(["rehearse", "start", *own]) == 0
    started = json.loads(capsys.readouterr().out)
    assert started["state"] == "running"
    assert main(["rehearse", "fault", "PUT */jobs/* 429 retry-after=1 times=2", *own]) == 0
    assert json.loads(capsys.readouterr().out) == ["PUT '*/jobs/*' 429 times=2 retry-after=1"]
    assert main(["rehearse", "fault", "PUT */jobs/* broken", *own]) == 2
    assert "is not a fault" in capsys.readouterr().err
    assert main(["rehearse", "env", *own]) == 0
    assert json.loads(capsys.readouterr().out)["HTTPS_PROXY"] == started["proxy"]
    found = find(folder_of(runs))
    assert found is not None
    assert put_group(found) == 201
    assert main(["rehearse", "calls", *own]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["status"] == 201
    assert main(["rehearse", "stop", *own]) == 0
    capsys.readouterr()
    assert main(["rehearse", "status", *own]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["resources"]) == ("stopped", {"resourceGroups": 1})
    assert main(["rehearse", "env", *own]) == 2
    assert main(["rehearse", "stop", "--forget", *own]) == 0
    assert not folder_of(runs).exists()
