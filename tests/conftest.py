"""Every test gets a HOME of its own and may speak to this machine only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOOPBACK = ("127.", "::1", "localhost")
# Read when huggingface_hub is imported, which may be while tests are collected.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's HOME, Prompt flow home, caches or endpoint variables."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "USERPROFILE"):
            patch.setenv(name, str(home))
        patch.setenv("PF_HOME_DIRECTORY", str(home / ".promptflow"))
        # The Azure SDKs' telemetry leaves folders there.
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        ours = ("PHI3_ENDPOINT", "PHI3_KEY", "PHI3_RUNS", "PHI3_CACHE")
        for name in (*ours, "HF_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
            patch.delenv(name, raising=False)
        # No package index: a recipe that wants pretrained weights takes the tiny model.
        patch.setenv("PIP_NO_INDEX", "1")
        yield home


@pytest.fixture(scope="session", autouse=True)
def loopback_only() -> Iterator[None]:
    """A test that tries to leave this machine fails at once, with the address."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and not str(host).startswith(LOOPBACK):
            raise OSError(f"tests may not connect to {host!r}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield
