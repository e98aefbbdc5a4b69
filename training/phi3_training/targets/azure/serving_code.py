"""What a deployment of our own model runs: our package, a scoring script, an environment.

Writes <run>/azure/serve: copies of the package's sources, which Azure ML uploads once per content.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...recipe_azure import AzureSection
from ...run import Run, fingerprint

if TYPE_CHECKING:
    from azure.ai.ml.entities import Environment

SCRIPT = "score.py"
ENVIRONMENT = "phi3-promptflow-serve"
_SCRIPT = '''"""Azure ML's entry: init() and run() of the served model."""

from phi3_training.serve.azure_score import init, run

__all__ = ["init", "run"]
'''
# Of the package's own needs only what the scoring script imports; Azure's server hosts it.
REQUIREMENTS = (
    "azureml-inference-server-http>=1.4,<2",
    "torch==2.13.0",
    "transformers>=5.23,<6",
    "tokenizers>=0.22",
    "jinja2>=3.1",
    "numpy>=2",
    "pydantic>=2.11",
    "PyYAML>=6.0",
    "psutil>=5.9",
    "filelock>=3.20",
)
# Of phi3_training only what serving reads: a change elsewhere uploads and deploys nothing new.
_PARTS = ("__init__.py", "py.typed", "errors.py", "run.py", "prompt.py", "prompt_parts.py", "serve")


def code_folder(run: Run) -> Path:
    """Write the code; the folder."""
    folder = run.path / "azure" / "serve"
    if folder.exists():
        shutil.rmtree(folder)
    sources = Path(__file__).resolve().parents[2]
    for name in _PARTS:
        _copy(sources / name, folder / sources.name / name)
    (folder / SCRIPT).write_text(_SCRIPT, encoding="utf-8")
    return folder


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copyfile(source, destination)


def environment(section: AzureSection) -> Environment:
    """The environment; its version changes with its content, so that none is made twice."""
    from azure.ai.ml.entities import Environment

    conda = _conda()
    image = section.train.environment.image
    return Environment(
        name=ENVIRONMENT,
        version=fingerprint([image, conda])[:12],
        image=image,
        conda_file=conda,
        description="Serves a Phi-3 tuned with phi3-promptflow",
    )


def _conda() -> dict[str, Any]:
    return {
        "name": ENVIRONMENT,
        "channels": ["conda-forge"],
        "dependencies": ["python=3.11", "pip", {"pip": list(REQUIREMENTS)}],
    }
