"""The stage `connect`: tells Prompt flow where the endpoint of this run is.

Reads the manifest `endpoint`; writes a connection into Prompt flow's store, the key encrypted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import promptflow_store
from .errors import StageError
from .run import Run

# Settings of the endpoint that a flow wants to know too, where the target has them.
PASSED_ON = ("deployment", "dialect", "context_length")


def connect(
    run: Run, endpoint_manifest: Mapping[str, Any], key: str | None, name: str = "phi3_connection"
) -> dict[str, Any]:
    """Write the connection `name`; the manifest `connection` (no secret in it).

    `key` None: the endpoint takes Microsoft Entra tokens.
    """
    endpoint = str(endpoint_manifest.get("endpoint") or "")
    if not endpoint:
        raise StageError(
            f"The run {run.name!r} has an endpoint.json without an address; do it again with: "
            "phi3 deploy"
        )
    extra = {
        item: str(endpoint_manifest[item]) for item in PASSED_ON if endpoint_manifest.get(item)
    }
    promptflow_store.write_connection(name, endpoint, key, extra_configs=extra)
    protection = promptflow_store.key_protection()
    return {
        "name": name,
        "endpoint": endpoint,
        **extra,
        "store": str(promptflow_store.database()),
        "protection": protection,
        "choices": [protection],
    }
