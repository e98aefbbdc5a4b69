"""The doctor's look at versions, settings, keyring and service: what is sound, and each fault."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from phi3_training.doctor import Finding, State
from phi3_training.doctor.environment import (
    RULES,
    check_keyring,
    check_python,
    check_rules,
    check_service,
    check_telemetry,
    check_versions,
    environment,
    service,
)

SOUND = {
    "promptflow": "1.18.5",
    "promptflow-core": "1.18.5",
    "promptflow-devkit": "1.18.5",
    "promptflow-tracing": "1.18.5",
    "filelock": "3.28.0",
    "uvicorn": "0.30.0",
    "requests": "2.34.2",
}


def rules_broken(**changed: str | None) -> dict[str, Finding]:
    versions = {**SOUND, **{name.replace("_", "-"): value for name, value in changed.items()}}
    return {each.check: each for each in check_rules(versions.get) if each.state is not State.OK}


def test_a_healthy_environment_has_no_fault() -> None:
    assert check_python((3, 11, 7)).state is State.OK
    assert check_versions(SOUND.get).state is State.OK
    assert rules_broken() == {}


def test_a_python_that_prompt_flow_was_never_tried_with() -> None:
    found = check_python((3, 14, 0))
    assert found.state is State.WARNING
    assert "3.11" in found.fix


def test_prompt_flow_in_pieces_of_several_versions() -> None:
    found = check_versions({**SOUND, "promptflow-azure": "1.17.2"}.get)
    assert found.state is State.FAULT
    assert "promptflow-azure 1.17.2" in found.said
    assert '"promptflow-azure==1.18.5"' in found.fix


def test_no_prompt_flow_at_all() -> None:
    """That is a choice: nothing about it is a fault, and a line says what adds it."""
    assert check_versions({}.get).state is State.SKIPPED
    found = rules_broken(promptflow=None)["promptflow"]
    assert found.state is State.SKIPPED
    assert found.fix == 'pip install "phi3-promptflow[flow]"'
    left_out = [*environment({}.get, (3, 11, 7)), *service(Path("home"), Path(), {}.get)]
    skipped = {each.check for each in left_out if each.state is State.SKIPPED}
    assert {"keyring", "telemetry", "service"} <= skipped


@pytest.mark.parametrize(
    ("package", "version", "fix"),
    [
        ("promptflow", "1.18.2", 'pip install "promptflow>=1.18.5,<2"'),
        ("filelock", "3.30.1", 'pip install "filelock>=3.20,<3.30"'),
        ("azure-ai-ml", "1.35.2", 'pip install "azure-ai-ml<1.33"'),
        ("uvicorn", None, 'pip install "phi3-promptflow[flow]"'),
        ("requests", "2.9.1", 'pip install "requests>=2.28"'),
    ],
)
def test_each_known_bad_version(package: str, version: str | None, fix: str) -> None:
    broken = rules_broken(**{package: version, "promptflow-azure": "1.18.5"})
    if package != "azure-ai-ml":  # the one rule that holds only beside promptflow-azure
        broken.pop("azure-ai-ml", None)
    assert list(broken) == [package]
    assert broken[package].state is State.FAULT
    assert broken[package].fix == fix


def test_every_rule_is_tried_above() -> None:
    tried = {"promptflow", "filelock", "azure-ai-ml", "uvicorn", "requests"}
    assert {rule.package for rule in RULES} == tried


def test_azure_ai_ml_alone_is_nobodys_fault() -> None:
    assert rules_broken(azure_ai_ml="1.35.2") == {}


def test_no_keyring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("keyring")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")
    monkeypatch.delenv("PHI3_ENDPOINT", raising=False)
    found = check_keyring()
    assert found.state is State.FAULT
    assert "keyrings.alt" in found.fix
    monkeypatch.setenv("PHI3_ENDPOINT", "http://127.0.0.1:1/score")
    assert check_keyring().state is State.WARNING


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_a_file_keyring_that_others_may_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told and not touched; a folder that keeps others out is enough."""
    pytest.importorskip("keyrings.alt")
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "DBUS_SESSION_BUS_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyrings.alt.file.PlaintextKeyring")
    assert check_keyring().state is State.OK
    file = tmp_path / ".local/share/python_keyring/keyring_pass.cfg"
    file.chmod(0o644)
    file.parent.chmod(0o755)
    found = check_keyring()
    assert found.state is State.WARNING
    assert "others on this machine can read it" in found.said
    assert found.fix == f"chmod 600 {file}"
    assert file.stat().st_mode & 0o777 == 0o644
    file.parent.chmod(0o700)
    assert check_keyring().state is State.OK


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({"telemetry": {"enabled": False}}, State.OK),
        ({"telemetry": {"enabled": "false"}}, State.OK),
        ({"telemetry": {"enabled": True}}, State.WARNING),
        ({}, State.WARNING),
    ],
)
def test_telemetry(settings: dict[str, Any], state: State) -> None:
    found = check_telemetry(settings)
    assert found.state is state
    assert found.fix == ("" if state is State.OK else "pf config set telemetry.enabled=false")


def test_the_home_outranks_the_folder(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "clone" / "deeper"
    home.mkdir()
    folder.mkdir(parents=True)
    (folder.parent / "pf.yaml").write_text("telemetry:\n  enabled: false\n")
    assert next(service(home, folder)).state is State.OK
    (home / "pf.yaml").write_text("telemetry:\n  enabled: true\n")
    assert next(service(home, folder)).state is State.WARNING


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "pf.yaml").write_text("telemetry: [")
    found = list(service(tmp_path, tmp_path))
    assert [(each.check, each.state) for each in found] == [("settings", State.FAULT)]
    assert "pf.yaml" in found[0].fix


@contextmanager
def listening(body: bytes) -> Iterator[int]:
    """A program on a port of this machine that answers every GET with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def service_of(home: Path, port: int) -> Finding:
    (home / "pfs").mkdir(exist_ok=True)
    (home / "pfs" / "bin_0_pfs.port").write_text(f"service:\n  port: {port}\n")
    return check_service(home, {}, SOUND.get)


def test_a_service_that_runs(tmp_path: Path) -> None:
    with listening(json.dumps({"promptflow": "1.18.5"}).encode()) as port:
        found = service_of(tmp_path, port)
    assert found.state is State.OK
    assert str(port) in found.said


def test_a_service_of_another_version(tmp_path: Path) -> None:
    with listening(json.dumps({"promptflow": "1.17.2"}).encode()) as port:
        found = service_of(tmp_path, port)
    assert found.state is State.FAULT
    assert "1.17.2" in found.said
    assert "--force" in found.fix


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"status": "fine"}'])
def test_another_program_on_the_services_port(body: bytes, tmp_path: Path) -> None:
    with listening(body) as port:
        found = service_of(tmp_path, port)
    assert found.state is State.FAULT
    assert "another program" in found.said
    assert "--port" in found.fix


def test_a_program_that_does_not_speak_http(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        found = service_of(tmp_path, listener.getsockname()[1])
    assert found.state is State.FAULT


def test_a_service_that_is_gone(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        found = service_of(tmp_path, taken.getsockname()[1])
    assert found.state is State.OK
    assert "not running" in found.said
