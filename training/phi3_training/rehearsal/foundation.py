"""The catalogue's foundation models as this machine has them: one tiny Phi-3, made when first used.

Reads the recipe training/recipes/phi3-tiny.yaml; writes catalogue/ in the rehearsal's folder.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock

from ..errors import StageError
from ..recipe import Recipe, load_recipe
from ..run import Run
from . import registries
from .cloud import Cloud
from .wire import Json, bad

_RECIPE = Path(__file__).resolve().parents[3] / "training" / "recipes" / "phi3-tiny.yaml"


def asset(cloud: Cloud, workspace: Json, uri: str) -> Path | None:
    """Where the files of a registry's model will lie; None when `uri` means something else."""
    del workspace
    if not uri.startswith("azureml://registries/"):
        return None
    if registries.find_model(uri) is None:
        raise bad(f"The asset '{uri}' was not found.")
    return cloud.folder / "catalogue" / "mlflow"


def recipe() -> Recipe:
    """The recipe of the tiny model. Raises StageError where the product is not a clone."""
    if not _RECIPE.is_file():
        raise StageError(f"Rehearsed jobs need {_RECIPE}; run phi3 in a clone of phi3-promptflow")
    return load_recipe(_RECIPE, [])


def make(folder: Path) -> Path:
    """The tiny model as an MLflow folder under `folder`, made once."""
    from ..finetune import prepare_base

    ready = folder / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not ready.is_dir():
            run = Run.open(folder / "base")
            made = prepare_base(recipe(), run)
            part = folder / ".mlflow.part"
            shutil.rmtree(part, ignore_errors=True)
            as_mlflow(run.path / made["path"], part)
            part.replace(ready)
    return ready


def as_mlflow(model: Path, target: Path) -> None:
    """Wrap a folder of weights as the MLflow model that the catalogue's converter writes."""
    shutil.copytree(model, target / "data" / "model")
    (target / "MLmodel").write_text(
        "flavors:\n"
        "  hftransformersv2:\n"
        "    code: null\n"
        "    model_data: data\n"
        "    task_type: chat-completion\n"
        "  python_function:\n"
        "    data: data\n"
        "    loader_module: azureml.evaluate.mlflow.hftransformers\n"
        "metadata:\n"
        "  azureml.base_image: mcr.microsoft.com/azureml/curated/foundation-model-inference:63\n",
        encoding="utf-8",
    )


def weights_in(folder: Path) -> Path | None:
    """The folder of weights inside an MLflow model (or the folder itself)."""
    found = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    with_weights = [p.parent for p in found if any(p.parent.glob("*.safetensors"))]
    return with_weights[0] if with_weights else None


def link(source: Path, target: Path) -> None:
    """Give a job a copy of `source` to read; of a big file a second name does."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
