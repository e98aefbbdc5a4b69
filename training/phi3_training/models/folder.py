"""Writes model folders: weights, tokenizer, chat template and stop tokens, whole or not at all.

Reads the tokenizer files of another folder; replaces the target folder when everything is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..prompt import ChatFormat

# Copied byte by byte: saving a tokenizer through transformers may rewrite how it splits text.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target` that replaces it when the block succeeds.

    What an earlier, killed attempt left is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    scratch.chmod(0o755)
    old = scratch.with_name(f"{scratch.name}.old")
    try:
        yield scratch
        if target.exists():
            target.rename(old)
        scratch.rename(target)
    finally:
        for left in (scratch, old):
            if left.exists():
                shutil.rmtree(left)


def write_model(model: Any, chat: ChatFormat, target: Path, tokenizer_from: Path) -> None:
    """Save `model` into the folder `target`, ready for every loader and server."""
    model.generation_config.eos_token_id = list(chat.stop_token_ids)
    model.generation_config.pad_token_id = chat.pad_token_id
    model.save_pretrained(target)
    copy_tokenizer(tokenizer_from, target)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that `source` has."""
    if source == target:
        return
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
