"""The chat page's processes: what of the user's environment reaches them."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_tool import ConnectionSettings
from phi3_training.flow.page import page_environment


def test_the_page_finds_the_documents_and_no_other_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the index, every answer of `phi3 chat --rag --web` was an error."""
    documents = {"PHI3_INDEX": "/i", "PHI3_EMBEDDER": "/e", "PHI3_EMBEDDINGS_KEY": "planted-1"}
    for name, value in {**documents, "PHI3_KEY": "planted-2", "PHI3_DIALECT": "x"}.items():
        monkeypatch.setenv(name, value)
    made = page_environment(tmp_path, ConnectionSettings("http://127.0.0.1:1/score", "mine"))
    given = {name: value for name, value in made.items() if name.startswith("PHI3_")}
    assert given == {
        **documents, "PHI3_ENDPOINT": "http://127.0.0.1:1/score", "PHI3_KEY": "mine",
    }  # fmt: skip
