"""Jobs of the rehearsed Azure run for real, through the unmodified SDK."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.integration.rehearsal_fixture import A100, GROUP, REGION, WORKSPACE, Azure
from tests.integration.server_fixture import PAIRS, score_body

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.ai.ml import Input, MLClient, Output, command, dsl
from azure.ai.ml.entities import (
    AmlCompute,
    Environment,
    JobResourceConfiguration,
    ManagedOnlineDeployment,
    ManagedOnlineEndpoint,
    Model,
    OnlineRequestSettings,
)
from azure.ai.ml.exceptions import JobException
from azure.core.exceptions import HttpResponseError

from phi3_training.recipe.azure import AzureSection, PollSection
from phi3_training.run import Run
from phi3_training.targets.azure.clients import Clients
from phi3_training.targets.azure.jobs import follow_job
from phi3_training.targets.azure.place import find_place

pytest_plugins = (
    "tests.integration.server_plugin",
    "tests.integration.rehearsal_plugin",
)
IMAGE = Environment(image="mcr.microsoft.com/azureml/any:1")
SCRIPT = """
import os, pathlib, sys
print("read", pathlib.Path(sys.argv[1], "words.txt").read_text(), os.environ["AZUREML_RUN_ID"])
print("cloud variables:", [name for name in os.environ if name.startswith("AZURE_")])
target = pathlib.Path(sys.argv[2])
target.mkdir(parents=True, exist_ok=True)
(target / "MLmodel").write_text("flavors: {}\\n")
"""


@pytest.fixture(scope="module")
def ml(azure: Azure) -> MLClient:
    client = azure.ml()
    cluster = AmlCompute(name="gpu", size=A100, min_instances=0, max_instances=1)
    client.compute.begin_create_or_update(cluster).result()
    return client


def run(ml: MLClient, name: str, text: str, **more: Any) -> Any:
    more.setdefault("compute", "gpu")
    return ml.jobs.create_or_update(command(name=name, command=text, environment=IMAGE, **more))


def log_of(ml: MLClient, name: str, folder: Path, log: str = "std_log.txt") -> str:
    """The log of a job that has ended: `stream` shows only what comes while it looks."""
    while ml.jobs.get(name).status not in ("Completed", "Failed", "Canceled"):
        time.sleep(0.1)
    ml.jobs.download(name, download_path=folder / name)
    return (folder / name / "artifacts" / "user_logs" / log).read_text()


def test_a_job_is_watched(azure: Azure, ml: MLClient, capsys: pytest.CaptureFixture[str]) -> None:
    azure.rehearsal.fault("PUT */jobs/job-watched slow seconds=5")
    run(ml, "job-watched", "echo words for those who watch")
    ml.jobs.stream("job-watched")
    assert "words for those who watch" in capsys.readouterr().out


def test_a_command_job_reads_writes_and_logs(azure: Azure, ml: MLClient, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_text("hello cloud")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "go.py").write_text(SCRIPT)
    place = "azureml://datastores/workspaceblobstore/paths/mine/model"
    parts: dict[str, Any] = {
        "code": str(tmp_path / "code"),
        "inputs": {"data": Input(type="uri_folder", path=str(tmp_path / "data"))},
        "outputs": {"model": Output(type="mlflow_model", path=place)},
    }
    text = "python go.py ${{inputs.data}} ${{outputs.model}}"
    run(ml, "job-a", text, **parts)
    assert run(ml, "job-a", text, **parts).name == "job-a"  # an answer was lost: no second job
    shown = log_of(ml, "job-a", tmp_path)
    assert "read hello cloud job-a" in shown
    assert "cloud variables: []" in shown
    assert ml.jobs.get("job-a").status == "Completed"
    assert [job.name for job in ml.jobs.list()].count("job-a") == 1
    wanted = {"path": "azureml://jobs/job-a/outputs/model", "type": "mlflow_model"}
    first = ml.models.create_or_update(Model(name="from-job", tags={"a": "b"}, **wanted))
    second = ml.models.create_or_update(Model(name="from-job", **wanted))
    assert (first.version, second.version, first.tags) == ("1", "2", {"a": "b"})
    assert ml.models.get("from-job", label="latest").version == "2"
    other = {"modelUri": place.replace("mine", "yours"), "modelType": "mlflow_model"}
    version = f"{azure.workspace}/models/from-job/versions/1"
    assert azure.call("PUT", version, {"properties": other}).status_code == 409
    ml.models.archive("from-job", "1")
    assert [model.version for model in ml.models.list("from-job")] == ["2"]
    with pytest.raises(HttpResponseError, match="NoMatchingArtifacts"):
        ml.models.create_or_update(Model(name="none", path=place.replace("mine", "nobodys")))


def test_a_log_is_followed_without_the_key_of_its_store(
    azure: Azure, ml: MLClient, tmp_path: Path
) -> None:
    azure.rehearsal.fault("POST */workspaceartifactstore/listSecrets 403 times=2")
    name = "job-keyless"
    azure.rehearsal.fault(f"PUT */jobs/{name} slow seconds=2")
    run(ml, name, "echo the words of a job")
    section = AzureSection(
        subscription_id=azure.subscription, resource_group=GROUP, workspace_name=WORKSPACE,
        location=REGION,
    )  # fmt: skip
    poll = PollSection(interval=0.2, job_interval=0.3, retry_total=0)
    clients = Clients(find_place(section, {}, tmp_path), poll, azure.credential)
    mine = Run.open(tmp_path / "run")
    job = follow_job(clients, mine, "train", name, lambda _d, _t, _w: None, limit=120)
    assert job.status == "Completed"
    assert "the words of a job" in (mine.path / "azure" / "train.log").read_text()


def test_a_job_that_fails_says_why(ml: MLClient, tmp_path: Path) -> None:
    run(ml, "job-fails", "echo before; exit 3")
    assert "before" in log_of(ml, "job-fails", tmp_path)
    with pytest.raises(JobException, match="status code 3"):
        ml.jobs.stream("job-fails")
    assert ml.jobs.get("job-fails").status == "Failed"


def test_a_running_job_holds_its_cores_until_it_is_cancelled(ml: MLClient) -> None:
    run(ml, "job-long", "sleep 600")
    usage = {
        item.name["value"]: item.current_value for item in ml.compute.list_usage(location="eastus")
    }
    assert usage["standardNCADSA100v4Family"] >= 24
    ml.jobs.begin_cancel("job-long").result()
    assert ml.jobs.get("job-long").status == "Canceled"


def test_every_process_of_a_job_has_its_rank(ml: MLClient, tmp_path: Path) -> None:
    resources = JobResourceConfiguration(instance_count=2, instance_type="Standard_NC48ads_A100_v4")
    run(
        ml,
        "job-wide",
        "echo rank $RANK of $WORLD_SIZE on node $NODE_RANK at $MASTER_ADDR",
        compute=None,
        resources=resources,
        distribution={"type": "pytorch", "process_count_per_instance": 2},
    )
    text = log_of(ml, "job-wide", tmp_path, "std_log_process_03.txt")
    assert text == "rank 3 of 4 on node 1 at 127.0.0.1\n"


def test_a_command_may_not_name_what_is_not_there(azure: Azure, ml: MLClient) -> None:
    body = {
        "properties": {
            "jobType": "Command",
            "command": "echo ${{inputs.nothing}}",
            "environmentId": "azureml:any:1",
            "computeId": f"{azure.workspace}/computes/gpu",
        }
    }
    refused = azure.call("PUT", f"{azure.workspace}/jobs/job-b", body)
    assert refused.status_code == 400
    assert "inputs.nothing" in refused.text
    body["properties"] |= {"command": "true", "computeId": f"{azure.workspace}/computes/none"}
    assert "'none' was not found" in azure.call("PUT", f"{azure.workspace}/jobs/job-b", body).text
    assert azure.call("GET", f"{azure.workspace}/jobs/job-b").status_code == 404


def chats(path: Path, pairs: list[tuple[str, str]]) -> Input:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Input(type="uri_file", path=str(path))


def pipeline_of(azure: Azure, tmp_path: Path, model: tuple[str, str], **inputs: Any) -> Any:
    registry = MLClient(azure.credential, registry_name="azureml")
    component = registry.components.get("chat_completion_pipeline", label="latest")
    found = registry.models.get(model[0], version=model[1])
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"

    @dsl.pipeline()
    def tune() -> Any:
        step = component(
            mlflow_model_path=found.id,
            compute_model_import="gpu",
            compute_preprocess="gpu",
            compute_finetune="gpu",
            train_file_path=chats(train, PAIRS[:12]),
            validation_file_path=chats(held_out, PAIRS[12:16]),
            **inputs,
        )
        return {"trained_model": step.outputs.mlflow_model_folder}

    return tune()


def test_the_pipeline_refuses_what_the_component_does_not_take(
    azure: Azure, ml: MLClient, tmp_path: Path
) -> None:
    live, archived = ("Phi-4-mini-instruct", "1"), ("Phi-3-mini-4k-instruct", "15")
    for model, inputs, words in (
        (live, {"precision": 17, "learning_rate": "fast"}, ["precision", "learning_rate"]),
        (live, {"number_of_gpu_to_use_finetuning": 4}, ["4 GPUs"]),
        (archived, {}, ["archived"]),
    ):
        job = pipeline_of(azure, tmp_path, model, **inputs)
        with pytest.raises(HttpResponseError) as caught:
            ml.jobs.create_or_update(job)
        assert all(word in str(caught.value) for word in words)
    unknown = pipeline_of(azure, tmp_path, live)
    body = {"properties": unknown._to_rest_object().properties.serialize()}
    answer = azure.call("PUT", f"{azure.workspace}/jobs/job-c", body)
    assert answer.status_code == 401  # the SDK sends the user's token along; a bare call has none


def test_a_pipeline_trains_and_its_model_is_served(
    azure: Azure, ml: MLClient, tmp_path: Path
) -> None:
    """Fine-tune, register, deploy, smoke test, traffic, score: all of it real."""
    job = pipeline_of(
        azure,
        tmp_path,
        ("Phi-4-mini-instruct", "1"),
        apply_lora="true",
        learning_rate=1e-4,
        num_train_epochs=1,
    )
    name = ml.jobs.create_or_update(job).name
    ml.jobs.stream(name)
    assert ml.jobs.get(name).status == "Completed"
    tuned = ml.models.create_or_update(
        Model(
            name="tuned", path=f"azureml://jobs/{name}/outputs/trained_model", type="mlflow_model"
        )
    )
    ml.online_endpoints.begin_create_or_update(
        ManagedOnlineEndpoint(name="chat-tests", auth_mode="key")
    ).result()
    blue = ManagedOnlineDeployment(
        name="blue",
        endpoint_name="chat-tests",
        model=tuned.id,
        instance_type=A100,
        instance_count=1,
        request_settings=OnlineRequestSettings(request_timeout_ms=90_000),
    )
    assert ml.online_deployments.begin_create_or_update(blue).result().provisioning_state == (
        "Succeeded"
    )
    endpoint = ml.online_endpoints.get("chat-tests")
    assert endpoint.scoring_uri == "https://chat-tests.eastus.inference.ml.azure.com/score"
    key = ml.online_endpoints.get_keys("chat-tests").primary_key
    question, answer = PAIRS[0]

    def ask(bearer: str, **headers: str) -> requests.Response:
        every = {"Authorization": f"Bearer {bearer}", **headers}
        body = score_body(question, max_new_tokens=40)
        return requests.post(endpoint.scoring_uri, json=body, headers=every, timeout=60)

    forced = {"azureml-model-deployment": "blue"}
    assert ask(key).status_code == 404  # no traffic yet
    assert ask("wrong", **forced).status_code == 401
    assert ask(key, **forced).json() == {"output": answer}
    assert ask(key, **{"azureml-model-deployment": "green"}).status_code == 404
    endpoint.traffic = {"green": 100}
    with pytest.raises(HttpResponseError, match="does not exist"):
        ml.online_endpoints.begin_create_or_update(endpoint).result()
    endpoint.traffic = {"blue": 100}
    ml.online_endpoints.begin_create_or_update(endpoint).result()
    assert ask(key).headers["azureml-model-deployment"] == "blue"
    with pytest.raises(HttpResponseError, match="100 % of the traffic"):
        ml.online_deployments.begin_delete("blue", "chat-tests").result()
    assert "engine ready" in ml.online_deployments.get_logs("blue", "chat-tests", lines=50)
    ml.online_endpoints.begin_delete("chat-tests").result()
    with pytest.raises(requests.HTTPError, match="404"):
        ask(key).raise_for_status()
