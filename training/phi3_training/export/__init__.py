"""Exports a tuned model in another form and proves that it still is the same model.

Reads a run's base, adapter and model; writes run/onnx-<precision> and export-<format>.json.
torch is imported inside the functions only, so that the package itself is cheap to import.
"""

from __future__ import annotations

from .limits import FORMATS, Format
from .run import export

__all__ = ["FORMATS", "Format", "export"]
