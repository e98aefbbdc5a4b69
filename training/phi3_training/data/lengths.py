"""How long conversations are in tokens: counted with a tokenizer, or estimated without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..prompt import ChatFormat
from .arrays import Ints
from .table import Table

SAMPLE = 1000
_BYTES_PER_TOKEN = 4.0  # of English text with tokenizers of the usual size


def lengths(table: Table, rows: Ints, tokenizer: Path | None) -> dict[str, Any] | None:
    """Statistics over some rows; None when there are none."""
    if not len(rows):
        return None
    sizes = table.text_size[rows].astype(np.float64)
    if tokenizer is None:
        return _summary(sizes / _BYTES_PER_TOKEN, "estimated as a token for every 4 bytes of text")
    chat = _format(tokenizer)
    picked = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64))
    counted = np.array([_count(chat, table, int(row)) for row in rows[picked]], np.float64)
    if len(picked) == len(rows):
        return _summary(counted, f"counted with the tokenizer of {tokenizer}")
    share = counted.sum() / max(sizes[picked].sum(), 1.0)
    how = f"estimated from {len(picked)} rows counted with the tokenizer of {tokenizer}"
    return _summary(sizes * share, how)


def _format(folder: Path) -> ChatFormat:
    try:
        return ChatFormat.from_folder(folder)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _count(chat: ChatFormat, table: Table, row: int) -> int:
    messages = [message.to_dict() for message in table.conversation(row).messages]
    return len(chat.encode_example(messages).input_ids)


def _summary(tokens: npt.NDArray[np.float64], how: str) -> dict[str, Any]:
    median, high = np.percentile(tokens, [50, 95])
    return {
        "rows": len(tokens),
        "median": round(float(median)),
        "mean": round(float(tokens.mean()), 1),
        "p95": round(float(high)),
        "longest": round(float(tokens.max())),
        "total": round(float(tokens.sum())),
        "how": how,
    }


def sentence(stats: dict[str, Any]) -> str:
    """The statistics on one line."""
    return (
        f"tokens: median {stats['median']}, 95 % up to {stats['p95']}, longest {stats['longest']}, "
        f"{stats['total']} in all ({stats['how']})"
    )
