"""What a served flow does better than Prompt flow 1.18 makes it: quiet, with a usable page.

At INFO Prompt flow logs a dozen lines about every request: a sixth of the work of `pf flow serve`,
and errors drown in them. Its page requires every input, those with a default too. Changes Prompt
flow's modules in that process alone and only where it has loaded them; reads PF_LOGGING_LEVEL and
no file.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

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


def let_the_page_leave_defaults_out(title: str = "") -> None:
    """Describe as fields only the conversation and what has no default: before the server is made.

    `title` is what the page shows above the conversation: Prompt flow serves a copy of the flow,
    and would show its temporary folder.

    Prompt flow's page draws a required field for every input of this description, whatever its
    `required` and `default` say, and keeps its button grey until all of them are filled in. The
    inputs that may be left out are named in the body's description, each with its default.
    """
    server = sys.modules.get(_SERVER)
    if server is None or hasattr(server, "phi3_describes"):
        return
    before = server.generate_swagger

    def generate_swagger(flow: Any, *others: Any) -> dict[str, Any]:
        flow.name = title or flow.name
        swagger: dict[str, Any] = before(flow, *others)
        body = swagger["paths"]["/score"]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        optional = []
        for name, about in flow.inputs.items():
            if about.default is not None:
                schema["required"].remove(name)
                if not about.is_chat_history:
                    del schema["properties"][name]
                    optional.append(f"{name} ({about.default!r})")
        if optional:
            body["description"] += f". Optional, with defaults: {', '.join(optional)}"
        return swagger

    server.generate_swagger = generate_swagger  # type: ignore[attr-defined]
    server.phi3_describes = True  # type: ignore[attr-defined]
