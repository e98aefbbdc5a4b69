"""What Azure offers: regions, machine sizes and quota, built-in roles, catalogue models, and the
inputs of the fine-tuning component.

Typed from Microsoft's documentation and public repositories, never from phi3's own tables: a
rehearsal is there to show where the two disagree. State of November 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .wire import Json

# Regions with Azure Machine Learning and GPU machines (azure.microsoft.com, products by region).
REGIONS = (
    *("eastus", "eastus2", "westus", "westus2", "westus3", "centralus", "northcentralus"),
    *("southcentralus", "northeurope", "westeurope", "uksouth", "francecentral", "polandcentral"),
    *("germanywestcentral", "swedencentral", "switzerlandnorth", "italynorth", "japaneast"),
    *("australiaeast", "canadacentral", "brazilsouth", "southeastasia", "eastasia"),
    *("koreacentral", "centralindia"),
)

# Azure built-in roles (learn.microsoft.com/azure/role-based-access-control/built-in-roles).
ROLES = {
    "b24988ac-6180-42a0-ab88-20f7382dd24c": "Contributor",
    "8e3af657-a8ff-443c-a75c-2fe8c4bcb635": "Owner",
    "acdd72a7-3385-48ef-bd42-f606fba81ae7": "Reader",
    "18d7d88d-d35e-4fb5-a5c3-7773c20a72d9": "User Access Administrator",
    "f58310d9-a9f6-439a-9e8d-f62e7b41a168": "Role Based Access Control Administrator",
    "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1": "Storage Blob Data Reader",
    "ba92f5b4-2d11-453d-a403-e96b0029c9fe": "Storage Blob Data Contributor",
    "7f951dda-4ed3-4680-a7ca-43fe172d538d": "AcrPull",
    "f6c7c914-8db3-469d-8ca1-694a8f32e121": "AzureML Data Scientist",
    "e503ece1-11d0-4e8e-8e2c-7a6c3bf38815": "AzureML Compute Operator",
    "635dd51f-9968-44d3-b7fb-6d9a6bd613ae": "AzureML Metrics Writer (preview)",
    "f1a07417-d97a-45cb-824c-7a7467783830": "Managed Identity Operator",
    "7ca78c08-252a-4471-8644-bb5ff32d4ba0": "Search Service Contributor",
    "8ebe5a00-799e-43f5-93ac-243d3dce84a7": "Search Index Data Contributor",
    "ea01e6af-a1c1-4350-9563-ad00f8c72ec5": "Azure Machine Learning Workspace Connection Secrets "
    "Reader",
}
# What a user-assigned identity must have for an online deployment: the service assigns the roles of
# a system-assigned one itself (learn.microsoft.com/azure/machine-learning, page
# concept-endpoints-online-auth). Each entry: the roles that allow it, the one to ask for.
PULLS_IMAGES = ({"AcrPull", "Contributor", "Owner"}, "AcrPull")
READS_BLOBS = (
    {"Storage Blob Data Reader", "Storage Blob Data Contributor"},
    "Storage Blob Data Reader",
)


# --- machines ---


class Size(NamedTuple):
    """One machine size."""

    family: str  # of the quota, as `usages[].name.value` spells it: some have spaces
    cores: int
    memory_gb: float
    gpus: int = 0
    deployable: bool = True
    # Whether a deployment needs a fifth more quota than it uses. Not on any NC A100 v4, NC H100 v5
    # or ND size (learn.microsoft.com/azure/machine-learning, page
    # reference-managed-online-endpoints-vm-sku-list).
    reserve: bool = True


_A100, _H100 = "standardNCADSA100v4Family", "standardNCADSH100v5Family"
_T4 = "standard NCASv3_T4 Family"
# The V100 sizes (NCv3) were retired on 2025-09-30 and so are not here.
SIZES = {
    "Standard_NC24ads_A100_v4": Size(_A100, 24, 220, 1, reserve=False),
    "Standard_NC48ads_A100_v4": Size(_A100, 48, 440, 2, reserve=False),
    "Standard_NC96ads_A100_v4": Size(_A100, 96, 880, 4, reserve=False),
    "Standard_NC40ads_H100_v5": Size(_H100, 40, 320, 1, reserve=False),
    "Standard_NC80adis_H100_v5": Size(_H100, 80, 640, 2, reserve=False),
    "Standard_ND96asr_v4": Size("standard NDASv4_A100 Family", 96, 900, 8, reserve=False),
    "Standard_ND96amsr_A100_v4": Size("standard NDAMSv4_A100Family", 96, 1900, 8, reserve=False),
    "Standard_ND96isr_H100_v5": Size("standardNDSH100v5Family", 96, 1900, 8, reserve=False),
    "Standard_NC4as_T4_v3": Size(_T4, 4, 28, 1),
    "Standard_NC8as_T4_v3": Size(_T4, 8, 56, 1),
    "Standard_NC16as_T4_v3": Size(_T4, 16, 110, 1),
    "Standard_NC64as_T4_v3": Size(_T4, 64, 440, 4),
    "Standard_NV36ads_A10_v5": Size("standardNVADSA10v5Family", 36, 440, 1),
    "Standard_D12_v2": Size("standardDv2Family", 4, 28, deployable=False),
    "Standard_DS3_v2": Size("standardDSv2Family", 4, 14),
    "Standard_DS4_v2": Size("standardDSv2Family", 8, 28),
    "Standard_D4s_v3": Size("standardDSv3Family", 4, 16),
    "Standard_E4s_v3": Size("standardESv3Family", 4, 32),
    "Standard_F4s_v2": Size("standardFSv2Family", 4, 8),
}
# A new subscription has 0 cores of every GPU family. These allow one route and leave another
# to be refused, so that both can be rehearsed.
DEFAULT_QUOTA = 100
FAMILY_QUOTA = {_A100: 96, _H100: 80, "standardNDSH100v5Family": 0}


def find_size(name: str) -> tuple[str, Size] | None:
    """The size in Azure's spelling: Azure ignores upper and lower case."""
    for real, size in SIZES.items():
        if real.lower() == name.lower():
            return real, size
    return None


