"""Model folders: written whole or not at all, and checked for rotary positions nobody computes.

Writes weights, chat template, stop tokens and the tokenizer's files as another folder has them;
replaces the target folder when everything is written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    scratch.chmod(0o755)  # mkdtemp makes it private; a server may run as another user
    old = scratch.with_name(f"{scratch.name}.old")
    try:
        yield scratch
        if target.exists():
            # A folder that is not empty cannot be replaced by a rename: it makes way first.
            target.rename(old)
        scratch.rename(target)
    finally:
        for left in (scratch, old):
            if left.exists():
                shutil.rmtree(left)


def write_model(
    model: PreTrainedModel, chat: ChatFormat, target: Path, tokenizer_from: Path
) -> None:
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


# The kinds that transformers 5 computes (its ROPE_INIT_FUNCTIONS, and no scaling at all).
_KNOWN = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# What Phi-3's first repositories and remote code called longrope; transformers 5 has no such name.
_OLD_LONGROPE = "su"


def check_rope(folder: Path) -> None:
    """Raise StageError for a kind of rotary positions that loading would fail on.

    A folder without a readable config.json passes: its own error is clearer.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None or kind in _KNOWN:
        return
    place = folder / "config.json"
    if kind == _OLD_LONGROPE:
        raise StageError(
            f"{place} names the rotary positions 'su', the old name of 'longrope' that "
            f'transformers no longer reads. Write the new name: sed -i \'s/"su"/"longrope"/\' '
            f"{place}"
        )
    raise StageError(
        f"{place} names rotary positions of the kind {kind!r}, which transformers does not "
        f"compute; expected one of: {', '.join(_KNOWN)}"
    )
