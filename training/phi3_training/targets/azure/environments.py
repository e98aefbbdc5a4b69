"""The Python environments of jobs and deployments on Azure, and where their pins come from.

Reads trainer.txt, which lists what the trainer needs in the exact versions that were tested; writes
<run>/azure/conda.yaml. Imports azure only where an SDK object is made: a job reads this as well.
"""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ...packages import MODEL_PACKAGES
from ...recipe import Recipe
from ...recipe.azure import AzureSection
from ...run import Run, fingerprint, write_atomically

if TYPE_CHECKING:
    from azure.ai.ml.entities import Environment

PYTHON = "3.11"
JOB_ENVIRONMENT, SERVING_ENVIRONMENT = "phi3-promptflow", "phi3-promptflow-serve"
# The scoring script's other needs. They have ranges, because Azure's server sets limits of its own:
# azureml-inference-server-http 1.5.1 takes pydantic below 2.13, and the trainer has a newer one.
_SERVING_RANGES = (
    "azureml-inference-server-http>=1.4,<2",
    "pydantic>=2.11",
    "PyYAML>=6.0",
    "psutil>=5.9",
    "filelock>=3.20",
)
_BITSANDBYTES = "bitsandbytes>=0.46"  # CUDA builds only, so not in the lock of a CPU machine


def trainer_pins() -> dict[str, str]:
    """`name==version` of every package of trainer.txt, by its normalised name."""
    text = files("phi3_training.targets.azure").joinpath("trainer.txt").read_text("utf-8")
    lines = [line.strip() for line in text.splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower(): pin for pin in pins}


def pinned(*names: str) -> list[str]:
    """These packages as requirements, in the trainer's versions. KeyError for an unknown one."""
    pins = trainer_pins()
    return [pins[name] for name in names]


def job_conda_file(recipe: Recipe, run: Run) -> tuple[Path, str]:
    """The file with a job's packages, and a version that changes with it and with the image."""
    # All of them, not the direct needs alone: what pip resolves today is not what was tested.
    pins = list(trainer_pins().values())
    if recipe.finetune.method == "qlora":
        pins.append(_BITSANDBYTES)
    text = yaml.safe_dump(_conda("phi3", pins), sort_keys=False)
    path = run.file("azure", "conda.yaml")
    write_atomically(path, text)
    image = recipe.azure.train.environment.image
    return path, hashlib.sha256(f"{image}\n{text}".encode()).hexdigest()[:12]


def serving_environment(section: AzureSection) -> Environment:
    """What a deployment of our own model runs in; the same content makes the same version."""
    from azure.ai.ml.entities import Environment

    packages = [*pinned(*MODEL_PACKAGES, "numpy"), *_SERVING_RANGES]
    conda = _conda(SERVING_ENVIRONMENT, packages)
    image = section.train.environment.image
    return Environment(
        name=SERVING_ENVIRONMENT,
        version=fingerprint([image, conda])[:12],
        image=image,
        conda_file=conda,
        description="Serves a Phi-3 tuned with phi3-promptflow",
    )


def _conda(name: str, packages: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "channels": ["conda-forge"],
        "dependencies": [f"python={PYTHON}", "pip", {"pip": packages}],
    }
