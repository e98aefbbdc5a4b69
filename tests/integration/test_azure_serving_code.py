"""What a deployment uploads: it answers by itself, and its body is what Azure is to be sent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from tests.integration.server_fixture import Taught, question_and_answer

from phi3_training.recipe.azure import AzureSection
from phi3_training.run import Run
from phi3_training.targets.azure.deploy import (
    SCRIPT,
    ServedModel,
    code_folder,
    deployment_entity,
)
from phi3_training.targets.azure.traffic import DeploymentId

pytest_plugins = ("tests.integration.server_plugin",)

# As Azure's inference server does: init() once, then run() with each body.
CALLS = """
import json, sys
import score
score.init()
for line in sys.stdin:
    print(json.dumps(score.run(line)))
import phi3_training
print(phi3_training.__file__)
"""
TARGET = DeploymentId("ep", "v2-abc")


def body(question: str) -> str:
    message = {"role": "user", "content": question}
    parameters = {"temperature": 0, "max_new_tokens": 40}
    return json.dumps({"input_data": {"input_string": [message], "parameters": parameters}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "r")


def test_the_uploaded_code_answers_by_itself(run: Run, taught: Taught, tmp_path: Path) -> None:
    """Nothing of this clone is on its path; the model lies inside an MLflow folder."""
    code = code_folder(run)
    model = tmp_path / "registered" / "2"
    shutil.copytree(taught.model_dir, model / "artifacts" / "model")
    (model / "MLmodel").write_text("flavors: {}\n")
    question, answer = question_and_answer(3)

    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        input="\n".join([body(question), "{", body(question)]),
        cwd=code,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": str(code),
            "AZUREML_MODEL_DIR": str(model),
            "PHI3_CONCURRENCY": "2",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    first, refused, again, package = done.stdout.splitlines()
    assert json.loads(first)["output"].strip() == answer
    assert json.loads(first)["finish_reason"] == "stop"
    assert json.loads(refused)["error"]["status_code"] == 400
    assert json.loads(again)["output"] == json.loads(first)["output"]
    assert package == str(code / "phi3_training" / "__init__.py")


def test_the_code_holds_no_more_than_serving_needs(run: Run) -> None:
    code = code_folder(run)
    names = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}

    assert {SCRIPT, "phi3_training/serve/azure_score.py", "phi3_training/prompt.py"} <= names
    assert not [name for name in names if "__pycache__" in name or "/targets/" in name]
    assert code_folder(run) == code  # written again, the same


def test_the_exact_body_of_a_deployment(run: Run) -> None:
    section = AzureSection.model_validate({"endpoint": {"instance_count": 2}, "tags": {"a": "b"}})
    made = deployment_entity(section, run, TARGET, ServedModel("phi3", "2", "job"))
    made.code_configuration, made.environment = None, None  # uploads make ids of these

    rest = made._to_rest_object(location="eastus").serialize()

    probe = {"period": "PT10S", "timeout": "PT10S", "successThreshold": 1}
    assert rest == {
        "location": "eastus",
        "tags": {"a": "b", "phi3_run": "r"},
        "sku": {"name": "Default", "capacity": 2},
        "properties": {
            "endpointComputeType": "Managed",
            "model": "azureml:phi3:2",
            "instanceType": "Standard_NC24ads_A100_v4",
            "appInsightsEnabled": False,
            "requestSettings": {
                "requestTimeout": "PT1M30S",
                "maxConcurrentRequestsPerInstance": 8,
            },
            "livenessProbe": {**probe, "initialDelay": "PT10M", "failureThreshold": 30},
            "readinessProbe": {**probe, "initialDelay": "PT30S", "failureThreshold": 90},
            "environmentVariables": {"PHI3_CONCURRENCY": "8", "WORKER_TIMEOUT": "120"},
            "properties": {},
        },
    }


def test_a_model_of_the_pipeline_is_served_by_azures_image(run: Run) -> None:
    made = deployment_entity(AzureSection(), run, TARGET, ServedModel("phi3", "2", "pipeline"))

    assert (made.code_configuration, made.environment) == (None, None)
    assert not made.environment_variables
