"""Prompt flow's own connection store: the stage `connect`, and what reads and deletes a connection.

Reads and writes `pf.sqlite` in Prompt flow's home (~/.promptflow) through Prompt flow's SDK, which
also reads the connections of a workspace. With ask.py the only module here that imports it. The key
is never logged or shown.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_tool.connection import ENTRA, ConnectionSettings, in_dialect, same_endpoint
from phi3_tool.errors import Phi3Error
from phi3_tool.wire import Dialect

from ..errors import MissingExtraError, StageError, UsageError, first_line
from ..manifests import ConnectionManifest, EndpointManifest
from ..run import fingerprint
from . import keyring_probe

logger = logging.getLogger(__name__)

# ---- where the key of the store is kept: a keyring that works unattended
# A working system keyring wins; else the file keyring of keyrings.alt, readable by its owner only.
# Reads the environment; changes file permissions; never waits longer than its time limit.

FILE_KEYRING = "keyrings.alt.file.PlaintextKeyring"
CHOICE = "PYTHON_KEYRING_BACKEND"
HEADLESS_LIMIT = 10.0  # seconds: nobody can answer a prompt
SCREEN_LIMIT = 60.0  # seconds: somebody may be typing the keyring's password
# A keyring is chosen by these; what was settled holds while they stay the same.
_CHOOSING = (
    CHOICE,
    "DBUS_SESSION_BUS_ADDRESS",
    "HOME",
    "LOCALAPPDATA",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
)
_settled: dict[tuple[str | None, ...], Keeper] = {}


@dataclass(frozen=True)
class Keeper:
    """The keyring in use and, where it is a file, which one and why a file."""

    keyring: str
    file: Path | None = None
    why: str = ""


class KeyringError(StageError):
    """No keyring works here."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"Prompt flow's store cannot save the endpoint's key: {reason}. "
            'Install the file keyring: pip install "keyrings.alt>=5". Or use no store: start the '
            "endpoint with your own key (PHI3_KEY=… phi3 deploy), then set PHI3_ENDPOINT and "
            "PHI3_KEY, which every phi3 command uses"
        )


def find_keeper(limit: float | None = None) -> Keeper:
    """The keyring that this process and its children use from now on; raises KeyringError.

    `limit`: seconds to wait for a keyring's answer; by default it depends on who could help.
    """
    situation = _situation()
    if situation in _settled:
        return _settled[situation]
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    by_default = SCREEN_LIMIT if screen or sys.platform == "darwin" else HEADLESS_LIMIT
    # The keyring that Python finds by itself; where it does not work, the file keyring.
    keeper = _probe(limit or by_default)
    if not isinstance(keeper, Keeper):
        if os.environ.get(CHOICE):
            raise KeyringError(f"{CHOICE}={os.environ[CHOICE]} does not work ({keeper})")
        logger.debug("keyring: %s", keeper)
        os.environ[CHOICE] = FILE_KEYRING  # for this process and its children
        file_keeper = _probe(limit or by_default)
        if not isinstance(file_keeper, Keeper):
            del os.environ[CHOICE]
            raise KeyringError(
                f"this machine has neither a working keyring nor {FILE_KEYRING} ({file_keeper})"
            )
        import keyring

        # The process may have settled on the silent one already.
        keyring.set_keyring(keyring.core.load_keyring(FILE_KEYRING))
        why = f"the system keyring does not answer; before `pf` run: export {CHOICE}={FILE_KEYRING}"
        keeper = Keeper(file_keeper.keyring, file_keeper.file, why)
    # Falling back changes the environment: before and after, the same keeper is found.
    _settled[situation] = _settled[_situation()] = keeper
    return keeper


def is_private(path: Path) -> bool:
    """True if only the owner has access."""
    # A Windows profile is its user's own.
    return os.name != "posix" or path.stat().st_mode & 0o077 == 0


def keep_private(path: Path) -> bool:
    """Remove the rights of group and others; True if only the owner has access."""
    if not is_private(path):
        try:
            path.chmod(path.stat().st_mode & 0o700)
        except PermissionError:
            return False
    return is_private(path)


def describe(keeper: Keeper, *, tighten: bool = True) -> str:
    """One line about what protects the endpoint's key; `tighten` keeps others out first."""
    start = "Key: encrypted in Prompt flow's store; its encryption key "
    if keeper.file is None:
        return f"{start}is in this machine's keyring ({keeper.keyring.rpartition('.')[0]})"
    if tighten:
        keep_private(keeper.file.parent)
        keep_private(keeper.file)
    who = "others on this machine can read it" if exposed(keeper) else "only you can read it"
    file, home = keeper.file, Path.home()
    place = f"~/{file.relative_to(home)}" if file.is_relative_to(home) else str(file)
    return f"{start}is in {place} ({who}) because {keeper.why}"


def exposed(keeper: Keeper) -> bool:
    """Whether others may read the file keyring: either of file and folder keeps them out."""
    return keeper.file is not None and not (
        is_private(keeper.file.parent) or is_private(keeper.file)
    )


