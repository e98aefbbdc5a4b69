"""Session fixtures of the endpoint's tests.

A plugin (`pytest_plugins = …`), so that all test modules share one taught model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from tests.integration.server_fixture import Taught, taught_in, teach
from tests.shared import shared

from phi3_training.serve.engines.base import Engine


@pytest.fixture(scope="session")
def taught() -> Taught:
    """One taught model for the whole test run."""
    return taught_in(shared("taught", teach))


@pytest.fixture(scope="session")
def engine(taught: Taught) -> Iterator[Engine]:
    """The onnxruntime engine on the taught model."""
    from phi3_training.serve.engines import onnxruntime

    loaded = onnxruntime.load(taught.onnx_dir, slots=40)
    yield loaded
    asyncio.run(loaded.close())
