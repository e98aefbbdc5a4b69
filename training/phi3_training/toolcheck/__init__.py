"""Builds the wheel, installs it where nothing else of this project is, and looks for the tool.

Reads the clone; writes into temporary folders only.
"""

from .check import check_tool, check_wheel

__all__ = ["check_tool", "check_wheel"]
