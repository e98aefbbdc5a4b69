"""Uploads a flow folder and makes a flow of it in the workspace and the Foundry project.

Reads the flow folder; promptflow-azure uploads it with what `additional_includes` names. A flow of
the same content is found by its tag and not made twice.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from ...console import ProgressCallback
from ...errors import MissingExtraError, StageError, UsageError
from ...promptflow_store import quiet
from ...run import Run, fingerprint, sha256_of
from ..base import Manifest
from .clients import Clients
from .failures import explained, message_of, scrub
from .place import Made, note

log = logging.getLogger(__name__)

CONTENT_TAG = "phi3_content"
_SKIPPED = {"__pycache__", ".promptflow", ".git", ".runs"}


def push(
    clients: Clients, run: Run, flow: Path, workspaces: Sequence[str], progress: ProgressCallback
) -> list[Manifest]:
    """Make the flow in each workspace or project; name, page and whether it was there already."""
    if not (flow / "flow.dag.yaml").is_file():
        raise UsageError(f"{flow} is not a flow: expected a flow.dag.yaml in it")
    content = content_of(flow)
    pushed = []
    for workspace in workspaces:
        progress(0, 0, f"flow {flow.name} into {workspace}")
        pushed.append(_push(clients, run, flow, workspace, content))
    return pushed


def content_of(flow: Path) -> str:
    """A hash of the folder's files and of those it includes."""
    roots = [flow]
    graph = yaml.safe_load((flow / "flow.dag.yaml").read_text(encoding="utf-8")) or {}
    roots += [(flow / item).resolve() for item in graph.get("additional_includes") or []]
    found = []
    for root in roots:
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for path in files:
            inside = path.relative_to(root.parent)
            if not _SKIPPED.intersection(inside.parts) and path.suffix != ".pyc":
                found.append([inside.as_posix(), sha256_of(path)])
    return fingerprint(found)


def _push(clients: Clients, run: Run, flow: Path, workspace: str, content: str) -> Manifest:
    client = _client(clients, workspace)
    doing = f"Pushing the flow {flow.name} into {workspace}"
    known = _same(client, content, doing)
    if known is not None:
        return _told(known, workspace, "exists")
    note(run, Made("flow", flow.name, workspace))
    made = _asked(
        doing,
        lambda: client.flows.create_or_update(
            flow=str(flow),
            display_name=flow.name,
            type="chat",
            tags={CONTENT_TAG: content, "phi3_run": run.name},
        ),
    )
    return _told(made, workspace, "made")


def _client(clients: Clients, workspace: str) -> Any:
    """promptflow-azure's client, with our sign-in, retries and polls."""
    quiet()
    try:
        from promptflow.azure import PFClient
    except ImportError as error:
        raise MissingExtraError(error.name or "promptflow-azure", "flow,azure") from None
    return _asked(
        f"Opening Prompt flow in {workspace}", lambda: PFClient(ml_client=clients.ml_of(workspace))
    )


def _same(client: Any, content: str, doing: str) -> Any | None:
    """A flow of the same content; None also where the list cannot be had, which is a help only."""
    try:
        listed = _asked(doing, lambda: client.flows.list(max_results=100))
    except StageError as error:
        log.info("flows cannot be listed: %s", error)
        return None
    return next((flow for flow in listed if (flow.tags or {}).get(CONTENT_TAG) == content), None)


def _asked(doing: str, ask: Any) -> Any:
    """Call promptflow-azure: without what it prints, and with its errors in our words."""
    from promptflow.exceptions import PromptflowException

    try:
        with redirect_stdout(io.StringIO()), explained(doing):
            return ask()
    except PromptflowException as error:
        inner = getattr(error, "inner_exception", None)
        said = message_of(inner) if inner is not None else scrub(str(error).strip())
        raise StageError(
            f"{doing} failed: {said.splitlines()[0] if said else type(error).__name__}.\n"
            "Mend: type the same command again; a flow that is there is not made twice"
        ) from None


def _told(flow: Any, workspace: str, how: str) -> Manifest:
    return {
        "workspace": workspace,
        "flow": str(flow.name),
        "display_name": str(flow.display_name),
        "page": getattr(flow, "flow_portal_url", None),
        "state": how,
    }
