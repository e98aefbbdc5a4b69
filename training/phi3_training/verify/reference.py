"""The reference: transformers' own `apply_chat_template`, as other programs load the model.

Reads a model folder through AutoTokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from ..errors import StageError


class TemplateRefusalError(Exception):
    """The template does not take this conversation."""


class Reference:
    """Prompts and rows of one folder as transformers writes them."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise StageError(
                f"transformers cannot load the tokenizer in {folder}: {error}; "
                "train again with: phi3 train"
            ) from None

    def ids(self, messages: Sequence[dict[str, str]], *, prompt: bool) -> list[int]:
        """Token ids with (or without) the opening of the next answer."""
        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise TemplateRefusalError(str(error)) from None
        return [int(token) for token in ids]
