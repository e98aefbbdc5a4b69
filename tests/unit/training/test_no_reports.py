"""Nothing reports usage from a user's machine because of us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_onnx_runtime_leaves_no_trace_in_home(tmp_path: Path) -> None:
    """ONNX Runtime writes a device id and an event store into HOME unless told not to."""
    pytest.importorskip("onnxruntime")
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)

    subprocess.run(
        [sys.executable, "-c", "import phi3_training, onnxruntime"], env=environment, check=True
    )

    assert list(tmp_path.rglob("*")) == []
