"""Several peft adapters over one base, in memory once: each one an engine with its own name.

Reads the base model's folder and the adapters' folders.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ...errors import StageError
from ...models.layers import check_adapter
from .base import Engine, NamedEngines
from .batch import Logits
from .tokens import TokenEngine
from .transformers import CachedRows, step_model

# peft's name for the adapter of the run itself. The others get numbers there: peft takes no dots.
_OWN = "own"


def load(
    base_dir: Path,
    own: Path,
    adapters: Mapping[str, Path],
    *,
    own_names: tuple[str, ...],
    slots: int,
    num_threads: int | None = None,
) -> NamedEngines:
    """Load base and adapters; `own` is what answers under `own_names` and under no name.

    Raises StageError when one of them cannot be loaded.
    """
    shared = _Shared(step_model(base_dir, num_threads).model, base_dir, own)
    keys = {name: f"adapter{number}" for number, name in enumerate(adapters)}
    for name, folder in adapters.items():
        shared.add(keys[name], name, folder)

    def engine(key: str) -> Engine:
        rows = AdapterRows(shared, key)
        return TokenEngine.of_folder("transformers", base_dir, rows, slots=slots)

    others = {name: engine(key) for name, key in keys.items()}
    return NamedEngines(engine(_OWN), own_names, others)


class _Shared:
    """The one model in memory; one adapter is switched on at a time."""

    def __init__(self, base: Any, base_dir: Path, own: Path) -> None:
        self._base_dir = base_dir
        self._turn = threading.Lock()
        self._current = _OWN
        with _loading(_OWN, own):
            check_adapter(own, base_dir)
            self.model: Any = PeftModel.from_pretrained(
                base, own, adapter_name=_OWN, local_files_only=True
            ).eval()

    def add(self, key: str, name: str, folder: Path) -> None:
        """Load one more adapter next to the others."""
        with _loading(name, folder):
            check_adapter(folder, self._base_dir)
            self.model.load_adapter(folder, adapter_name=key, local_files_only=True)
        self.model.eval()

    @contextmanager
    def using(self, key: str) -> Iterator[None]:
        """Switch to the adapter until the block ends; others wait."""
        with self._turn:
            # Switching costs a walk over all layers, so only where the turn goes to another one.
            if self._current != key:
                self.model.set_adapter(key, inference_mode=True)
                self._current = key
            yield


@contextmanager
def _loading(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except StageError as error:
        raise StageError(f"The adapter {name!r} cannot be served. {error}") from None
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise StageError(
            f"The adapter {name!r} in {folder} cannot be loaded over this base model: {error}"
        ) from None


class AdapterRows(CachedRows):
    """The rows of one adapter; see `transformers.CachedRows`."""

    def __init__(self, shared: _Shared, key: str) -> None:
        super().__init__(shared.model)
        self._shared, self._key = shared, key

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Logits:
        with self._shared.using(self._key):
            return super()._forward(ids, mask, cache)
