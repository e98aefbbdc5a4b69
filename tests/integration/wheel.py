"""The wheel of this project, built once for all workers of a test run."""

from __future__ import annotations

from pathlib import Path

from tests.forked import ROOT
from tests.shared import shared

from phi3_training.doctor.package_tool import build


def built_wheel() -> Path:
    """The wheel's file. Nobody may change it."""
    (wheel,) = shared("wheel", lambda folder: build(ROOT, folder)).glob("wheel/*.whl")
    return wheel
