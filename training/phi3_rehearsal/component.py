"""The inputs and outputs of the registry's chat_completion_pipeline, and what it would refuse.

One line for each input: name, type, default, and the values it takes where they are few.
"""

from __future__ import annotations

from typing import NamedTuple

from .wire import Json

NAME, VERSION = "chat_completion_pipeline", "0.0.82"
_BOOLEAN = "true|false"
_TABLE = f"""
instance_type_model_import string Standard_d12_v2
instance_type_preprocess string Standard_d12_v2
instance_type_finetune string Standard_nc24rs_v3
instance_type_model_evaluation string Standard_nc24rs_v3
shm_size_finetune string 5g
num_nodes_finetune integer 1
number_of_gpu_to_use_finetuning integer 1
compute_model_import string serverless
compute_preprocess string serverless
compute_finetune string serverless
compute_model_evaluation string serverless
huggingface_id string -
pytorch_model_path custom_model -
mlflow_model_path mlflow_model -
finetune_config_path uri_file -
trust_remote_code string false {_BOOLEAN}
task_name string ChatCompletion ChatCompletion
batch_size integer 1000
pad_to_max_length string false {_BOOLEAN}
max_seq_length integer -1
train_file_path uri_file -
validation_file_path uri_file -
test_file_path uri_file -
train_mltable_path mltable -
validation_mltable_path mltable -
test_mltable_path mltable -
apply_lora string false {_BOOLEAN}
merge_lora_weights string true {_BOOLEAN}
lora_alpha integer 128
lora_r integer 8
lora_dropout number 0.0
num_train_epochs integer 1
max_steps integer -1
per_device_train_batch_size integer 1
per_device_eval_batch_size integer 1
auto_find_batch_size string false {_BOOLEAN}
optim string adamw_torch adamw_torch|adafactor
learning_rate number 2e-5
warmup_steps integer 0
weight_decay number 0.0
adam_beta1 number 0.9
adam_beta2 number 0.999
adam_epsilon number 1e-8
gradient_accumulation_steps integer 1
eval_accumulation_steps integer -1
lr_scheduler_type string linear \
linear|cosine|cosine_with_restarts|polynomial|constant|constant_with_warmup
precision string 32 32|16
seed integer 42
enable_full_determinism string false {_BOOLEAN}
dataloader_num_workers integer 0
ignore_mismatched_sizes string false {_BOOLEAN}
max_grad_norm number 1.0
evaluation_strategy string epoch epoch|steps|disable
evaluation_steps_interval number 0.0
eval_steps integer 500
logging_strategy string steps epoch|steps
logging_steps integer 10
metric_for_best_model string loss loss|f1|exact
resume_from_checkpoint string false {_BOOLEAN}
save_total_limit integer -1
apply_early_stopping string false {_BOOLEAN}
early_stopping_patience integer 1
early_stopping_threshold number 0.0
apply_deepspeed string false {_BOOLEAN}
deepspeed uri_file -
deepspeed_stage string 2 2|3
apply_ort string false {_BOOLEAN}
evaluation_config uri_file -
evaluation_config_params string -
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


def _read() -> dict[str, Input]:
    found = {}
    for line in _TABLE.strip().splitlines():
        name, kind, default, *rest = line.split()
        choices = tuple(rest[0].split("|")) if rest else ()
        found[name] = Input(kind, None if default == "-" else default, choices)
    return found


INPUTS = _read()
OUTPUTS = {"pytorch_model_folder": "uri_folder", "mlflow_model_folder": "mlflow_model"}


def spec() -> Json:
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
        "name": NAME,
        "version": VERSION,
        "display_name": "Chat Completion Pipeline",
        "description": "Pipeline component for chat completion fine-tuning",
        "type": "pipeline",
        "is_deterministic": False,
        "inputs": inputs,
        "outputs": {name: {"type": kind} for name, kind in OUTPUTS.items()},
        "jobs": {},
    }
