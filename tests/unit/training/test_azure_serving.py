"""Names, traffic rules, receipts, prices, places: what serving on Azure decides by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from phi3_training.errors import MissingExtraError, StageError, UsageError
from phi3_training.recipe.azure import AzureSection
from phi3_training.run import Run
from phi3_training.targets import target_of
from phi3_training.targets.azure.deploy import refuse_no_answer
from phi3_training.targets.azure.place import (
    VARIABLES,
    RunResource,
    deployment_name,
    endpoint_name,
    forget,
    place_of,
    record,
    recorded_resources,
    settle,
)
from phi3_training.targets.azure.status import model_label
from phi3_training.targets.azure.target import refuse_without_extra
from phi3_training.targets.azure.teardown import Receipt
from phi3_training.targets.azure.traffic import DeploymentId

from .azure_wire import SUBSCRIPTION, place

RULE = re.compile(r"(?=.{3,32}$)[A-Za-z](-?[A-Za-z0-9])+")
GPU = "Standard_NC24ads_A100_v4"


def section(**values: Any) -> AzureSection:
    return AzureSection.model_validate(values)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "my-run")


@pytest.mark.parametrize(
    "name", ["my-run", "a", "9lives", "x" * 60, "a_b..c", "-".join("abcdefgh" * 4)]
)
def test_endpoint_names_follow_azures_rule(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path / name)
    made = endpoint_name(section(), place(tmp_path), run)

    assert RULE.fullmatch(made)
    assert made == endpoint_name(section(), place(tmp_path), run)
    other = place(tmp_path, workspace_name="another-one")
    assert made != endpoint_name(section(), other, run)
    assert endpoint_name(section(endpoint={"name": "mine"}), place(tmp_path), run) == "mine"


def test_a_deployments_name_changes_with_model_and_settings() -> None:
    first = ("phi3", "1")
    plain = deployment_name(section(), *first)

    assert RULE.fullmatch(plain)
    assert plain.startswith("v1-")
    assert plain == deployment_name(section(endpoint={"keep_deployments": 5}), *first)
    assert plain != deployment_name(section(endpoint={"instance_count": 2}), *first)
    assert deployment_name(section(), "phi3", "2").startswith("v2-")
    long = deployment_name(section(), "phi3", "2026.11.21-candidate-of-noon")
    assert RULE.fullmatch(long)


def test_receipt_in_the_order_of_what_matters() -> None:
    receipt = Receipt(
        cancelled=["cancelled the job j"],
        deleted=["endpoint ep"],
        left_alone=["cluster c: phi3 did not create it"],
        soft_deleted=["key vault kv: kept for 90 days"],
        failed=["connection x: no"],
    )

    assert receipt.lines(["deployment d"]) == [
        "cancelled the job j",
        "deleted: endpoint ep",
        "left alone: cluster c: phi3 did not create it",
        "soft-deleted: key vault kv: kept for 90 days",
        "FAILED: connection x: no",
        "still bills: deployment d",
    ]
    assert Receipt().lines([]) == [
        "deleted: nothing (nothing existed)",
        "still bills: nothing by the hour",
    ]


def test_names_of_models_in_ids() -> None:
    arm = "/subscriptions/s/resourceGroups/g/providers/x/workspaces/w/models/phi3/versions/7"
    assert model_label(arm) == "phi3:7"
    assert model_label("azureml:phi3:7") == "phi3:7"
    assert model_label(None) == ""


def test_what_was_made_is_noted_once_and_struck(run: Run) -> None:
    endpoint, deployment = RunResource("endpoint", "ep"), RunResource("deployment", "d", "ep")
    for made in (endpoint, deployment, endpoint):
        record(run, made)
    record(run, RunResource("connection", "c", "ws"))

    assert recorded_resources(run, "endpoint") == [endpoint]
    forget(run, endpoint)

    assert recorded_resources(run) == [RunResource("connection", "c", "ws")]


def test_a_run_stays_where_it_began(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(run.path)
    monkeypatch.setenv("AZURE_SUBSCRIPTION_ID", SUBSCRIPTION)
    first = settle(section(workspace_name="here"), run)
    assert target_of(run) == "azure"
    assert "secret" not in (run.path / "place.json").read_text().lower()

    monkeypatch.delenv("AZURE_SUBSCRIPTION_ID")
    assert settle(section(), run).workspace_id() == first.workspace_id()
    assert place_of(run).storage_account == first.storage_account
    with pytest.raises(UsageError, match=r"workspace_name there \(the recipe\) instead of here"):
        settle(section(workspace_name="there"), run)
    monkeypatch.setenv("AZURE_SUBSCRIPTION_ID", SUBSCRIPTION.replace("0", "9"))
    with pytest.raises(UsageError, match="lives elsewhere"):
        settle(section(workspace_name="here"), run)


def test_without_the_extra_it_is_named() -> None:
    refuse_without_extra()
    for missing in ("azure.not_there_at_all", "no_such_parent.azure"):
        with pytest.raises(MissingExtraError, match=r'pip install "phi3-promptflow\[azure\]"'):
            refuse_without_extra((missing,))


@pytest.mark.parametrize("text", ["", "  \n", "\ufffd\ufffd\x00", "good\x00bad", "...!!!"])
def test_an_empty_or_garbled_answer_gets_no_traffic(text: str) -> None:
    with pytest.raises(StageError, match="gets no traffic"):
        refuse_no_answer(DeploymentId("ep", "new"), text)


@pytest.mark.parametrize(
    "text", ["Paris.", "東京です。\nほかに？", "42", "Yes \U0001f468\u200d\U0001f469"]
)
def test_text_in_any_language_is_an_answer(text: str) -> None:
    refuse_no_answer(DeploymentId("ep", "new"), text)
