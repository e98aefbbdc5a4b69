"""Uploads a packed flow and makes a flow of it in the workspace and the Foundry project.

Reads the bundle's folder, which promptflow-azure uploads. A flow of the same content is found by
its tag and not made twice.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from ...bundle import Bundle
from ...console import ProgressCallback
from ...errors import MissingExtraError, StageError
from ...promptflow_store import quiet
from ...run import Run
from ..base import Manifest
from .clients import Clients
from .failures import explained, message_of, scrub
from .place import Made, note, noted

log = logging.getLogger(__name__)

CONTENT_TAG = "phi3_content"


def push(
    clients: Clients,
    run: Run,
    bundle: Bundle,
    workspaces: Sequence[str],
    progress: ProgressCallback,
) -> list[Manifest]:
    """Make the flow in each workspace or project; name, page and whether it was there already."""
    pushed = []
    for workspace in workspaces:
        progress(0, 0, f"flow {bundle.folder.name} into {workspace}")
        pushed.append(_push(clients, run, bundle, workspace))
    return pushed


def _push(clients: Clients, run: Run, bundle: Bundle, workspace: str) -> Manifest:
    name, content = bundle.folder.name, bundle.sha256
    client = _client(clients, workspace)
    doing = f"Pushing the flow {name} into {workspace}"
    begun = Made("flow", name, workspace)
    known = _same(client, content, doing, must_know=begun in noted(run, "flow"))
    if known is not None:
        return _told(known, workspace, "exists")
    note(run, begun)
    made = _asked(
        doing,
        lambda: client.flows.create_or_update(
            flow=str(bundle.folder),
            display_name=name,
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


def _same(client: Any, content: str, doing: str, *, must_know: bool) -> Any | None:
    """A flow of the same content. StageError where one may be there and no list can be had."""
    try:
        listed = _asked(doing, lambda: client.flows.list(max_results=100))
    except StageError as error:
        if must_know:
            raise
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
