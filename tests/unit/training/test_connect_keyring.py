"""Which keyring keeps Prompt flow's encryption key, on machines with and without a working one."""

from __future__ import annotations

import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

keyring = pytest.importorskip("keyring", reason="the extra `flow` is not installed")
pytest.importorskip("keyrings.alt", reason="the extra `flow` is not installed")

from phi3_training.flow import store  # noqa: E402 - after the packages it needs
from phi3_training.flow.store import CHOICE, FILE_KEYRING, KeyringError  # noqa: E402

# A keyring is chosen by these, too.
CHOOSING = (CHOICE, "HOME", "LOCALAPPDATA", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
SILENT = """
import time
from keyring.backend import KeyringBackend

class Keyring(KeyringBackend):
    priority = 9
    def get_password(self, system, name):
        time.sleep(60)
    set_password = delete_password = get_password
"""
WORKING = """
from keyring.backend import KeyringBackend

class Keyring(KeyringBackend):
    priority = 9
    kept = {}
    def get_password(self, system, name):
        return self.kept.get((system, name))
    def set_password(self, system, name, password):
        self.kept[system, name] = password
    def delete_password(self, system, name):
        del self.kept[system, name]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A headless HOME: no D-Bus, no screen, no keyring chosen yet."""
    for name in ("DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY", *CHOOSING):
        monkeypatch.setenv(name, "")  # recorded, so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(keyring.core, "_keyring_backend", None)
    return tmp_path


def configure(home: Path, source: str) -> None:
    """Make `source`'s Keyring the one this HOME's keyringrc.cfg asks for."""
    folder = home / ".config" / "python_keyring"
    folder.mkdir(parents=True)
    (home / "own_keyring.py").write_text(source, encoding="utf-8")
    (folder / "keyringrc.cfg").write_text(
        f"[backend]\ndefault-keyring=own_keyring.Keyring\nkeyring-path={home}\n", encoding="utf-8"
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_headless_machine_uses_a_file_of_the_owner_alone(home: Path) -> None:
    keeper = store.find_keeper()
    assert keeper.keyring == FILE_KEYRING
    assert keeper.file == home / ".local/share/python_keyring/keyring_pass.cfg"
    line = store.describe(keeper)
    assert "~/.local/share/python_keyring/keyring_pass.cfg (only you can read it)" in line
    assert line.endswith("because this machine has no system keyring")
    assert "\n" not in line
    assert (mode(keeper.file), mode(keeper.file.parent)) == (0o600, 0o700)


def test_loose_permissions_are_tightened(home: Path) -> None:
    keeper = store.find_keeper()
    assert keeper.file is not None
    keeper.file.chmod(0o666)
    keeper.file.parent.chmod(0o777)
    assert "only you can read it" in store.describe(keeper)
    assert (mode(keeper.file), mode(keeper.file.parent)) == (0o600, 0o700)


def test_working_system_keyring_wins(home: Path) -> None:
    configure(home, WORKING)
    keeper = store.find_keeper()
    assert keeper == store.Keeper("own_keyring.Keyring")
    assert "in this machine's keyring (own_keyring)" in store.describe(keeper)
    assert not (home / ".local").exists()


@pytest.mark.patient
def test_silent_keyring_is_given_up_in_time(home: Path) -> None:
    configure(home, SILENT)
    keeper = store.find_keeper(limit=1.5)
    assert keeper.keyring == FILE_KEYRING
    assert f"export {CHOICE}={FILE_KEYRING}" in store.describe(keeper)
    assert type(keyring.get_keyring()).__name__ == "PlaintextKeyring"
    # Asked again, the answer is the same and nobody waits.
    assert store.find_keeper(limit=1.5) == keeper


@pytest.mark.patient
@pytest.mark.skipif(sys.platform != "linux", reason="D-Bus keyrings are Linux's")
def test_dead_d_bus_leads_to_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "bus"))
        listener.listen()
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={home / 'bus'}")
        keeper = store.find_keeper(limit=5)
    assert keeper.keyring == FILE_KEYRING


@pytest.mark.parametrize(
    "chosen", ["keyring.backends.null.Keyring", "keyring.backends.fail.Keyring"]
)
def test_useless_choice_names_the_way_without_a_store(
    home: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setenv(CHOICE, chosen)
    with pytest.raises(KeyringError) as caught:
        store.find_keeper()
    message = str(caught.value)
    assert chosen in message
    assert "PHI3_ENDPOINT and PHI3_KEY" in message
    assert "Traceback" not in message


def test_chosen_file_keyring_is_reported_as_chosen(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHOICE, FILE_KEYRING)
    assert store.find_keeper().why == f"{CHOICE} selects it"
