"""The run folder: one JSON manifest per stage, written whole or not at all, never a secret.

Reads and writes `runs/<name>/<stage>.json`; every stage learns from these files what went before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from .errors import StageError, UsageError
from .manifests import VERSION, Manifest

M = TypeVar("M", bound=Manifest)

RECIPE_FILE = "recipe.yaml"  # in the run folder: what `--run NAME` alone uses
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Run:
    """A run folder. `Run.open` makes it; its manifests are read and written by their class."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open (and make, if need be) the run folder `path`.

        Raises UsageError when the folder's name is not a plain name or it cannot be made.
        """
        check_run_name(path.name)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The run folder {path} cannot be created ({error.strerror}); "
                "choose another place with --runs FOLDER"
            ) from None
        return cls(path)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.name

    def file(self, *parts: str) -> Path:
        """A path inside the run folder; its parent folder exists afterwards."""
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def read(self, kind: type[M]) -> M | None:
        """The manifest of a class, or None when its stage has not finished.

        Raises StageError when the file is there and is not such a manifest.
        """
        path = self.path / f"{kind.STAGE}.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("version") == VERSION:
                return kind.model_validate(content)
            wrong = f"its version is not {VERSION}"
        except ValidationError as error:
            first = error.errors()[0]
            wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (OSError, ValueError) as error:
            wrong = str(error)
        raise StageError(
            f"{path} is not a manifest that this version reads ({wrong}); delete "
            f"the file to run the stage again with: {self._command(kind)}"
        )

    def require(self, kind: type[M]) -> M:
        """The same; raises StageError, with the command that creates it, if there is none."""
        manifest = self.read(kind)
        if manifest is None:
            raise StageError(
                f"The run {self.name!r} has no {kind.STAGE}.json yet; "
                f"create it with: {self._command(kind)}"
            )
        return manifest

    def _command(self, kind: type[Manifest]) -> str:
        return f"{kind.COMMAND} --run {self.name}"

    def write(self, manifest: Manifest) -> None:
        """Write the manifest so that a reader sees the old file or the new one, never half."""
        # default=str: paths and dates inside the free `settings`.
        text = json.dumps(manifest.as_json(), indent=2, ensure_ascii=False, default=str) + "\n"
        write_atomically(self.path / f"{manifest.STAGE}.json", text)

    def forget(self, kind: type[Manifest]) -> None:
        """Delete the manifest, so that its stage is done again."""
        (self.path / f"{kind.STAGE}.json").unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises StageError when another `phi3` works on it."""
        # The system frees it when the process dies, however it dies: no lock is ever stale.
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StageError(
                f"Another phi3 is working on the run {self.name!r}; wait for it, "
                "or use another run folder with --run NAME"
            ) from None
        try:
            yield
        finally:
            lock.release()


def check_run_name(name: str) -> None:
    """Raise UsageError unless `name` is a plain name: no path, nothing a shell would trip over."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a run name: expected letters, digits, '.', '_' and '-', "
            "at most 64, starting with a letter or digit"
        )


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step (temporary file, fsync, rename)."""
    # In the same folder: a rename is atomic only inside one file system. fsync before it, since
    # after a power cut some file systems have the new name with none of its bytes.
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:  # also on Ctrl-C: leave no temporary file behind
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable hash of a JSON-like value: what a stage compares to know if it is done."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    # 64 bits: it only has to differ from the same stage's last one, nobody attacks it.
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
