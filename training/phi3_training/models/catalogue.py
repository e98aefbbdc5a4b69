"""What `model.name_or_path` can name: the list of `phi3 models` and the memory plan's shapes.

Reads the cache folders to say what is here; never the network, never weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TINY, SMALL = "tiny", "small"

_PHI3_MINI = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "model_type": "phi3",
}  # fmt: skip
_LONG = {"max_position_embeddings": 131072}
_PHI4_MINI = {
    "vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
_SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "model_type": "phi3",
}  # fmt: skip


@dataclass(frozen=True)
class KnownModel:
    """A base model by the name that a recipe gives it.

    `shape` holds the size keys of its config.json; empty where the recipe's `base:` section says.
    """

    name: str
    what: str
    license: str
    template: str  # the form of its chat template
    source: str  # where the weights come from
    recipe: str  # the shipped recipe that is made for it
    shape: Mapping[str, Any] = field(default_factory=dict)


def _phi(name: str, what: str, recipe: str, shape: Mapping[str, Any], template: str) -> KnownModel:
    return KnownModel(f"microsoft/{name}", what, "MIT", template, "Hugging Face", recipe, shape)


# Shapes: each model's config.json on the Hugging Face hub.
CATALOGUE: tuple[KnownModel, ...] = (
    KnownModel(
        name=TINY,
        what="under a million random weights, trained here on 243 sentences; for tests",
        license="MIT",
        template="Phi-3",
        source="created on this machine",
        recipe="phi3-tiny.yaml",
    ),
    KnownModel(
        name=SMALL,
        what="SmolLM2-135M-Instruct in Phi-3's architecture; not Phi-3",
        license="Apache-2.0",
        template="ChatML",
        source="a wheel of 93 MB, by pip",
        recipe="phi3-small.yaml",
        shape=_SMOLLM2_135M,
    ),
    _phi("Phi-3-mini-4k-instruct", "3.8 B, context 4k", "phi3-mini-lora.yaml", _PHI3_MINI, "Phi-3"),
    _phi(
        "Phi-3-mini-128k-instruct",
        "3.8 B, context 128k (longrope)",
        "phi3-mini-lora.yaml",
        {**_PHI3_MINI, **_LONG},
        "Phi-3",
    ),
    _phi(
        "Phi-3.5-mini-instruct",
        "3.8 B, context 128k (longrope)",
        "phi3.5-mini-lora.yaml",
        {**_PHI3_MINI, **_LONG},
        "Phi-3",
    ),
    _phi(
        "Phi-4-mini-instruct",
        "3.8 B, context 128k (longrope), vocabulary of 200k",
        "phi4-mini-lora.yaml",
        {**_PHI3_MINI, **_LONG, **_PHI4_MINI},
        "Phi-4-mini",
    ),
)


def known(name: str) -> KnownModel | None:
    """The catalogue's entry of that name, case aside; None when it has none."""
    return next((model for model in CATALOGUE if model.name.lower() == name.lower()), None)


def cache_folder() -> Path:
    """Where prepared weights are kept: $PHI3_CACHE, else the user's own cache folder."""
    named = os.environ.get("PHI3_CACHE")
    if named:
        return Path(named).expanduser()
    # Each system's own place, which backups leave out and cleaners may empty.
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~\\AppData\\Local")).expanduser() / "phi3"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/phi3").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi3"


def weights_folder(name_or_path: str) -> Path | None:
    """The folder with the weights of `small`, of a folder, or of a Hugging Face id in its cache.

    None where nothing of that name is on this machine (`tiny` is made in each run).
    """
    if name_or_path == SMALL:
        from .small import prepared_folder

        return prepared_folder()
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        config = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if any(folder.glob("*.safetensors")) else None
