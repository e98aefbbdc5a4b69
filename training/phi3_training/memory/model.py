"""What a memory plan starts from: the model's sizes and the device's memory.

Sizes come from a config alone (a recipe's base section, a config.json in a folder or in the Hugging
Face cache, or our table), never from the network or weights. Memory comes from psutil, the
container's limit, and torch (imported only where there is a GPU).
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil

from ..engine import has_gpu
from ..models.catalogue import CATALOGUE
from ..models.layers import ALL_LINEAR, targets_in
from ..models.small import prepared_folder as small_folder
from ..recipe import ModelSection, Recipe

CONFIG = "config.json"
# Attention windows and rotary tables change no size, so a few numbers of each config suffice.
KNOWN: Mapping[str, Mapping[str, Any]] = {
    model.name: model.shape for model in CATALOGUE if model.shape
}
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


class UnknownShapeError(ValueError):
    """The sizes of a model are unknown; the message says why."""


@dataclass(frozen=True)
class Linear:
    """A matrix of one layer, by the name of its module."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with gated MLP, such as Phi-3; `source` says where they are from."""

    source: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    tied: bool = False  # the embedding is the output matrix as well
    fused: bool = True  # one matrix for q, k and v, one for gate and up, as in Phi-3

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The matrices of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # Grouped-query attention: several query heads share one k and one v head.
        attention = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        gates = {"gate_proj": self.intermediate, "up_proj": self.intermediate}
        if self.fused:
            attention = {"qkv_proj": queries + 2 * keys}
            gates = {"gate_up_proj": 2 * self.intermediate}
        return (
            *(Linear(f"self_attn.{n}", self.hidden, size) for n, size in attention.items()),
            Linear("self_attn.o_proj", queries, self.hidden),
            *(Linear(f"mlp.{n}", self.hidden, size) for n, size in gates.items()),
            Linear("mlp.down_proj", self.intermediate, self.hidden),
        )

    @property
    def linear_weights(self) -> int:
        """The weights of all layers' matrices: what 4 bits hold in QLoRA."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def other_weights(self) -> int:
        """Embedding, output matrix and norms."""
        matrices = 1 if self.tied else 2
        # Two norms in each layer, and the last one in front of the output matrix.
        return matrices * self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.linear_weights + self.other_weights

    @property
    def kv_per_token(self) -> int:
        """Numbers that the key/value cache holds for each token of a conversation."""
        return 2 * self.layers * self.kv_heads * self.head_dim  # 2: a key and a value

    def adapted(self, target_modules: str | Sequence[str]) -> tuple[Linear, ...]:
        """The matrices of one layer that get an adapter, chosen as peft does."""
        if target_modules == ALL_LINEAR:
            return self.linears
        names = [f"model.layers.0.{linear.name}" for linear in self.linears]
        try:
            target_modules = targets_in(target_modules, names).names
        except ValueError:  # refused where the model's own names are known
            return ()
        if isinstance(target_modules, str):
            pattern = re.compile(target_modules)
            return tuple(
                linear
                for linear in self.linears
                if pattern.fullmatch(f"model.layers.0.{linear.name}")
            )
        wanted = tuple(f".{name}" for name in target_modules)
        return tuple(linear for linear in self.linears if f".{linear.name}".endswith(wanted))


def shape_of(recipe: Recipe) -> ModelShape:
    """The shape of the recipe's base model. Raises UnknownShapeError when no config has it."""
    if recipe.model.is_tiny and recipe.base is not None:
        return shape_from(recipe.base.model_dump(exclude={"data"}), "the recipe's base section")
    name = recipe.model.name_or_path
    folder = small_folder() if recipe.model.is_small else Path(name).expanduser()
    if folder is not None and folder.is_dir():
        return _read(folder / CONFIG, str(folder / CONFIG))
    cached = cached_file(recipe.model, CONFIG)
    if cached is not None:
        return _read(cached, f"{CONFIG} of {name} in the Hugging Face cache")
    for known, content in KNOWN.items():
        if known.lower() == name.lower():
            return shape_from(content, f"our table for {known} (its config is not on this machine)")
    raise UnknownShapeError(
        f"the config of {name} is not on this machine and not in our table ({', '.join(KNOWN)}); "
        f"name a folder instead: model.name_or_path=/path/to/folder"
    )


