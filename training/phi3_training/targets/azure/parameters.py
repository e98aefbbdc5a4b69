"""The inputs of the catalogue's pipeline: the tutorial's, the model's, the recipe's, in this order.

Only what the component has as an input is sent, in the type it wants; faults are told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import StageError

# The tutorial's training and optimisation parameters.
SEED: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "apply_lora": "true",
    "apply_deepspeed": "true",
    "deepspeed_stage": 2,
}
# Set by the route itself: model, data and machines.
OURS = frozenset(
    (
        "mlflow_model_path",
        "pytorch_model_path",
        "huggingface_id",
        "train_file_path",
        "validation_file_path",
        "test_file_path",
        "compute_model_import",
        "compute_preprocess",
        "compute_finetune",
        "compute_model_evaluation",
        "number_of_gpu_to_use_finetuning",
        "num_nodes_finetune",
        "shm_size_finetune",
    )
)


@dataclass(frozen=True)
class Parameters:
    """What is sent, where each value is from, and what the component does not take."""

    values: dict[str, Any]
    sources: dict[str, str]
    dropped: tuple[str, ...]

    def lines(self) -> list[str]:
        """The choices and their reasons."""
        by_source: dict[str, list[str]] = {}
        for key, source in self.sources.items():
            by_source.setdefault(source, []).append(f"{key} {self.values[key]}")
        lines = [f"{', '.join(items)}: {source}" for source, items in by_source.items()]
        if self.dropped:
            lines.append(f"left out, the component has no such input: {', '.join(self.dropped)}")
        return lines


def merge(
    defaults: Mapping[str, Any], given: Mapping[str, Any], inputs: Mapping[str, Any]
) -> Parameters:
    """The parameters for a component with these inputs. StageError for what the recipe has wrong.

    What the model's defaults have and the component has not is left out; the recipe's is refused.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    dropped: list[str] = []
    faults: list[str] = []
    for source, items in (
        ("as in the tutorial", SEED),
        ("the model's own default", defaults),
        ("azure.train.parameters", given),
    ):
        mine = source == "azure.train.parameters"
        for key, value in items.items():
            if key in OURS or key not in inputs:
                if mine:
                    faults.append(_unknown(key, inputs))
                else:
                    dropped.append(key)
                continue
            try:
                values[key] = fitted(value, inputs[key])
                sources[key] = source
            except ValueError as error:
                (faults if mine else dropped).append(f"{key} {value!r}: {error}")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise StageError(f"azure.train.parameters has faults:\n{lines}")
    return Parameters(values, sources, tuple(dict.fromkeys(dropped)))


def _unknown(key: str, inputs: Mapping[str, Any]) -> str:
    if key in OURS:
        return f"{key}: is set by phi3 from the rest of the recipe"
    near = [name for name in inputs if name.startswith(key[:5])]
    hint = f"; it has {', '.join(sorted(near)[:5])}" if near else ""
    return f"{key}: the component has no such input{hint}"


def fitted(value: Any, spec: Any) -> Any:
    """The value in the type of a component's input. ValueError where it is none of its values."""
    kind = str(_of(spec, "type") or "string").lower()
    choices = [str(item) for item in _of(spec, "enum") or ()]
    if kind == "integer":
        number = _integer(value)
        _within(number, spec)
        return number
    if kind == "number":
        if isinstance(value, bool):
            raise ValueError("expected a number")
        number_ = float(value)
        _within(number_, spec)
        return number_
    if kind == "boolean":
        return _truth(value) == "true"
    text = _truth(value) if isinstance(value, bool) else str(value)
    if choices and text not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}")
    return text


def _of(spec: Any, name: str) -> Any:
    return spec.get(name) if isinstance(spec, Mapping) else getattr(spec, name, None)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError("expected a whole number")
    return int(float(value))


def _truth(value: Any) -> str:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ValueError("expected true or false")
    return text


def _within(number: float, spec: Any) -> None:
    low, high = _of(spec, "min"), _of(spec, "max")
    if low is not None and number < float(low):
        raise ValueError(f"expected at least {low}")
    if high is not None and number > float(high):
        raise ValueError(f"expected at most {high}")


def display_name(model: str, data: str, values: Mapping[str, Any], gpus: int, nodes: int) -> str:
    """What the job is shown as: model, data, batch over all GPUs, schedule and memory settings."""
    batch = (
        int(values.get("per_device_train_batch_size", 1))
        * int(values.get("gradient_accumulation_steps", 1))
        * gpus
        * nodes
    )
    deepspeed = values.get("apply_deepspeed", "false") == "true"
    parts = (
        model,
        data,
        f"bs{batch}",
        str(values.get("lr_scheduler_type", "linear")),
        f"ds{values.get('deepspeed_stage', '2')}" if deepspeed else "nods",
        "lora" if values.get("apply_lora", "false") == "true" else "nolora",
        f"save_limit{values.get('save_total_limit', -1)}",
        f"seqlen{values.get('max_seq_length', -1)}",
    )
    return "-".join(parts)
