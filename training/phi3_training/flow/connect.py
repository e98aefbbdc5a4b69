"""The stage `connect`: writes the Prompt flow connections that lead to the run's endpoint.

Reads the manifest `endpoint`; writes a connection into Prompt flow's store, the key encrypted.
"""

from __future__ import annotations

from typing import Any

from phi3_tool.connection import in_dialect
from phi3_tool.wire import Dialect

from ..manifests import ConnectionManifest, EndpointManifest
from ..run import fingerprint
from . import store

# Settings of the endpoint that a flow needs as well, if the target has them.
PASSED_ON = ("deployment", "dialect", "context_length")
_LONGEST = 64  # characters of a connection's name


def own_name(name: str, run: str) -> str:
    """The name of the run's own connection, made of the flow's `name`; at most 64 characters."""
    own = f"{name}_{run}"
    return own if len(own) <= _LONGEST else f"{own[: _LONGEST - 9]}_{fingerprint(own)[:8]}"


def connect(
    deployed: EndpointManifest,
    key: str | None,
    name: str = "phi3_connection",
    dialect: Dialect = "score",
    run: str | None = None,
) -> ConnectionManifest:
    """Write the connection `name`, and the own one of `run`; the manifest (no secret in it).

    `key` None: the endpoint takes Microsoft Entra tokens. `dialect` chooses the path at the same
    endpoint: /score, or OpenAI's, which streams. Flows name `name`, which leads to the current run;
    the run's own connection keeps its key when another run becomes the current one.
    """
    endpoint = deployed.endpoint
    extra: dict[str, Any] = {
        item: str(value) for item in PASSED_ON if (value := getattr(deployed, item))
    }
    in_path = in_dialect(endpoint, dialect)
    if in_path != endpoint:
        endpoint = in_path
        extra.pop("dialect", None)  # the path says it now
    store.write_connection(name, endpoint, key, extra_configs=extra)
    if run is not None:
        extra["own"] = own_name(name, run)
        store.copy_connection(name, extra["own"])
    protection = store.key_protection()
    return ConnectionManifest(
        name=name,
        endpoint=endpoint,
        **extra,
        store=str(store.database()),
        protection=protection,
        choices=[protection],
    )
