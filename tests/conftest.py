"""Every test gets a HOME of its own and may speak to this machine only."""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

LOOPBACK = ("127.", "::1", "localhost")
# Read when huggingface_hub is imported, which may be while tests are collected.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's background job (`make test &`) ignores Ctrl-C, and so would every program that a test
# starts and ends by it: the test would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The models are tiny and there are more workers than cores: a second thread of torch only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of all workers (see shared.py, forked.py): made by the process that starts them, removed by it.
OWNS_SHARED = "PHI3_TESTS_SHARED" not in os.environ
if OWNS_SHARED:
    os.environ["PHI3_TESTS_SHARED"] = tempfile.mkdtemp(prefix="phi3-tests-")

# The files that take longest, those first: else a worker is alone with one of them at the end.
LONGEST = (
    "test_up.py",
    "test_azure_rehearsal.py",
    "test_resume.py",
    "test_search.py",
    "test_rehearsal_jobs.py",
    "test_azure_train.py",
    "test_rehearsal_rollout.py",
    "test_readme_commands.py",  # after test_up.py, whose model it takes
    "test_promptflow.py",
    "test_chat_web.py",
    "test_gate_journey.py",
    "test_phi_family.py",
    "test_doctor.py",
    "test_key_leaks.py",
    "test_agent_parity.py",
    "test_flow_serve.py",
    "test_eval_flow.py",
    "test_streaming.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes longest (`--no-loadscope-reorder` keeps this order)."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove what the workers shared."""
    if OWNS_SHARED:
        shutil.rmtree(os.environ["PHI3_TESTS_SHARED"], ignore_errors=True)


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
def stacks_without_source() -> Iterator[None]:
    """azure.ai.ml looks at the names in the stack for each client that it makes.

    inspect.stack() reads the source of every frame beside them: 0.3 s, as deep as pytest is.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", partial(inspect.stack, 0))
        yield


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
