"""Spares a served flow the dozen lines that Prompt flow logs about every request at INFO.

Changes Prompt flow's own loggers in that process alone; reads PF_LOGGING_LEVEL and no file.
"""

from __future__ import annotations

import logging
import os
import sys

_SERVER = "promptflow.core._serving.app_base"
_LOGGERS = "promptflow._utils.logger_utils"


def quiet_when_served() -> None:
    """Prompt flow's log at ERROR if this process serves the flow and no other level is set."""
    # Writing those lines is a sixth of the work of `pf flow serve`, and errors drown in them.
    if _SERVER not in sys.modules or os.environ.get("PF_LOGGING_LEVEL"):
        return
    # Setting PF_LOGGING_LEVEL is too late here: Prompt flow reads it when it is imported.
    factory = getattr(sys.modules.get(_LOGGERS), "LoggerFactory", None)
    for logger in getattr(factory, "_existing_loggers", ()):
        logger.setLevel(logging.ERROR)
