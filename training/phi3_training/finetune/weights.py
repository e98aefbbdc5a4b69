"""Finds and loads weights: a folder, or a Hugging Face id from the cache or the network.

Reads model folders; downloads into Hugging Face's own cache (HF_HOME).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import StageError
from ..models import small
from ..prompt import ChatFormat
from ..recipe import ModelSection
from ..run import Run
from .teach import Progress

# What a causal language model folder consists of; other formats in a repository stay there.
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def base_folder(run: Run) -> Path:
    """The folder of the base model of this run."""
    manifest = run.require("base", "phi3 train")
    return run.path / str(manifest["path"])


def chat_format(folder: Path) -> ChatFormat:
    """The chat format of a model folder; StageError when it has none."""
    try:
        return ChatFormat.from_folder(folder)
    except ValueError as error:
        raise StageError(f"This model cannot be used for chats: {error}") from None


def count_weights(folder: Path) -> int:
    """About how many weights a folder holds, told by its files (four bytes each, or two)."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 4


def model_type(folder: Path) -> str:
    """The kind of model of a folder as its config.json names it, such as phi3."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(content.get("model_type", ""))


def find_weights(model: ModelSection, progress: Progress) -> Path:
    """The folder with the weights that the recipe names, downloaded if need be.

    Raises StageError, with what to do, when they are not there or are not a chat model's.
    """
    if model.is_small:
        return small.prepare(progress)
    folder = Path(model.name_or_path).expanduser()
    if not folder.is_dir():
        folder = _download(model)
    _check_folder(folder, model.name_or_path)
    return folder.resolve()


def load_model(
    folder: Path, dtype: torch.dtype, attention: str | None = None, **options: Any
) -> Any:
    """The causal language model of a folder, without running code from the folder.

    It is on the CPU, unless `options` of transformers' loader say otherwise.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if attention is not None:
        options["attn_implementation"] = attention
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise StageError(
            f"The weights in {folder} cannot be loaded: {_first_line(error)}. Expected a causal "
            "language model that transformers knows, as safetensors."
        ) from None


def _download(model: ModelSection) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = model.name_or_path
    try:
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=_WANTED_FILES))
    except HFValidationError:
        what = "is neither a folder nor a Hugging Face id such as microsoft/Phi-3-mini-4k-instruct"
    except LocalEntryNotFoundError:
        what = "is not on this machine and huggingface.co cannot be reached"
    except (HfHubHTTPError, OSError) as error:
        what = f"could not be downloaded: {_first_line(error)}"
    revision = f" (revision {model.revision})" if model.revision else ""
    raise StageError(
        f"model.name_or_path {name!r}{revision} {what}. Either give the folder that holds the "
        "weights (model.name_or_path=/path/to/folder), or set HF_HOME to a cache that has them, "
        "or connect this machine to the network; a gated model needs HF_TOKEN as well."
    )


def _check_folder(folder: Path, name: str) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StageError(
            f"model.name_or_path {name!r} is not a model folder: {_first_line(error)}. "
            "Expected config.json, *.safetensors and tokenizer.json."
        ) from None
    kinds = config.architectures or []
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise StageError(
            f"model.name_or_path {name!r} holds {', '.join(kinds) or 'an unknown model'}; "
            "expected a causal language model, such as microsoft/Phi-3-mini-4k-instruct."
        )
    if not any(folder.glob("*.safetensors")):
        raise StageError(
            f"model.name_or_path {name!r} holds no weights: expected *.safetensors in {folder}."
        )
    chat_format(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
