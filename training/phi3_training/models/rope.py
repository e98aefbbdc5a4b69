"""Whether transformers can compute a model's rotary positions. Reads config.json."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import StageError

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
