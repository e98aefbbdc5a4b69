"""Up to which length a model's rows may share a batch. Reads config.json.

LongRoPE models (Phi-3 128k, Phi-4-mini) rotate all rows of a batch by one of two tables, chosen by
the longest row: a row beyond the switch would change its neighbours' answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...prompt_parts import read_json

# Kinds whose rotation of a token depends on its own position only.
_PLAIN = frozenset({None, "default", "linear", "yarn", "llama3"})


def share_limit(model_dir: Path) -> int | None:
    """The length at which the rotation switches; None where it never does."""
    config = read_json(model_dir / "config.json")
    ropes = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    given: list[dict[str, Any]] = [rope for rope in ropes if isinstance(rope, dict)]
    if {rope.get("rope_type", rope.get("type")) for rope in given} <= _PLAIN:
        return None
    lengths = [source.get("original_max_position_embeddings") for source in (*given, config)]
    lengths.append(config.get("max_position_embeddings"))
    return next((length for length in lengths if isinstance(length, int)), 0)
