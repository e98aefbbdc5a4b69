"""What a job reads is sent once per content, and a refusal ends the sending at once."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.exceptions import HttpResponseError, ServiceResponseError

from phi3_training.errors import StageError
from phi3_training.progress import no_progress
from phi3_training.targets.azure import storage
from phi3_training.targets.azure.storage import code_asset, upload

from .azure_wire import Answer, Wire, clients, place

FILES = 60


class Store:
    """The workspace's store; refuses from the upload number `refuses` on."""

    url = "https://account.blob.core.windows.net/container"  # ?sig=… where it is signed

    def __init__(self, refuses: int = 10_000) -> None:
        self.blobs: dict[str, bytes] = {}
        self.tried: list[str] = []
        self.refuses = refuses
        self._lock = threading.Lock()

    def upload_blob(self, name: str, stream: BinaryIO, *, length: int, **_options: Any) -> None:
        with self._lock:
            self.tried.append(name)
            number = len(self.tried)
        if number >= self.refuses:
            error = HttpResponseError("This request is not authorized.")
            error.status_code, error.error_code = 403, "AuthorizationFailure"
            raise error
        content = stream.read()
        assert len(content) == length
        self.blobs[name] = content


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()

    def opened(_clients: object, name: str, prefix: str) -> tuple[Store, list[Any]]:
        assert name == "workspaceblobstore"
        found = [
            SimpleNamespace(name=blob, size=len(content))
            for blob, content in store.blobs.items()
            if blob.startswith(f"{prefix}/")
        ]
        return store, found

    monkeypatch.setattr(storage, "open_store", opened)
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(FILES):
        path = tmp_path / "code" / f"part-{number % 3}" / f"{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"print({number})\n")
    (tmp_path / "code" / "empty.txt").write_text("")
    (tmp_path / "code" / ".git").mkdir()
    (tmp_path / "code" / ".git" / "packed").write_text("all of it once more")
    return tmp_path / "code"


def absent(_method: str, _url: str) -> Answer:
    return 404, {"error": {"code": "ResourceNotFound", "message": "no"}}


def test_the_same_content_goes_up_once_from_wherever(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    known = clients(Wire(absent), tmp_path)
    first = upload(known, folder, no_progress)
    assert len(store.tried) == FILES + 1
    copy = tmp_path / "elsewhere" / "code"
    folder.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(copy)
    assert upload(known, copy, no_progress) == first
    assert len(store.tried) == FILES + 1
    assert first.path.startswith("azureml://datastores/workspaceblobstore/paths/phi3/uploads/")
    where = first.url.removeprefix(f"{store.url}/")
    assert store.blobs[f"{where}/part-1/4.py"] == b"print(4)\n"
    assert store.blobs[f"{where}/empty.txt"] == b""
    (copy / "empty.txt").write_text("not any more")
    assert upload(known, copy, no_progress).path != first.path


def test_a_file_is_addressed_by_its_content_and_keeps_its_name(
    store: Store, tmp_path: Path
) -> None:
    known = clients(Wire(absent), tmp_path)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    sent = upload(known, tmp_path / "chats.jsonl", no_progress)
    assert sent.path.endswith("/chats.jsonl")
    assert list(store.blobs.values()) == [b"{}\n"]


def test_what_was_interrupted_goes_on_with_what_is_missing(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    known = clients(Wire(absent), tmp_path)
    upload(known, folder, no_progress)
    first, second, third, *_ = list(store.blobs)
    del store.blobs[first], store.blobs[second]
    store.blobs[third] = b"of another size"
    store.tried.clear()
    upload(known, folder, no_progress)
    assert sorted(store.tried) == sorted([first, second, third])


@pytest.mark.parametrize("refuses", [1, 20])
def test_a_refused_upload_ends_at_once_with_azures_reason(
    store: Store, folder: Path, tmp_path: Path, refuses: int
) -> None:
    store.refuses = refuses
    known = clients(Wire(absent), tmp_path)
    said = r"Uploading code failed \(AuthorizationFailure(?s:.*)network rules"
    with pytest.raises(StageError, match=said):
        upload(known, folder, no_progress)
    # One alone at first; later those that were under way when the first one was refused.
    assert len(store.tried) == 1 if refuses == 1 else len(store.tried) < refuses + 10


def test_a_lost_connection_is_tried_again_with_what_is_missing(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, times = storage.open_store, []

    def reset(*where: Any) -> Any:
        times.append(len(store.tried))
        if len(times) == 1:
            raise ServiceResponseError("reset")
        return opened(*where)

    monkeypatch.setattr(storage, "open_store", reset)
    upload(clients(Wire(absent), tmp_path), folder, no_progress)
    assert (len(times), len(store.tried)) == (2, FILES + 1)


def test_code_becomes_one_asset_by_its_content(store: Store, folder: Path, tmp_path: Path) -> None:
    made: dict[str, Any] = {}

    def answer(method: str, url: str) -> Answer:
        path = url.split("?")[0].partition("azure.com")[2]
        if method == "PUT":
            made[path] = wire.sent[-1][2]
            return 201, {"id": path, "properties": made[path]["properties"]}
        return (200, {"id": path, **made[path]}) if path in made else absent(method, url)

    wire = Wire(answer)
    known = clients(wire, tmp_path)
    arm_id = code_asset(known, folder, no_progress)
    assert code_asset(known, folder, no_progress) == arm_id
    assert arm_id.startswith(f"{place(tmp_path).workspace_id()}/codes/phi3-code/versions/")
    assert [method for method, *_ in wire.sent].count("PUT") == 1
    assert made[arm_id]["properties"]["codeUri"].startswith(f"{store.url}/phi3/uploads/")
    assert made[arm_id]["properties"]["codeUri"].endswith("/code")


@pytest.mark.parametrize("status", [403, 500])
def test_a_refused_code_asset_sends_no_file_again(
    store: Store, folder: Path, tmp_path: Path, status: int
) -> None:
    def answer(method: str, url: str) -> Answer:
        refused: Answer = (status, {"error": {"code": "Refused", "message": "not this code"}})
        return refused if method == "PUT" else absent(method, url)

    wire = Wire(answer)
    known = clients(wire, tmp_path)
    with pytest.raises(StageError, match=r"Registering the job's code failed (?s:.*)not this code"):
        code_asset(known, folder, no_progress)
    assert len(store.tried) == FILES + 1
    tries = [method for method, *_ in wire.sent].count("PUT")
    assert tries == 1 if status == 403 else tries > 1
