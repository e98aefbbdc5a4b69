"""Prompt flow's own connection store: writes, reads and deletes the connection of a run.

Reads and writes `pf.sqlite` in Prompt flow's home (~/.promptflow) through Prompt flow's SDK, which
also reads the connections of a workspace. Besides ask.py the only module here that imports it. The
key is never logged or shown.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3_tool.connection import ENTRA, ConnectionSettings
from phi3_tool.errors import Phi3Error

from . import keyring_guard, keyring_probe
from .errors import MissingExtraError, StageError, UsageError

WRITER = {"written_by": "phi3-promptflow"}  # how we know our own connections again
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class StoreError(StageError):
    """The store refuses, or what it holds cannot be used."""


def write_connection(
    name: str, endpoint: str, key: str | None, *, extra_configs: Mapping[str, str] | None = None
) -> None:
    """Put endpoint and key under `name`, replacing only a connection that was written here.

    Without a key the connection says to sign in with Microsoft Entra ID. Raises StoreError for
    somebody else's connection and KeyringError where no key can be kept.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a connection name: expected letters, digits, '_', '.' and '-', "
            "starting with a letter or digit; set it with connection.name=NAME"
        )
    if key is not None and not key.strip():
        raise StoreError("The endpoint's key is empty; start the endpoint with: phi3 deploy")
    keyring_guard.find_keeper()
    _refuse_foreign(name)
    configs = {"endpoint": endpoint.strip(), **(extra_configs or {}), **WRITER}
    connection = _sdk("promptflow.connections").CustomConnection(
        name=name,
        configs=configs,
        # Prompt flow refuses a custom connection without any secret.
        secrets={"auth": ENTRA} if key is None else {"key": key.strip()},
    )
    with _errors_of_the_store("write", name):
        _sdk("promptflow.client").PFClient().connections.create_or_update(connection)
    keyring_guard.keep_private(database())


def read_connection(name: str) -> tuple[str, str]:
    """Endpoint and key of the connection `name`; raises StoreError where either is missing."""
    try:
        settings = ConnectionSettings.from_connection(stored_connection(name))
    except Phi3Error as error:
        raise StoreError(str(error)) from None
    return settings.endpoint, settings.key


def stored_connection(name: str) -> Any:
    """Prompt flow's own CustomConnection object of that name, with its secrets."""
    row = _row(name)
    if row is None:
        raise StoreError(f"Prompt flow has no connection {name!r}; write it with: phi3 connect")
    if row.connectionType != "Custom":
        raise StoreError(
            f"The connection {name!r} is of type {row.connectionType}, a custom one is needed; "
            "name another with connection.name=NAME"
        )
    keyring_guard.find_keeper()
    keyring = importlib.import_module("keyring")
    if keyring.get_password(keyring_probe.SYSTEM, keyring_probe.NAME) is None:
        raise StoreError(
            f"The key that encrypts the connection {name!r} is no longer in this machine's "
            f"keyring; {_write_anew(name)}"
        )
    with _errors_of_the_store("read", name):
        return _sdk("promptflow.client").PFClient().connections.get(name, with_secrets=True)


def workspace_connection(workspace: tuple[str, str, str], name: str, credential: Any) -> Any:
    """The CustomConnection of a workspace (subscription, group, name), as Prompt flow reads it.

    Raises StoreError where Prompt flow cannot read it.
    """
    provider = _sdk("promptflow.core._connection_provider._workspace_connection_provider")
    exceptions = _sdk("promptflow.exceptions")
    try:
        return provider.WorkspaceConnectionProvider(*workspace, credential=credential).get(name)
    except exceptions.PromptflowException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"Prompt flow cannot read the connection {name!r} of the workspace {workspace[2]}: "
            f"{reason}. It needs the role Azure Machine Learning Workspace Connection Secrets "
            "Reader there; roles take minutes to act"
        ) from None


def delete_connection(name: str) -> bool:
    """Delete a connection that was written here; False where there is none of that name."""
    if _row(name) is None:
        return False
    _refuse_foreign(name)
    with _errors_of_the_store("delete", name):
        _sdk("promptflow.client").PFClient().connections.delete(name)
    return True


def key_protection() -> str:
    """One line: what keeps the stored key from other people's eyes."""
    return keyring_guard.describe(keyring_guard.find_keeper())


def database() -> Path:
    """Where Prompt flow keeps its connections."""
    return Path(_sdk("promptflow._sdk._constants").LOCAL_MGMT_DB_PATH)


def quiet() -> None:
    """Keep Prompt flow from talking and from telemetry in this process alone.

    The user's own settings stay as they are. To be called before Prompt flow is imported.
    """
    os.environ.setdefault("PF_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("APPLICATIONINSIGHTS_CONTROLPLANE_DISABLED", "true")
    os.environ.setdefault("APPLICATIONINSIGHTS_STATSBEAT_DISABLED_ALL", "true")
    logging.getLogger("promptflow._sdk._telemetry").disabled = True


def _sdk(module: str) -> Any:
    quiet()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "promptflow", "flow") from None


def _row(name: str) -> Any | None:
    """The store's row, secrets still encrypted: readable without any keyring."""
    with _errors_of_the_store("read", name):
        return _sdk("promptflow._sdk._orm").Connection.get(name, raise_error=False)


def _refuse_foreign(name: str) -> None:
    row = _row(name)
    if row is None:
        return
    if row.connectionType == "Custom":
        stored = json.loads(row.customConfigs or "{}")
        if all(stored.get(item, {}).get("value") == value for item, value in WRITER.items()):
            return
    raise StoreError(
        f"Prompt flow already has a connection {name!r} that phi3 did not write; it stays as it "
        "is. Choose another name with connection.name=NAME, or remove it with: "
        f"pf connection delete --yes --name {name}"
    )


@contextmanager
def _errors_of_the_store(doing: str, name: str) -> Iterator[None]:
    sqlalchemy = _sdk("sqlalchemy.exc")
    promptflow = _sdk("promptflow.exceptions")
    keyring = _sdk("keyring.errors")
    try:
        yield
    except (
        promptflow.PromptflowException,
        sqlalchemy.SQLAlchemyError,
        keyring.KeyringError,
        OSError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"Prompt flow's store could not {doing} the connection {name!r}: {reason}; "
            f"{_write_anew(name)}"
        ) from None


def _write_anew(name: str) -> str:
    return (
        f"write it anew with: phi3 connect connection.name={name}, "
        "or set PHI3_ENDPOINT and PHI3_KEY and use no store"
    )
