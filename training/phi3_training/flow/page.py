"""Prompt flow's own chat page on a flow, in a Prompt flow home of its own that is gone afterwards.

Writes a copy of the flow, settings and a connection without a key into a temporary folder; starts
Prompt flow's service and the served flow, which get endpoint and key in their environment.

`pf flow test --ui` is not used: it watches the flow's folder and reads `.promptflow/ux_inputs.json`
every 0.1 s while the service truncates and rewrites that file after each answer. A read in between
is a JSONDecodeError that ends the page (promptflow-devkit 1.18.5, `monitor_utils.py`).
"""

from __future__ import annotations

import base64
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import requests
import yaml

from phi3_tool.connection import ConnectionSettings
from phi3_tool.embedders import FOLDER_VARIABLE
from phi3_tool.index import INDEX_VARIABLE

from .. import processes
from ..errors import MissingExtraError, StageError
from ..packages import RULES, Installed, installed
from ..processes import free_port
from .bundle import CONNECTION_SCHEMA, copy_flow
from .source import DAG, FlowSource, connection_of

#: Prompt flow's command line with this interpreter; `pf` itself may not be on the PATH.
PF_MAIN = "from promptflow._cli.pf import main; main()"
# No usage report, which waits up to ten seconds where the network blocks it; no service for traces,
# which Prompt flow would start (170 MB of memory) and leave running.
_QUIET = "telemetry:\n  enabled: false\ntrace:\n  destination: none\n"
READY_SECONDS = 120.0
_POLL = 0.2
_SHOWN_LINES = 8
#: What finds the index and its embedder; the other PHI3_ variables would change the connection.
_DOCUMENTS = (INDEX_VARIABLE, FOLDER_VARIABLE, "PHI3_EMBEDDINGS_KEY")


@dataclass(frozen=True)
class Page:
    """An open chat page."""

    url: str
    _processes: tuple[psutil.Popen, ...]
    _log: Path
    _key: str

    def wait(self) -> None:
        """Until the page dies by itself, which is an error; a KeyboardInterrupt goes through."""

        def died(_process: psutil.Process) -> None:
            raise StageError(f"The chat page stopped unexpectedly.\n{_tail(self._log, self._key)}")

        psutil.wait_procs(self._processes, timeout=None, callback=died)


def environment_of(settings: ConnectionSettings) -> dict[str, str]:
    """The PHI3_ variables that mean these settings to the flow's node and to every command."""
    named = {
        "PHI3_ENDPOINT": settings.endpoint,
        "PHI3_KEY": settings.key,
        "PHI3_DEPLOYMENT": settings.deployment,
        "PHI3_DIALECT": settings.dialect,
        "PHI3_CONTEXT_LENGTH": settings.context_length,
    }
    return {name: str(value) for name, value in named.items() if value is not None}


@contextmanager
def chat_page(
    flow: Path,
    settings: ConnectionSettings,
    defaults: Mapping[str, Any],
    version_of: Installed = installed,
) -> Iterator[Page]:
    """Open the page; everything that was started and written is gone when the block ends.

    `defaults` replaces defaults of the flow's inputs. Raises StageError where no page comes up.
    """
    if importlib.util.find_spec("promptflow") is None:
        raise MissingExtraError("promptflow", "flow")
    version = version_of("filelock")
    rule = next(rule for rule in RULES if rule.package == "filelock")
    if version and rule.broken_by(version):
        raise StageError(
            f"The chat page does not work with filelock {version}: {rule.why}. Fix it with: "
            f"{rule.fix}"
        )
    source = FlowSource.read(flow)
    with tempfile.TemporaryDirectory(prefix="phi3-chat-") as name:
        folder = Path(name)
        copy = folder / source.name
        copy_flow(source, copy)
        # In the copy: what the command line says is what the page's conversations use.
        dag = yaml.safe_load((copy / DAG).read_text(encoding="utf-8"))
        inputs = dag.get("inputs") or {}
        for input_name, value in defaults.items():
            if input_name not in inputs:
                raise StageError(f"The flow has no input {input_name!r}, so the page cannot set it")
            inputs[input_name]["default"] = value
        text = yaml.safe_dump(dag, sort_keys=False, allow_unicode=True)
        (copy / DAG).write_text(text, encoding="utf-8")
        connection = connection_of(source.dag)
        environment = page_environment(folder, settings)
        log = folder / "page.log"
        started: list[psutil.Popen] = []
        try:
            with log.open("wb") as stream:
                yield _open(copy, connection, environment, started, stream, log, settings.key)
        finally:
            processes.end(started, seconds=5)


