"""The stage `connect`: tells Prompt flow where the endpoint of this run is.

Reads the manifest `endpoint`; writes a connection into Prompt flow's store, the key encrypted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_tool.connection import in_dialect
from phi3_tool.wire import Dialect

from ..errors import StageError
from ..run import Run
from . import store

# Settings of the endpoint that a flow needs as well, if the target has them.
PASSED_ON = ("deployment", "dialect", "context_length")


def connect(
    run: Run,
    endpoint_manifest: Mapping[str, Any],
    key: str | None,
    name: str = "phi3_connection",
    dialect: Dialect = "score",
) -> dict[str, Any]:
    """Write the connection `name`; the manifest `connection` (no secret in it).

    `key` None: the endpoint takes Microsoft Entra tokens. `dialect` chooses the path at the same
    endpoint: /score, or OpenAI's, which streams.
    """
    endpoint = str(endpoint_manifest.get("endpoint") or "")
    if not endpoint:
        raise StageError(
            f"The run {run.name!r} has an endpoint.json without an address; deploy again with: "
            f"phi3 deploy"
        )
    extra = {
        item: str(endpoint_manifest[item]) for item in PASSED_ON if endpoint_manifest.get(item)
    }
    asked = in_dialect(endpoint, dialect)
    if asked != endpoint:
        endpoint = asked
        extra.pop("dialect", None)  # the path tells it now
    store.write_connection(name, endpoint, key, extra_configs=extra)
    protection = store.key_protection()
    return {
        "name": name,
        "endpoint": endpoint,
        **extra,
        "store": str(store.database()),
        "protection": protection,
        "choices": [protection],
    }
