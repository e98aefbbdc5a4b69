"""Carries out chat_completion_pipeline with `phi3 train` on the tiny model.

Reads the job's inputs; writes a recipe, a run and its two outputs in the job's work folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from . import foundation
from .component import INPUTS
from .wire import Json

# The component's names that a recipe's `finetune` section has as well.
_SAME: dict[str, Callable[[str], Any]] = {
    "num_train_epochs": int,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "learning_rate": float,
    "lr_scheduler_type": str,
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "weight_decay": float,
    "seed": int,
}


def run(
    job: Json, inputs: dict[str, str], work: Path, log_file: Callable[[Json, str], Path]
) -> dict[str, Path]:
    """Train as the inputs say; where each of the pipeline's outputs lies."""
    weights = foundation.weights_in(foundation.make(Path(job["catalogue"])))
    assert weights is not None  # noqa: S101 - we made it
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(inputs, weights)), encoding="utf-8")
    with log_file(job, "std_log.txt").open("wb") as log:
        model = foundation.train([str(recipe)], work / "runs", log)
    folders = {"mlflow_model_folder": work / "mlflow", "pytorch_model_folder": work / "pytorch"}
    foundation.as_mlflow(model, folders["mlflow_model_folder"])
    foundation.link(model, folders["pytorch_model_folder"])
    return {job["bound"][name]: path for name, path in folders.items() if name in job["bound"]}


def _recipe(inputs: dict[str, str], weights: Path) -> Json:
    """A recipe with the component's inputs, and its defaults where there are none."""
    values = {name: item.default for name, item in INPUTS.items() if item.default} | inputs
    tuned = {name: kind(values[name]) for name, kind in _SAME.items() if name in values}
    tuned["method"] = "lora" if values["apply_lora"] == "true" else "full"
    tuned["num_threads"] = 1
    shape = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    data: Json = {
        "train": values["train_file_path"],
        "max_length": shape["max_position_embeddings"],
    }
    if "validation_file_path" in values:
        data["validation"] = values["validation_file_path"]
    return {
        "name": "pipeline",
        "model": {"name_or_path": str(weights)},
        "data": data,
        "finetune": tuned,
    }