def _open(
    copy: Path,
    connection: str | None,
    environment: dict[str, str],
    started: list[psutil.Popen],
    stream: Any,
    log: Path,
    key: str,
) -> Page:
    """The connection, then the service, then the served flow."""

    def start(*arguments: str) -> psutil.Popen:
        process = psutil.Popen(
            [sys.executable, "-c", PF_MAIN, *arguments],
            cwd=copy.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # Ctrl-C is ours; what runs here is stopped in order
        )
        started.append(process)
        return process

    if connection is not None:  # before the service: both rewrite pf.yaml, and each may read half
        # For Prompt flow to see one: the node takes the environment's.
        nowhere = {
            "$schema": CONNECTION_SCHEMA,
            "type": "custom",
            "name": connection,
            "configs": {"endpoint": "in-the-environment"},
            "secrets": {"key": "in-the-environment"},
        }
        file = copy.parent / "connection.yaml"
        file.write_text(yaml.safe_dump(nowhere), encoding="utf-8")
        written = start("connection", "create", "--file", str(file))
        if written.wait(READY_SECONDS):
            raise StageError(f"Prompt flow did not accept the connection.\n{_tail(log, key)}")
        started.remove(written)
    service_port = free_port()
    # In the foreground: else it detaches itself, and nothing would stop it.
    service = start("service", "start", "--debug", "--port", str(service_port))
    _wait_for(f"http://127.0.0.1:{service_port}/heartbeat", service, log, key)
    flow_port = str(free_port())
    arguments = ["flow", "serve", "--source", str(copy), "--skip-open-browser"]
    served = start(*arguments, "--port", flow_port)
    _wait_for(f"http://127.0.0.1:{flow_port}/health", served, log, key)
    # As `construct_chat_page_url` of promptflow-devkit 1.18.5 writes it.
    definition = str((copy / DAG).resolve())
    query = urlencode(
        {
            "flow": base64.urlsafe_b64encode(definition.encode()).decode(),
            "serve_app_port": flow_port,
            "enable_internal_features": "false",
        }
    )
    url = f"http://127.0.0.1:{service_port}/v1.0/ui/chat?{query}"
    return Page(url, (service, served), log, key)


def page_environment(folder: Path, settings: ConnectionSettings) -> dict[str, str]:
    """The environment of the page's processes: theirs is the Prompt flow home in `folder`."""
    home = quiet_home(folder)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PHI3_") or name in _DOCUMENTS
    }
    return {
        **inherited,
        **environment_of(settings),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PF_HOME_DIRECTORY": str(home),
        # A separate keyring, in this folder: the user's own is neither needed nor touched.
        "PYTHON_KEYRING_BACKEND": "keyrings.alt.file.PlaintextKeyring",
        "XDG_DATA_HOME": str(folder / "data"),
        "APPLICATIONINSIGHTS_CONTROLPLANE_DISABLED": "true",
    }


def _wait_for(url: str, process: psutil.Popen, log: Path, key: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with requests.Session() as session:
        session.trust_env = False  # this machine is queried directly, never through a proxy
        # Ends at once when the process has died, with what it said last.
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if session.get(url, timeout=5).ok:
                    return
            except requests.exceptions.RequestException:
                time.sleep(_POLL)
    raise StageError(f"Prompt flow's chat page did not start.\n{_tail(log, key)}")


def _tail(log: Path, key: str) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    # The log has what Prompt flow prints, and that is not in our hands.
    text = text.replace(key, "***") if key else text
    lines = [f"  {line.strip()}" for line in text.splitlines() if line.strip()]
    shown = "\n".join(lines[-_SHOWN_LINES:]) or "  It printed nothing."
    return f"{shown}\nCheck what it needs with: phi3 doctor"


def quiet_home(folder: Path) -> Path:
    """Make a Prompt flow home in `folder` for PF_HOME_DIRECTORY; silent, see _QUIET."""
    home = folder / ".promptflow"
    home.mkdir()
    (home / "pf.yaml").write_text(_QUIET, encoding="utf-8")
    return home
