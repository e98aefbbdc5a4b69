"""A Prompt flow folder made ready to travel: with its tool's source, and nothing it does not need.

Reads a flow folder; writes a folder and a zip file that is the same, byte for byte, every time.
"""

from __future__ import annotations

from .pack import Bundle, copy_flow, pack
from .source import FlowSource

__all__ = ["Bundle", "FlowSource", "copy_flow", "pack"]
