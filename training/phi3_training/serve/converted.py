"""The run's model as an ONNX folder, converted when it is not there yet for exactly this model.

Reads run/model; writes run/onnx-<precision> and export-onnx-<precision>.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..console import ProgressCallback
from ..run import Run
from .export import Precision, export_onnx


def converted(run: Run, precision: Precision, progress: ProgressCallback) -> Path:
    """The folder, ready for the `ort-genai` engine."""
    model = run.require("model", "phi3 train")
    name = f"onnx-{precision}"
    folder = run.path / name
    wanted = {"of": model["done_id"], "precision": precision}
    done: dict[str, Any] = run.manifest(f"export-{name}") or {}
    if not folder.is_dir() or any(done.get(key) != value for key, value in wanted.items()):
        progress(0, 0, f"converting the model to ONNX ({precision})")
        made = export_onnx(run.path / model["path"], folder, precision)
        run.write_manifest(f"export-{name}", {**made, **wanted, "path": name})
    return folder
