"""The `azure:` section: names by Azure's rules, all faults at once, and where values are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from phi3_training.errors import RecipeError, UsageError
from phi3_training.recipe import azure_section_of
from phi3_training.recipe.azure import AzureSection
from phi3_training.targets.azure.place import find_place

SUBSCRIPTION = "00000000-1111-2222-3333-444444444444"

GOOD = {
    "subscription_id": [SUBSCRIPTION],
    "resource_group": ["a", "my_group.(1)", "x" * 90],
    "workspace_name": ["abc", "a-b_c", "x" * 33],
    "location": ["eastus", "East US 2"],
    "storage_account": ["abc", "a1b2c3d4e5f6g7h8i9j0k1l2"],
    "key_vault": ["abc", "a-b-c", "x" * 24],
    "container_registry": ["abcde", "x" * 50],
    "identity": ["abc", "a_b-c"],
    "hub": ["my-hub"],
}
BAD = {
    "subscription_id": ["mine", SUBSCRIPTION[:-1]],
    "resource_group": ["", "ends.", "x" * 91, "a/b"],
    "workspace_name": ["ab", "-abc", "x" * 34, "a b"],
    "location": ["east-us", "é"],
    "storage_account": ["ab", "Abc", "a-b", "x" * 25],
    "key_vault": ["1abc", "a--b", "abc-", "x" * 25],
    "container_registry": ["abcd", "a-bcd", "x" * 51],
    "identity": ["ab", "-abc"],
    "hub": ["x" * 34],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in GOOD.items() for v in vs])
def test_a_name_azure_takes(key: str, value: str) -> None:
    assert getattr(AzureSection.model_validate({key: value}), key)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_a_name_azure_refuses(key: str, value: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AzureSection.model_validate({key: value})
    assert [item["loc"][0] for item in caught.value.errors()] == [key]


@pytest.mark.parametrize("name", ["ab", "1abc", "a--b", "abc-", "a_b", "x" * 33])
def test_an_endpoint_or_cluster_name_azure_refuses(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AzureSection.model_validate({"endpoint": {"name": name}, "compute": {"name": "-" + name}})
    assert {item["loc"][:2] for item in caught.value.errors()} == {
        ("endpoint", "name"),
        ("compute", "name"),
    }


def test_every_fault_is_reported_at_once_and_a_location_loses_its_spaces() -> None:
    assert AzureSection(location="West Europe").location == "westeurope"
    wrong = {"location": "!", "hub": "x", "endpoint": {"request_timeout_ms": 999_999}, "key": "k"}
    with pytest.raises(ValidationError) as caught:
        AzureSection.model_validate(wrong)
    assert len(caught.value.errors()) == 4


def test_more_machines_than_the_cluster_has_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"compute\.max_instances is 1"):
        AzureSection.model_validate({"train": {"instance_count": 2}})


def test_recipe_before_environment_before_config_before_default(tmp_path: Path) -> None:
    config = {
        "subscription_id": SUBSCRIPTION,
        "resource_group": "from-config",
        "workspace_name": "config-ws",
    }
    inner = tmp_path / "deep" / "er"
    inner.mkdir(parents=True)
    (tmp_path / ".azureml").mkdir()
    (tmp_path / ".azureml" / "config.json").write_text(json.dumps(config))
    environment = {"AZURE_RESOURCE_GROUP": "from-env", "AZUREML_ARM_WORKSPACE_NAME": "env-ws"}
    section = AzureSection(workspace_name="recipe-ws")
    found = find_place(section, environment, inner)
    assert found.workspace_name == "recipe-ws"
    assert found.resource_group == "from-env"
    assert found.subscription_id == SUBSCRIPTION
    assert found.location == "eastus"
    assert found.sources["resource_group"] == "$AZURE_RESOURCE_GROUP"
    assert found.sources["subscription_id"].endswith("config.json")
    assert found.sources["location"] == "default"


def test_a_config_json_of_the_old_kind_and_one_of_a_model(tmp_path: Path) -> None:
    scope = (
        f"/subscriptions/{SUBSCRIPTION}/resourceGroups/old-group/providers/"
        "Microsoft.MachineLearningServices/workspaces/old-ws"
    )
    (tmp_path / "config.json").write_text(json.dumps({"Scope": scope}))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["Phi3ForCausalLM"]}))
    found = find_place(AzureSection(), {}, model)
    assert (found.resource_group, found.workspace_name) == ("old-group", "old-ws")


def test_faults_of_the_environment_are_reported_with_where_they_are_from(tmp_path: Path) -> None:
    environment = {"AZURE_RESOURCE_GROUP": "ends.", "AZURE_LOCATION": "east-us"}
    with pytest.raises(RecipeError) as caught:
        find_place(AzureSection(), environment, tmp_path)
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 3
    assert "subscription_id: missing" in faults
    assert "$AZURE_RESOURCE_GROUP" in faults
    assert "$AZURE_LOCATION" in faults


def test_names_made_from_others_fit_and_stay_the_same(tmp_path: Path) -> None:
    section = AzureSection(subscription_id=SUBSCRIPTION, workspace_name="w_" + "x" * 31)
    first = find_place(section, {}, tmp_path)
    again = find_place(section, {}, tmp_path)
    assert first == again
    made = {
        key: getattr(first, key)
        for key in (
            *("storage_account", "key_vault", "application_insights", "log_analytics"),
            *("container_registry", "identity", "hub", "project"),
        )
    }
    AzureSection.model_validate(made)  # each is one that Azure takes
    other = find_place(section.model_copy(update={"resource_group": "other"}), {}, tmp_path)
    assert other.storage_account != first.storage_account


def test_a_place_typed_on_the_command_line_is_checked_as_a_recipes_is() -> None:
    with pytest.raises(UsageError) as caught:
        azure_section_of({"workspace_name": "x!", "lokation": "eastus"})
    first, second = str(caught.value).splitlines()
    assert first.startswith("azure.workspace_name: expected 3-33 letters")
    assert "azure.lokation: unknown key; did you mean azure.location?" in second
