"""The flow as a WSGI application: Prompt flow's own, with its connection out of the environment.

Reads PHI3_ENDPOINT, PHI3_KEY and what else PHI3_* names; no connection store, no keyring, no file.
"""

import os
from pathlib import Path

import promptflow.core._serving.v1.blueprint.static_web_blueprint as page
from promptflow.core._connection_provider._connection_provider import ConnectionProvider
from promptflow.core._connection_provider._dict_connection_provider import DictConnectionProvider
from promptflow.core._serving.app import create_app
from promptflow.core._utils import init_executable

from phi3_tool.promptflow_fixes import let_the_page_leave_defaults_out

FLOW = Path(__file__).resolve().parent / "flow"
CONFIGS = ("endpoint", "deployment", "dialect", "context_length")


def connection() -> dict[str, object]:
    """A custom connection as Prompt flow describes one, made of the PHI3_ variables."""
    given = {name: os.environ.get(f"PHI3_{name.upper()}", "").strip() for name in (*CONFIGS, "key")}
    return {
        "type": "CustomConnection",
        "module": "promptflow.connections",
        "value": {name: value for name, value in given.items() if value},
        "secret_keys": ["key"],
    }


def names() -> set[str]:
    """The connections that the flow's nodes name."""
    flow = init_executable(flow_path=FLOW / "flow.dag.yaml", working_dir=FLOW)
    connections: set[str] = flow.get_connection_names()
    return connections


# Prompt flow 1.18.5 forgot this import: without it the page at / answers 400.
page.os = os
os.environ["PROMPTFLOW_PROJECT_PATH"] = str(FLOW)
os.chdir(FLOW)
ConnectionProvider._instance = DictConnectionProvider({name: connection() for name in names()})
let_the_page_leave_defaults_out()
app = create_app(engine="flask")
