"""Carries out chat_completion_pipeline with our own trainer on the tiny model.

Reads the job's inputs; writes a run folder in the job's work folder, and its two outputs there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..data.prepare import prepare
from ..finetune import finetune
from ..run import Run
from . import foundation
from .component import INPUTS
from .wire import Json

# The component's names, and ours for the same.
_SAME = {
    "num_train_epochs": int,
    "max_steps": int,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "learning_rate": float,
    "lr_scheduler_type": str,
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "warmup_steps": int,
    "weight_decay": float,
    "seed": int,
    "max_grad_norm": float,
}


def run(
    job: Json, inputs: dict[str, str], work: Path, log_file: Callable[[Json, str], Path]
) -> dict[str, Path]:
    """Train as the inputs say; where each of the pipeline's outputs lies."""
    log = log_file(job, "std_log.txt")
    with log.open("w", encoding="utf-8") as stream:
        model = _train(job, inputs, work, stream)
    folders = {"mlflow_model_folder": work / "mlflow", "pytorch_model_folder": work / "pytorch"}
    foundation.as_mlflow(model, folders["mlflow_model_folder"])
    foundation.link(model, folders["pytorch_model_folder"])
    return {job["bound"][name]: path for name, path in folders.items() if name in job["bound"]}


def _train(job: Json, inputs: dict[str, str], work: Path, log: io.TextIOBase) -> Path:
    defaults = {name: item.default for name, item in INPUTS.items() if item.default}
    values = {**defaults, **inputs}
    folder = Run.open(work / "run")
    _say(log, "ft_nlp_common_validation: the inputs are what the component takes")
    base = foundation.make(Path(job["catalogue"]))
    weights = foundation.weights_in(base)
    assert weights is not None  # noqa: S101 - we made it
    foundation.link(weights, folder.path / "base")
    settings = _recipe(values)
    folder.write_manifest("base", {"path": "base", "choices": []})
    folder.write_manifest("dataset", prepare(settings.data, folder))
    _say(log, "datapreprocess: the chats are prepared")
    shown = -1

    def progress(done: int, total: int, text: str) -> None:
        nonlocal shown
        if total and done * 10 // total != shown:
            shown = done * 10 // total
            _say(log, f"finetune: step {done} of {total} {text}")

    with redirect_stdout(log):
        made = finetune(settings, folder, progress)
    _say(log, f"finetune: {made['summary']}")
    _say(log, "ft_nlp_model_converter: done")
    return folder.path / str(made["path"])


def _recipe(values: dict[str, Any]) -> Any:
    """The tiny model's recipe with the component's inputs in the places of ours."""
    recipe = foundation.recipe()
    tuned: Json = {name: kind(values[name]) for name, kind in _SAME.items() if name in values}
    known = set(type(recipe.finetune).model_fields)
    tuned = {name: value for name, value in tuned.items() if name in known}
    if tuned.get("max_steps") == -1:
        del tuned["max_steps"]
    tuned["method"] = "lora" if values["apply_lora"] == "true" else "full"
    data: Json = {"train": [Path(values["train_file_path"])], "replay": []}
    if "validation_file_path" in values:
        data["validation"] = [Path(values["validation_file_path"])]
    else:
        data["validation"] = []
    return recipe.model_validate(
        {
            **json.loads(recipe.model_dump_json()),
            "data": {**json.loads(recipe.data.model_dump_json()), **data},
            "finetune": {**json.loads(recipe.finetune.model_dump_json()), **tuned},
        }
    )


def _say(log: io.TextIOBase, text: str) -> None:
    log.write(text + "\n")
    log.flush()
