"""The inputs of chat_completion_pipeline 0.0.82 by kind, as its specification has them."""

from __future__ import annotations

from typing import Any

_STRINGS = """instance_type_model_import instance_type_preprocess instance_type_finetune
instance_type_model_evaluation shm_size_finetune compute_model_import compute_preprocess
compute_finetune compute_model_evaluation huggingface_id evaluation_config_params"""
_INTEGERS = """num_nodes_finetune number_of_gpu_to_use_finetuning batch_size max_seq_length
lora_alpha lora_r num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size
warmup_steps gradient_accumulation_steps eval_accumulation_steps seed dataloader_num_workers
eval_steps logging_steps save_total_limit early_stopping_patience"""
_NUMBERS = """lora_dropout learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon
max_grad_norm evaluation_steps_interval early_stopping_threshold"""
_SWITCHES = """trust_remote_code pad_to_max_length apply_lora merge_lora_weights
auto_find_batch_size enable_full_determinism ignore_mismatched_sizes resume_from_checkpoint
apply_early_stopping apply_deepspeed apply_ort"""
_FILES = """finetune_config_path train_file_path validation_file_path test_file_path deepspeed
evaluation_config"""
_TABLES = "train_mltable_path validation_mltable_path test_mltable_path"
_ENUMS = {
    "task_name": ["ChatCompletion"],
    "optim": ["adamw_torch", "adafactor"],
    "lr_scheduler_type": [
        *("linear", "cosine", "cosine_with_restarts", "polynomial"),
        *("constant", "constant_with_warmup"),
    ],
    "precision": ["32", "16"],
    "evaluation_strategy": ["epoch", "steps", "disable"],
    "logging_strategy": ["epoch", "steps"],
    "metric_for_best_model": ["loss", "f1", "exact"],
    "deepspeed_stage": ["2", "3"],
}

INPUTS: dict[str, dict[str, Any]] = {
    **{name: {"type": "string"} for name in _STRINGS.split()},
    **{name: {"type": "integer"} for name in _INTEGERS.split()},
    **{name: {"type": "number"} for name in _NUMBERS.split()},
    **{name: {"type": "string", "enum": ["true", "false"]} for name in _SWITCHES.split()},
    **{name: {"type": "string", "enum": values} for name, values in _ENUMS.items()},
    **{name: {"type": "uri_file"} for name in _FILES.split()},
    **{name: {"type": "mltable"} for name in _TABLES.split()},
    "pytorch_model_path": {"type": "custom_model"},
    "mlflow_model_path": {"type": "mlflow_model"},
}
INPUTS["num_nodes_finetune"]["min"] = 1
INPUTS["number_of_gpu_to_use_finetuning"]["min"] = 1