def _situation() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in _CHOOSING)


def _probe(limit: float) -> Keeper | str:
    """Try the keyring in a process without a terminal: the keeper, or why there is none."""
    try:
        done = subprocess.run(  # noqa: S603 - our own module under our own interpreter
            [sys.executable, "-m", f"{__package__}.keyring_probe"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
            start_new_session=True,  # no controlling terminal: nothing can ask for a password
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the system keyring did not answer within {limit:g} seconds (is it locked?)"
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["file"] is None:
        return Keeper(answer["keyring"])
    why = "this machine has no system keyring"
    if os.environ.get(CHOICE):
        why = f"{CHOICE} selects it"
    elif answer["configured"]:
        why = "keyringrc.cfg selects it"
    return Keeper(answer["keyring"], Path(answer["file"]), why)


# ---- connections: one that the flow names, which leads to the current run, and one of each run

WRITER = {"written_by": "phi3-promptflow"}  # how we know our own connections again
# Settings of the endpoint that a flow needs as well, if the target has them.
PASSED_ON = ("deployment", "dialect", "context_length")
_LONGEST = 64  # characters of a connection's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class StoreError(StageError):
    """The store refuses, or what it holds cannot be used."""


def own_name(name: str, run: str) -> str:
    """The name of the run's own connection, made of the flow's `name`; at most 64 characters."""
    # Shortened with a hash: two long names must not become one.
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
    write_connection(name, endpoint, key, extra_configs=extra)
    if run is not None:
        extra["own"] = own_name(name, run)
        copy_connection(name, extra["own"])
    protection = key_protection()
    return ConnectionManifest(
        name=name,
        endpoint=endpoint,
        **extra,
        store=str(database()),
        protection=protection,
        choices=[protection],
    )


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
    find_keeper()
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
    keep_private(database())


def copy_connection(source: str, target: str) -> None:
    """Let `target` lead where `source` leads, with the same key; both were written here.

    Raises StoreError for somebody else's connection `target` and where `source` cannot be read.
    """
    # Read with its key from the store: no key passes through a file or an argument.
    stored = stored_connection(source)
    _refuse_foreign(target)
    connection = _sdk("promptflow.connections").CustomConnection(
        name=target, configs=dict(stored.configs), secrets=dict(stored.secrets)
    )
    with _errors_of_the_store("write", target):
        _sdk("promptflow.client").PFClient().connections.create_or_update(connection)
    keep_private(database())


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
    # Custom alone: others keep their key under names that no flow of ours reads.
    if row.connectionType != "Custom":
        raise StoreError(
            f"The connection {name!r} has the type {row.connectionType}; expected a custom "
            f"connection. Name another with connection.name=NAME"
        )
    find_keeper()
    keyring = importlib.import_module("keyring")
    if keyring.get_password(keyring_probe.SYSTEM, keyring_probe.NAME) is None:
        raise StoreError(
            f"The key that encrypts the connection {name!r} is no longer in this machine's "
            f"keyring; {_write_again(name)}"
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
        raise StoreError(
            f"Prompt flow cannot read the connection {name!r} of the workspace {workspace[2]}: "
            f"{first_line(error)}. It needs the role Azure Machine Learning Workspace Connection "
            "Secrets Reader there; a new role takes effect after some minutes"
        ) from None


def delete_connection(name: str) -> bool:
    """Delete a connection that was written here; False if there is none of that name."""
    if _row(name) is None:
        return False
    _refuse_foreign(name)
    with _errors_of_the_store("delete", name):
        _sdk("promptflow.client").PFClient().connections.delete(name)
    return True


def delete_connections_to(connected: ConnectionManifest) -> list[str]:
    """Delete a run's own connection, and the flow's where it leads to that run; their names."""
    deleted = []
    for name in dict.fromkeys((connected.own, connected.name)):
        if name is not None and _row(name) is not None:
            stored = ConnectionSettings.from_connection(stored_connection(name))
            if same_endpoint(stored.endpoint, connected.endpoint) and delete_connection(name):
                deleted.append(name)
    return deleted


def key_protection() -> str:
    """One line: what keeps the stored key from other people's eyes."""
    return describe(find_keeper())


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


def no_update_check() -> None:
    """Keep Prompt flow from asking pypi.org for its newest version in this process.

    It has no switch for that: it asks before each of the calls on this list (1.18).
    """
    hints = importlib.import_module("promptflow._sdk._version_hint_utils")
    getattr(hints, "HINT_ACTIVITY_NAME", []).clear()


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
        f"Prompt flow already has a connection {name!r} that phi3 did not write, so it was not "
        f"changed. Choose another name with connection.name=NAME, or delete it with: "
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
        raise StoreError(
            f"Prompt flow's store could not {doing} the connection {name!r}: {first_line(error)}; "
            f"{_write_again(name)}"
        ) from None


def _write_again(name: str) -> str:
    return (
        f"write it again with: phi3 connect connection.name={name}, "
        "or set PHI3_ENDPOINT and PHI3_KEY to use no store"
    )
