"""What keeps the key of Prompt flow's store: finds a keyring that works with nobody at the screen.

A working system keyring wins; else the file keyring of keyrings.alt, readable by its owner only.
Reads the environment; changes file permissions; never waits longer than its time limit.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import StageError

logger = logging.getLogger(__name__)

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
            f"Prompt flow's store cannot keep the endpoint's key: {reason}. "
            'Install the file keyring: pip install "keyrings.alt>=5". Or use no store: start the '
            "endpoint with a key of your own (PHI3_KEY=… phi3 deploy), then set PHI3_ENDPOINT and "
            "PHI3_KEY, which every phi3 command obeys"
        )


def find_keeper(limit: float | None = None) -> Keeper:
    """The keyring that this process and its children use from now on; raises KeyringError.

    `limit`: seconds to wait for a keyring's answer; by default it depends on who could help.
    """
    situation = _situation()
    if situation not in _settled:
        limit = limit or _patience()
        keeper = _try_keyring(limit) or _fall_back(limit)
        # Falling back changes the environment: both before and after lead to the same keeper.
        _settled[situation] = _settled[_situation()] = keeper
    return _settled[situation]


def is_private(path: Path) -> bool:
    """True when nobody but the owner can get in."""
    # A Windows profile is its user's own.
    return os.name != "posix" or path.stat().st_mode & 0o077 == 0


def keep_private(path: Path) -> bool:
    """Take group's and others' rights away; True when nobody but the owner can get in."""
    if not is_private(path):
        try:
            path.chmod(path.stat().st_mode & 0o700)
        except PermissionError:
            return False
    return is_private(path)


def describe(keeper: Keeper, *, tighten: bool = True) -> str:
    """One honest line about what protects the endpoint's key; `tighten` keeps others out first."""
    start = "Key: encrypted in Prompt flow's store; its encryption key "
    if keeper.file is None:
        return f"{start}is kept by this machine's keyring ({keeper.keyring.rpartition('.')[0]})"
    if tighten:
        keep_private(keeper.file.parent)
        keep_private(keeper.file)
    who = "others on this machine may read it" if exposed(keeper) else "only you can read it"
    return f"{start}lies in {_short(keeper.file)} ({who}) because {keeper.why}"


def exposed(keeper: Keeper) -> bool:
    """Whether others may read the file keyring: either of file and folder keeps them out."""
    return keeper.file is not None and not (
        is_private(keeper.file.parent) or is_private(keeper.file)
    )


def _situation() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in _CHOOSING)


def _try_keyring(limit: float) -> Keeper | None:
    """The keyring that Python finds by itself, None when it does not work."""
    found = _probe(limit)
    if isinstance(found, Keeper):
        return found
    if os.environ.get(CHOICE):
        raise KeyringError(f"{CHOICE}={os.environ[CHOICE]} does not work ({found})")
    logger.debug("keyring: %s", found)
    return None


def _fall_back(limit: float) -> Keeper:
    """Use the file keyring for this process and its children; raises KeyringError."""
    os.environ[CHOICE] = FILE_KEYRING
    found = _probe(limit)
    if not isinstance(found, Keeper):
        del os.environ[CHOICE]
        raise KeyringError(
            f"this machine has no keyring that answers, nor {FILE_KEYRING} ({found})"
        )
    import keyring

    # The process may have settled on the silent one already.
    keyring.set_keyring(keyring.core.load_keyring(FILE_KEYRING))
    why = f"the system keyring does not answer; before `pf` type: export {CHOICE}={FILE_KEYRING}"
    return Keeper(found.keyring, found.file, why)


def _patience() -> float:
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return SCREEN_LIMIT if screen or sys.platform == "darwin" else HEADLESS_LIMIT


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
    return _read_probe(done.stdout)


def _read_probe(output: str) -> Keeper:
    answer = json.loads(output.splitlines()[-1])
    if answer["file"] is None:
        return Keeper(answer["keyring"])
    why = "this machine has no system keyring"
    if os.environ.get(CHOICE):
        why = f"{CHOICE} asks for it"
    elif answer["configured"]:
        why = "keyringrc.cfg asks for it"
    return Keeper(answer["keyring"], Path(answer["file"]), why)


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