# --- foundation models of the registry `azureml` ---
# From the asset specifications in github.com/Azure/azureml-assets, assets/models/system.


@dataclass(frozen=True)
class CatalogueModel:
    """One model of the catalogue."""

    version: str
    archived: bool
    finetune_sizes: tuple[str, ...]
    inference_sizes: tuple[str, ...]
    # The tag `model_specific_defaults`: the text of a Python dictionary, as the SDK hands it out.
    defaults: str


# Their upper and lower learning rates have been there since February 2025, and the component takes
# neither: whoever passes all defaults on is refused.
_DEFAULTS = (
    "{'apply_lora': 'true', 'apply_deepspeed': 'true', 'deepspeed_stage': 2, 'apply_ort': 'false', "
    "'precision': 16, 'ignore_mismatched_sizes': 'false', 'num_train_epochs': 1, "
    "'per_device_train_batch_size': 1, 'per_device_eval_batch_size': 1, "
    "'gradient_accumulation_steps': 1, 'learning_rate': 5e-06, 'learning_rate_min': 5e-07, "
    "'learning_rate_max': 5e-05, 'lr_scheduler_type': 'cosine', 'logging_strategy': 'steps', "
    "'logging_steps': 10, 'save_total_limit': 1}"
)
_DEFAULTS_35 = _DEFAULTS.replace(
    "'learning_rate': 5e-06, 'learning_rate_min': 5e-07, 'learning_rate_max': 5e-05",
    "'learning_rate': 2e-05, 'learning_rate_min': 2e-06, 'learning_rate_max': 0.0002, "
    "'max_seq_length': 16384",
)
_DEFAULTS_4 = _DEFAULTS.replace("'deepspeed_stage': 2", "'deepspeed_stage': 3").replace(
    " 'learning_rate_min': 5e-07, 'learning_rate_max': 5e-05,", ""
)
_A100_SIZES = (
    "Standard_NC24ads_A100_v4",
    "Standard_NC48ads_A100_v4",
    "Standard_NC96ads_A100_v4",
    "Standard_ND96amsr_A100_v4",
)
_H100_SIZES = ("Standard_NC40ads_H100_v5", "Standard_NC80adis_H100_v5", "Standard_ND96isr_H100_v5")
# Still listed, though the machines are gone.
_V100_SIZES = ("Standard_NC6s_v3", "Standard_NC12s_v3", "Standard_NC24s_v3", "Standard_ND40rs_v2")
_ALL_SIZES = (*_A100_SIZES, "Standard_ND96asr_v4", *_H100_SIZES)
_4K_SIZES = (*_A100_SIZES, "Standard_ND96asr_v4")
# All Phi-3 models: retired on 2025-08-30, archived in the catalogue since 2026-06-02.
RETIRED_ON = "2025-08-30"
MODELS = {
    "Phi-3-mini-4k-instruct": CatalogueModel(
        "15", True, _4K_SIZES, (*_V100_SIZES, *_4K_SIZES), _DEFAULTS
    ),
    "Phi-3-mini-128k-instruct": CatalogueModel("13", True, _A100_SIZES, _A100_SIZES, _DEFAULTS),
    "Phi-3.5-mini-instruct": CatalogueModel("6", True, _A100_SIZES, _A100_SIZES, _DEFAULTS_35),
    # No public specification of this one: the sizes of Phi-4 are the nearest guess.
    "Phi-4-mini-instruct": CatalogueModel("1", False, _ALL_SIZES, _ALL_SIZES, _DEFAULTS),
    "Phi-4": CatalogueModel("8", False, _ALL_SIZES, _ALL_SIZES, _DEFAULTS_4),
}


def find_model(asset_id: str) -> tuple[str, CatalogueModel] | None:
    """The catalogue's model that `azureml://registries/azureml/models/…/versions/…` means."""
    parts = asset_id.split("/")
    if len(parts) < 8 or parts[2:5] != ["registries", "azureml", "models"]:
        return None
    model = MODELS.get(parts[5])
    return (parts[5], model) if model and model.version == parts[7] else None