def shape_from(config: Mapping[str, Any], source: str) -> ModelShape:
    """The shape by a config.json. Raises UnknownShapeError for other kinds of models."""
    missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    experts = [name for name in config if "experts" in name]
    if missing or experts:
        what = f"it has no {', '.join(missing)}" if missing else "it is a mixture-of-experts model"
        raise UnknownShapeError(f"{source} is not of a model whose memory phi3 can predict: {what}")
    # The rest has defaults in transformers' configs, which a saved config.json may leave out.
    heads = int(config["num_attention_heads"])
    return ModelShape(
        source=source,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        context=config.get("max_position_embeddings") or 2048,
        tied=bool(config.get("tie_word_embeddings", False)),
        fused=config.get("model_type", "phi3") == "phi3",
    )


def _read(path: Path, source: str) -> ModelShape:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UnknownShapeError(f"{source} cannot be read")
    return shape_from(content, source)


def cached_file(model: ModelSection, name: str) -> Path | None:
    """A file of the model as downloaded earlier; no network."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        cached = try_to_load_from_cache(model.name_or_path, name, revision=model.revision)
    except HFValidationError:  # the name is a folder's
        return None
    return Path(cached) if isinstance(cached, str) else None


Kind = Literal["cpu", "cuda", "mps"]

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Device:
    """A device: bytes in all and free now, and how messages name it."""

    kind: Kind
    name: str
    total: int
    available: int
    bfloat16: bool = True  # a GPU multiplies it in hardware
    is_here: bool = False  # not a planned one

    @property
    def where(self) -> str:
        """`the RAM of this machine has 21.3 GiB free of 23.4`."""
        return f"{self.name} has {gib(self.available)} free of {gib(self.total)}"


def gib(size: float) -> str:
    """A size for people, in binary gigabytes."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def of_size(gigabytes: float, kind: Kind = "cuda") -> Device:
    """A device elsewhere of this many binary gigabytes, with nothing else on it."""
    size = int(gigabytes * GIB)
    name = "the planned GPU" if kind == "cuda" else "the planned machine"
    return Device(kind, name, size, size)


def this_device() -> Device:
    """What `phi3 train` would use here, as finetune/runtime.py chooses it."""
    if not has_gpu():
        return this_ram()
    import torch

    free, total = torch.cuda.mem_get_info()
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", torch.cuda.get_device_name(), total, free, bfloat16, is_here=True)


def this_ram() -> Device:
    """This machine's RAM; a Mac's is its GPU's as well."""
    total, available = ram()
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Device("mps", "the memory of this Mac", total, available, is_here=True)
    return Device("cpu", "the RAM of this machine", total, available, is_here=True)


@cache
def torch_has_cuda() -> bool:
    """Whether the torch installed here is a build with CUDA's libraries; does not import it."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    # Named libtorch_cuda.so on Linux, torch_cuda.dll on Windows.
    return any((Path(torch.origin).parent / "lib").glob("*torch_cuda*"))


def ram(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """RAM in all and free, within what a container is allowed (cgroup v2)."""
    memory = psutil.virtual_memory()
    limit = _words(cgroup / "memory.max")
    # "max" where there is no limit.
    if not limit or not limit[0].isdecimal() or int(limit[0]) >= memory.total:
        return memory.total, memory.available
    used = int((_words(cgroup / "memory.current") or ["0"])[0])
    # Cached files count as used, and are given up when memory is wanted.
    words = _words(cgroup / "memory.stat")
    if "inactive_file" in words:
        used -= int(words[words.index("inactive_file") + 1])
    total = int(limit[0])
    return total, max(0, min(memory.available, total - used))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
