"""What is sent to the catalogue's pipeline: only inputs it has, in their types; names as shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")


from phi3_training.errors import StageError
from phi3_training.recipe import Recipe
from phi3_training.targets.azure.pipeline_job import (
    SIZES,
    TUTORIAL,
    FoundationModel,
    PreparedPipeline,
    display_name,
    fitted,
    foundation_model,
    merge_parameters,
    parse_defaults,
    pipeline_inputs,
)

from ...component_inputs import INPUTS

# As the tag model_specific_defaults of Phi-3-mini-4k-instruct has been since February 2025.
DEFAULTS = (
    "{'apply_lora': 'true', 'apply_deepspeed': 'true', 'deepspeed_stage': 2, 'apply_ort': "
    "'false', 'precision': 16, 'ignore_mismatched_sizes': 'false', 'num_train_epochs': 1, "
    "'per_device_train_batch_size': 1, 'per_device_eval_batch_size': 1, "
    "'gradient_accumulation_steps': 1, 'learning_rate': 5e-06, 'learning_rate_min': 5e-07, "
    "'learning_rate_max': 5e-05, 'lr_scheduler_type': 'cosine', 'logging_strategy': 'steps', "
    "'logging_steps': 10, 'save_total_limit': 1}"
)


def test_there_are_as_many_inputs_as_the_component_has() -> None:
    assert len(INPUTS) == 69


def test_the_models_defaults_win_over_the_tutorial_and_the_recipe_over_both() -> None:
    found = merge_parameters(
        parse_defaults(DEFAULTS, "Phi-3"), {"lora_r": 16, "num_train_epochs": 2}, INPUTS
    )
    assert found.values["num_train_epochs"] == 2
    assert found.sources["num_train_epochs"] == "azure.train.parameters"
    assert found.sources["learning_rate"] == "the model's own default"
    assert found.values["lora_r"] == 16
    assert merge_parameters({}, {}, INPUTS).values == {**TUTORIAL, "deepspeed_stage": "2"}


def test_what_the_component_does_not_take_is_left_out_and_reported() -> None:
    found = merge_parameters(parse_defaults(DEFAULTS, "Phi-3"), {}, INPUTS)
    assert found.dropped == ("learning_rate_min", "learning_rate_max")
    assert found.values.keys() <= INPUTS.keys()
    assert any("learning_rate_min" in line for line in found.lines())


def test_wrong_parameters_of_the_recipe_are_refused_all_at_once() -> None:
    given = {"lora_rank": 8, "precision": 8, "num_train_epochs": 1.5, "train_file_path": "x"}
    with pytest.raises(StageError) as caught:
        merge_parameters({}, given, INPUTS)
    said = str(caught.value)
    for name in given:
        assert name in said
    assert "lora_r" in said  # what was meant


@pytest.mark.parametrize(
    ("name", "given", "sent"),
    [
        ("precision", 16, "16"),
        ("deepspeed_stage", 2, "2"),
        ("apply_lora", True, "true"),
        ("apply_lora", "false", "false"),
        ("num_train_epochs", "3", 3),
        ("learning_rate", "5e-6", 5e-6),
        ("shm_size_finetune", "16g", "16g"),
    ],
)
def test_a_value_in_the_inputs_type(name: str, given: Any, sent: Any) -> None:
    made = fitted(given, INPUTS[name])
    assert (made, type(made)) == (sent, type(sent))


@pytest.mark.parametrize(
    ("name", "given"),
    [("precision", 8), ("num_train_epochs", 1.5), ("lora_r", True), ("num_nodes_finetune", 0)],
)
def test_a_value_that_is_none_of_the_inputs(name: str, given: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        fitted(given, INPUTS[name])


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('true')", "[1, 2]", "{'a': [1]}", "{1: 2}", "{'a'", "(" * 5000],
)
def test_defaults_are_read_as_values_and_never_run(text: str) -> None:
    with pytest.raises(StageError, match="plain dictionary"):
        parse_defaults(text, "Phi-3")


def test_the_name_that_the_tutorial_shows() -> None:
    values = merge_parameters(parse_defaults(DEFAULTS, "Phi-3"), {}, INPUTS).values
    shown = display_name("Phi-3-mini-4k-instruct", "ultrachat", values, gpus=2, nodes=1)
    assert shown == ("Phi-3-mini-4k-instruct-ultrachat-bs2-cosine-ds2-lora-save_limit1-seqlen-1")
    plain = display_name("m", "d", {}, gpus=1, nodes=1)
    assert plain == "m-d-bs1-linear-nods-nolora-save_limit-1-seqlen-1"


def test_every_input_that_is_sent_exists_with_that_type() -> None:
    foundation = FoundationModel("Phi-4", "8", "azureml://registries/azureml/x", None, "", {}, None)
    component = SimpleNamespace(inputs=INPUTS)
    parameters = merge_parameters(parse_defaults(DEFAULTS, "Phi-4"), {"lora_r": 4}, INPUTS)
    prepared = PreparedPipeline(component, parameters, 2, "shown")
    recipe = Recipe.model_validate(
        {"name": "mine", "model": {"name_or_path": "org/Phi"}, "data": {"train": ["x"]}}
    )
    chats = {part: f"azureml://datastores/s/paths/{part}" for part in ("train", "validation")}
    sent = pipeline_inputs(recipe, foundation, prepared, chats)
    for name, value in sent.items():
        spec = INPUTS[name]
        if spec["type"] in ("uri_file", "mlflow_model"):
            assert value.type == spec["type"], name
        else:
            assert fitted(value, spec) == value, name
    assert sent["number_of_gpu_to_use_finetuning"] == 2
    assert sent["mlflow_model_path"].path == foundation.id
    clusters = {v for k, v in sent.items() if k.startswith("compute_")}
    assert clusters == {recipe.azure.compute.name}
    assert {"train_file_path", "validation_file_path", "test_file_path"} <= sent.keys()


@pytest.mark.parametrize(
    ("tags", "properties", "sizes", "source"),
    [
        ({"finetune_compute_allow_list": "['A', 'B']"}, {}, ("A", "B"), "tag"),
        (
            {},
            {"systemMetadata": {"supportedComputes": {"finetuneComputes": ["C"]}}},
            ("C",),
            "system_metadata",
        ),
        ({}, {}, SIZES["phi-4"], "table"),
    ],
)
def test_allowed_sizes_from_tag_then_metadata_then_table(
    tags: dict[str, str], properties: dict[str, Any], sizes: tuple[str, ...], source: str
) -> None:
    model = SimpleNamespace(name="Phi-4", version="8", id="x", tags=tags)
    found = foundation_model(model, properties)
    assert found.allowed == sizes
    assert source in found.allowed_from


def test_archived_or_retired_is_reported_with_its_date() -> None:
    model = SimpleNamespace(name="Phi-9", version="1", id="x", tags={})
    retired = {"systemMetadata": {"deprecation": {"finetuneRetirementDate": "2025-08-30"}}}
    later = {"systemMetadata": {"deprecation": {"finetuneRetirementDate": "2999-01-01"}}}
    assert foundation_model(model, {"isArchived": True}).archived == "archived in the catalogue"
    assert foundation_model(model, retired).archived == "retired 2025-08-30"
    assert foundation_model(model, later).archived is None
