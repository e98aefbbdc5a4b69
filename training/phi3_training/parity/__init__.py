"""Train↔serve parity: does every place that writes a prompt write the tokens that were trained?

Reads model folders and talks to the server's own code in this process; writes nothing.
"""

from .check import Places, check_tokens, places_of_folder, places_of_run
from .report import Report

__all__ = ["Places", "Report", "check_tokens", "places_of_folder", "places_of_run"]