# --- the component chat_completion_pipeline of the registry `azureml` ---
# From github.com/Azure/azureml-assets, assets/training/finetune_acft_hf_nlp, version of 2026-06-30.
# Each line: a type, then inputs as name=default, and :a|b where only few values are taken.

COMPONENT, COMPONENT_VERSION = "chat_completion_pipeline", "0.0.82"
_FLAG = "true|false"
_INPUTS = f"""
string instance_type_model_import=Standard_d12_v2 instance_type_preprocess=Standard_d12_v2
string instance_type_finetune=Standard_nc24rs_v3
string instance_type_model_evaluation=Standard_nc24rs_v3 shm_size_finetune=5g
integer num_nodes_finetune=1 number_of_gpu_to_use_finetuning=1
string compute_model_import=serverless compute_preprocess=serverless compute_finetune=serverless
string compute_model_evaluation=serverless huggingface_id
custom_model pytorch_model_path
mlflow_model mlflow_model_path
uri_file finetune_config_path
string trust_remote_code=false:{_FLAG} task_name=ChatCompletion:ChatCompletion
integer batch_size=1000
string pad_to_max_length=false:{_FLAG}
integer max_seq_length=-1
uri_file train_file_path validation_file_path test_file_path
mltable train_mltable_path validation_mltable_path test_mltable_path
string apply_lora=false:{_FLAG} merge_lora_weights=true:{_FLAG}
integer lora_alpha=128 lora_r=8
number lora_dropout=0.0
integer num_train_epochs=1 max_steps=-1 per_device_train_batch_size=1
integer per_device_eval_batch_size=1
string auto_find_batch_size=false:{_FLAG} optim=adamw_torch:adamw_torch|adafactor
number learning_rate=2e-5
integer warmup_steps=0
number weight_decay=0.0 adam_beta1=0.9 adam_beta2=0.999 adam_epsilon=1e-8
integer gradient_accumulation_steps=1 eval_accumulation_steps=-1
string lr_scheduler_type=linear:linear|cosine|cosine_with_restarts|polynomial\
|constant|constant_with_warmup
string precision=32:32|16
integer seed=42
string enable_full_determinism=false:{_FLAG}
integer dataloader_num_workers=0
string ignore_mismatched_sizes=false:{_FLAG}
number max_grad_norm=1.0
string evaluation_strategy=epoch:epoch|steps|disable
number evaluation_steps_interval=0.0
integer eval_steps=500
string logging_strategy=steps:epoch|steps
integer logging_steps=10
string metric_for_best_model=loss:loss|f1|exact resume_from_checkpoint=false:{_FLAG}
integer save_total_limit=-1
string apply_early_stopping=false:{_FLAG}
integer early_stopping_patience=1
number early_stopping_threshold=0.0
string apply_deepspeed=false:{_FLAG}
uri_file deepspeed
string deepspeed_stage=2:2|3 apply_ort=false:{_FLAG}
uri_file evaluation_config
string evaluation_config_params
"""


class Input(NamedTuple):
    """One input of the component."""

    kind: str
    default: str | None
    choices: tuple[str, ...]

    @property
    def is_literal(self) -> bool:
        """Whether a value is given, not a file."""
        return self.kind in ("string", "integer", "number")

    def fault(self, value: object) -> str | None:
        """What is wrong with a value, or None."""
        text = str(value)
        number = {"integer": int, "number": float}.get(self.kind)
        if number is not None:
            try:
                number(text)
            except ValueError:
                return f"'{text}' is not of type {self.kind}"
        if self.choices and text not in self.choices:
            return f"'{text}' is not one of {', '.join(self.choices)}"
        return None


def _read_inputs() -> dict[str, Input]:
    inputs = {}
    for line in _INPUTS.strip().splitlines():
        kind, *entries = line.split()
        for entry in entries:
            text, _, choices = entry.partition(":")
            name, _, default = text.partition("=")
            inputs[name] = Input(kind, default or None, tuple(filter(None, choices.split("|"))))
    return inputs


INPUTS = _read_inputs()
OUTPUTS = {"pytorch_model_folder": "uri_folder", "mlflow_model_folder": "mlflow_model"}


def component_spec() -> Json:
    """The component as a registry hands it out."""
    inputs: Json = {}
    for name, item in INPUTS.items():
        entry: Json = {"type": item.kind, "optional": item.default is None}
        if item.default is not None:
            entry["default"] = item.default
        if item.choices:
            entry["enum"] = list(item.choices)
        inputs[name] = entry
    return {
        "$schema": "https://azuremlschemas.azureedge.net/latest/pipelineComponent.schema.json",
        "name": COMPONENT,
        "version": COMPONENT_VERSION,
        "display_name": "Chat Completion Pipeline",
        "description": "Pipeline component for chat completion fine-tuning",
        "type": "pipeline",
        "is_deterministic": False,
        "inputs": inputs,
        "outputs": {name: {"type": kind} for name, kind in OUTPUTS.items()},
        "jobs": {},
    }
