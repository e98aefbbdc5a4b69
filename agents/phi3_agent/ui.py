"""`phi3 agent ui`: Microsoft's DevUI with the agent and the workflow in it, on this machine.

DevUI is a sample app for developers, not for production; it needs agent-framework-devui.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from agent_framework import Agent

from phi3_tool.errors import ConfigurationError

from .client import Phi3ChatClient
from .workflow import create_rag_workflow, create_workflow

#: DevUI's own variable for its key.
TOKEN = "DEVUI_AUTH_TOKEN"  # noqa: S105 - a variable's name


def show(
    agent: Agent[Any], client: Phi3ChatClient, *, rag: bool, host: str, port: int, browse: bool
) -> int:
    """Serve the page until Ctrl-C; raises ConfigurationError where DevUI is not installed."""
    try:
        from agent_framework_devui import serve
    except ModuleNotFoundError:
        raise ConfigurationError(
            "DevUI is not installed in this environment; install it with: "
            f"{sys.executable} -m pip install --pre agent-framework-devui"
        ) from None
    # Both are listed on the page: the agent for conversations, the workflow with its nodes to see.
    workflow = create_rag_workflow(client, Path()) if rag else create_workflow(client)
    # A key in any case: the page can start conversations that cost money.
    token = os.environ.get(TOKEN, "").strip() or secrets.token_urlsafe(16)
    sys.stderr.write(f"DevUI at http://{host}:{port}, until Ctrl-C; its key: {token}\n")
    with contextlib.suppress(KeyboardInterrupt):
        serve(
            entities=[agent, workflow],
            host=host,
            port=port,
            auto_open=browse,
            auth_token=token,
        )
    return 0
