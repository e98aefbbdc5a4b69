"""Looks for a planted key in files, archives and output, in every form that encodings give it."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

from tests.integration.pf_home import PfHome

# Signs that base64, URLs and JSON each write in another way.
KEY = "p1anted/Key+5c~0e%7a==" + "Zq" * 8
WRONG_KEY = "wr0ng/Key+91~fe%3b==" + "Yx" * 8


def forms_of(key: str) -> set[bytes]:
    """The key as it stands, and as the usual encodings would write it."""
    text = {key, quote(key), quote(key, safe=""), quote_plus(key), json.dumps(key)[1:-1]}
    forms = {form.encode() for form in text} | {
        key.encode("utf-16-le"),
        key.encode().hex().encode(),
    }
    for shift in range(3):  # wherever the key begins within what was encoded
        encoded = base64.b64encode(b"\0" * shift + key.encode())
        whole = encoded[4 if shift else 0 : -4]
        forms |= {whole, whole.translate(bytes.maketrans(b"+/", b"-_"))}
    return forms


def leaks(key: str, places: dict[str, bytes]) -> list[str]:
    forms = forms_of(key)
    return [name for name, content in places.items() if any(form in content for form in forms)]


def everything(home: PfHome) -> dict[str, bytes]:
    """All files of this HOME (store, runs, flow folder, temporary ones) and all output."""
    return {**files_below(home.path), "output": "\n".join(home.printed).encode()}


def files_below(folder: Path) -> dict[str, bytes]:
    """All files, and what is packed inside the archives among them."""
    return dict(_files(folder))


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        try:
            yield str(path), path.read_bytes()
        except FileNotFoundError:  # a running service has just removed it
            continue
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path}!{name}", archive.read(name)
