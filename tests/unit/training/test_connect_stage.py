"""What `connect` and `ask` refuse before Prompt flow is asked anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_training.errors import StageError, UsageError
from phi3_training.flow.ask import ask
from phi3_training.flow.store import connect
from phi3_training.manifests import EndpointManifest

ENDPOINT = EndpointManifest(endpoint="http://127.0.0.1:1/score")


def test_empty_key_is_refused() -> None:
    with pytest.raises(StageError, match=r"key is empty.*phi3 deploy"):
        connect(ENDPOINT, " \n")


@pytest.mark.parametrize("name", ["", "two words", "../up", "x" * 65])
def test_odd_connection_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"connection\.name=NAME"):
        connect(ENDPOINT, "key", name)


def test_folder_without_a_flow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a flow: expected a flow\.dag\.yaml"):
        ask(tmp_path, "Hi")
