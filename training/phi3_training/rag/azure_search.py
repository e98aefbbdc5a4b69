"""`rag.store=azure_search`: the passages of an index file, in Azure AI Search as well.

The SQLite file stays where documents are read, cut and embedded; this sends what it holds, with the
same ids, and writes the small file by which the passages are found (`phi3_tool.azure_search`).
A search that runs meanwhile finds passages of both generations, never none: the old ones are
deleted when all new ones are there. Tested against a loopback service, never against Azure's.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from phi3_tool.azure_search import AGAIN, STORE, SearchService, index_url, read_settings
from phi3_tool.errors import one_line

from ..errors import StageError, UsageError, shortened
from ..progress import Progress
from ..recipe.azure import check_deadline
from ..run import write_atomically

#: How an index says that it was made here: others are never filled, and never deleted.
MADE_BY = "Made by phi3-promptflow"
_BATCH = 500  # documents; the service takes 1,000 in 16 MB
_BATCH_BYTES = 4_000_000
_PAGE = 1000  # ids in an answer, the most that the service sends
_TRIES = 6  # of a document that was refused for now
_LONGEST_SERVICE = 60  # characters of a service's name
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){1,127}")
_KEYS = (
    "rag.store",
    "rag.search.endpoint",
    "rag.search.index",
    "rag.search.create",
    "rag.search.tier",
    "rag.search.deadline",
)
TIERS = ("free", "basic", "standard", "standard2", "standard3")


@dataclass(frozen=True)
class Store:
    """Where the passages are to be: `rag.store`, and `rag.search.*`."""

    kind: str = ""  # empty: where they are now
    endpoint: str = ""
    index: str = ""
    create: bool = False  # a service of the run's own
    tier: str = "basic"
    deadline: str = "7d"  # after which such a service deletes itself, or none

    @classmethod
    def of(cls, words: Sequence[str]) -> Store:
        """Read `key=value` words. Raises UsageError with every fault."""
        given = dict(word.split("=", 1) for word in words)
        faults = [
            f"unknown key {key}; known: {', '.join(_KEYS)}" for key in given if key not in _KEYS
        ]
        kind = given.get("rag.store", "")
        endpoint, index = (given.get(f"rag.search.{name}", "") for name in ("endpoint", "index"))
        if kind not in ("", "sqlite", STORE):
            faults.append(f"rag.store is sqlite or {STORE}, not {kind!r}")
        if kind == "sqlite" and len(given) > 1:
            faults.append(f"rag.search.* goes with rag.store={STORE}")
        if index and not _NAME.fullmatch(index):
            faults.append(
                f"rag.search.index {index!r} is no index name: 2 to 128 lower-case letters, "
                "digits and single dashes, no dash at the ends"
            )
        create = given.get("rag.search.create", "false")
        if create not in ("true", "false"):
            faults.append(f"rag.search.create is true or false, not {create!r}")
        if create == "true" and endpoint:
            faults.append("rag.search.create makes a service; leave rag.search.endpoint out")
        tier = given.get("rag.search.tier", "basic")
        if tier not in TIERS:
            faults.append(f"rag.search.tier is one of {', '.join(TIERS)}, not {tier!r}")
        deadline = given.get("rag.search.deadline", "7d")
        try:
            deadline = check_deadline(deadline)
        except ValueError as error:
            faults.append(f"rag.search.deadline {deadline!r}: {error}")
        if faults:
            raise UsageError("\n".join(faults))
        return cls(kind, endpoint, index, create == "true", tier, deadline)


@dataclass(frozen=True)
class Sent:
    """What `send` did; `passages` and `deleted` are documents of the index in Azure AI Search."""

    path: Path
    endpoint: str
    index: str
    passages: int
    deleted: int
    seconds: float


@dataclass(frozen=True)
class Destination:
    """Where `send` sends to, and the small file that says so.

    `service_id` is the ARM id of a service that was created for the run, else empty.
    """

    path: Path
    service: SearchService
    index: str
    service_id: str = ""


def destination(
    path: Path, store: Store, run: str, service_id: Callable[[str], str] = str
) -> Destination | None:
    """Where a run's passages go in addition to its SQLite file; None where they stay in it alone.

    Without `store.kind` that is where `path` says they are. `service_id` gives the ARM id for the
    name of a service that is to be created. Asks nothing over the network. Raises UsageError where
    no address is known, or where they are already elsewhere.
    """
    known = read_settings(path) if path.is_file() else {}
    elsewhere = f"The passages of this run are in {known.get('index')} at {known.get('endpoint')}"
    move = f"{elsewhere}; delete that first with: phi3 rag down --run {run}"
    if store.kind == "sqlite" and known:
        raise UsageError(move)
    if store.kind != STORE and not known:
        if store.endpoint or store.index or store.create:
            raise UsageError(f"rag.search.* goes with rag.store={STORE}; add that")
        return None
    if not (store.endpoint or store.create or known):
        raise UsageError(
            f"rag.store={STORE} needs the service's address, "
            "rag.search.endpoint=https://NAME.search.windows.net, or rag.search.create=true to "
            "create one that bills until: phi3 rag down"
        )
    # A random ending: an index name of the service may belong to somebody else's run.
    index = store.index or known.get("index") or _new_name(run)
    if store.create and not known:
        name = index if len(index) <= _LONGEST_SERVICE else _new_name(run)
        address = f"https://{name}.search.windows.net"
        return Destination(path, SearchService(address), index, service_id(name))
    service = SearchService(store.endpoint or known["endpoint"])
    if known and (known["endpoint"], known["index"]) != (service.endpoint, index):
        raise UsageError(move)
    return Destination(path, service, index, known.get("service_id", ""))


def send(
    database: Path,
    to: Destination,
    progress: Progress,
    *,
    rebuild: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Sent:
    """Make the index in Azure AI Search hold exactly the passages of the SQLite file `database`.

    Nothing is sent where these were sent before; `rebuild` starts over. Raises UsageError where the
    index is somebody else's, StageError with the documents that the service refused, and what
    `SearchService.call` raises.
    """
    started, service = time.monotonic(), to.service
    try:
        with FileLock(to.path.with_name(f"{to.path.name}.lock"), timeout=0):
            known = read_settings(to.path) if to.path.is_file() else {}
            with closing(sqlite3.connect(database, isolation_level=None)) as opened:
                opened.execute("BEGIN")  # one generation, whatever is written meanwhile
                facts = dict(opened.execute("SELECT key, value FROM meta"))
                settings = _settings(to, opened, facts)
                existing = service.call("GET", index_url(to.index), may_miss=True)
                if existing is not None:
                    _refuse_foreign(existing, to.index, service)
                    if rebuild:
                        service.call("DELETE", index_url(to.index), may_miss=True)
                started_over = existing is None or rebuild
                if started_over:
                    # Before it is created: `phi3 rag down` finds it even when this process is
                    # killed now.
                    _write(to.path, {**settings, "content": ""})
                    service.call(
                        "PUT",
                        index_url(to.index),
                        definition(to.index, settings),
                        headers={"Prefer": "return=representation"},
                    )
                sent = deleted = 0
                if started_over or known != settings:
                    sent = _fill(to, opened, facts, progress, sleep)
                    deleted = _delete_stale(to, opened, facts, sleep)
            _write(to.path, settings)
    except Timeout:
        raise StageError(f"Another phi3 is filling {to.path}; wait until it is done") from None
    seconds = time.monotonic() - started
    return Sent(to.path, service.endpoint, to.index, sent, deleted, seconds)


def begin(database: Path, to: Destination) -> bool:
    """Write down where the passages will be, before anything is created there.

    False where they were sent before: then all of it is there. `phi3 rag down` finds what a killed
    process had created.
    """
    known = read_settings(to.path) if to.path.is_file() else {}
    if known.get("content"):
        return False
    with closing(sqlite3.connect(database)) as opened:
        facts = dict(opened.execute("SELECT key, value FROM meta"))
        _write(to.path, {**_settings(to, opened, facts), "content": ""})
    return True


def _settings(
    to: Destination, database: sqlite3.Connection, facts: dict[str, str]
) -> dict[str, str]:
    """What the small file says once the passages are there."""
    # Not the generation: its number starts over with --rebuild.
    content = hashlib.sha256()
    for row in database.execute(
        "SELECT path, sha256, min(passage.id), max(passage.id) FROM document "
        "JOIN passage ON document.id = document GROUP BY document.id ORDER BY path"
    ):
        content.update(repr(row).encode())
    return {
        **facts,
        "store": STORE,
        "endpoint": to.service.endpoint,
        "index": to.index,
        **({"service_id": to.service_id} if to.service_id else {}),
        "content": content.hexdigest()[:16],
    }


def down(path: Path, *, service: SearchService | None = None) -> str:
    """Delete the index that `path` names; a line that says what was done.

    The service stays. Raises UsageError where the index was not made here.
    """
    settings = read_settings(path)
    service = service or SearchService(settings["endpoint"])
    name = settings["index"]
    existing = service.call("GET", index_url(name), may_miss=True)
    if existing is not None:
        _refuse_foreign(existing, name, service)
        service.call("DELETE", index_url(name), may_miss=True)
    path.unlink()
    said = "Deleted" if existing is not None else "Was deleted before:"
    return f"{said} the index {name} at {service.endpoint}"


def definition(name: str, facts: dict[str, str]) -> dict[str, Any]:
    """The index as Azure AI Search is asked to make it, for `PUT /indexes('name')`."""

    def field(name: str, kind: str, **on: bool | int | str) -> dict[str, Any]:
        # Each is on by default, and each costs space.
        off = dict.fromkeys(("searchable", "filterable", "sortable", "facetable"), False)
        return {"name": name, "type": kind, **off, **on}

    # The local index's words are stemmed for English as well.
    words: dict[str, bool | int | str] = {"searchable": True, "analyzer": "en.lucene"}
    fields = [
        field("id", "Edm.String", key=True, filterable=True, sortable=True),
        field("generation", "Edm.Int64", filterable=True),
        field("source", "Edm.String"),
        field("heading", "Edm.String", **words),
        field("text", "Edm.String", **words),
        field("page", "Edm.Int32"),
        field("first", "Edm.Int64"),
        field("last", "Edm.Int64"),
    ]
    index = {"name": name, "description": f"{MADE_BY}: passages of documents", "fields": fields}
    if facts["embedder"] == "none":
        return index
    fields.append(
        field(
            "vector",
            "Collection(Edm.Single)",
            searchable=True,
            retrievable=False,
            stored=False,  # searched, never sent back: it would double the space
            dimensions=int(facts["dimension"]),
            vectorSearchProfile="cosine",
        )
    )
    hnsw = {"name": "hnsw", "kind": "hnsw", "hnswParameters": {"metric": "cosine"}}
    profile = {"name": "cosine", "algorithm": "hnsw"}
    return {**index, "vectorSearch": {"algorithms": [hnsw], "profiles": [profile]}}


def _new_name(run: str) -> str:
    """A name that no other run has, on this service or another machine's."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    return f"phi3-{plain[:40].strip('-') or 'documents'}-{secrets.token_hex(4)}"


def _refuse_foreign(existing: dict[str, Any], name: str, service: SearchService) -> None:
    if not str(existing.get("description") or "").startswith(MADE_BY):
        raise UsageError(
            f"The index {name} at {service.endpoint} was not made by phi3, so it was not changed; "
            "choose another name with rag.search.index=NAME"
        )


def _write(path: Path, settings: dict[str, str]) -> None:
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


def _fill(
    to: Destination,
    database: sqlite3.Connection,
    facts: dict[str, str],
    progress: Progress,
    sleep: Callable[[float], None],
) -> int:
    """Send every passage; how many. Raises StageError with those that were refused for good."""
    total, sent = int(facts["passages"]), 0
    refused: list[str] = []
    batch: list[dict[str, Any]] = []
    size = 0

    def flush() -> None:
        nonlocal sent, size
        refused.extend(_post(to, batch, sleep))
        sent += len(batch)
        progress(sent, total, f"sending passages to {to.index}")
        batch.clear()
        size = 0

    rows = database.execute(
        "SELECT passage.id, path, heading, text, page, first, last, vector FROM passage "
        "JOIN document ON document.id = document ORDER BY passage.id"
    )
    for number, source, heading, text, page, first, last, vector in rows:
        document = {
            "@search.action": "mergeOrUpload",
            "id": str(number),
            "generation": int(facts["generation"]),
            "source": source,
            "heading": heading,
            "text": text,
            "page": page,
            "first": first,
            "last": last,
        }
        if vector is not None:  # stored in half precision; the service takes single
            values = np.frombuffer(vector, np.float16).astype(np.float32)
            document["vector"] = values.tolist()
        length = len(json.dumps(document, ensure_ascii=False).encode())
        if batch and (len(batch) == _BATCH or size + length > _BATCH_BYTES):
            flush()
        batch.append(document)
        size += length
    if batch:
        flush()
    if refused:
        shown = "\n".join(f"  {line}" for line in shortened(refused))
        raise StageError(
            f"{to.service.endpoint} refused {len(refused)} of {sent} passages; the others are "
            f"there, and nothing was deleted:\n{shown}\n"
            "Run the same command again when that is fixed"
        )
    return sent


def _post(
    to: Destination,
    batch: Sequence[dict[str, Any]],
    sleep: Callable[[float], None],
) -> list[str]:
    """Write one batch; a line for each document that was refused for good.

    The service answers 200, or 207 where some documents failed: each has its own status then, and
    those that may succeed later are sent again alone.
    """
    waiting = {document["id"]: document for document in batch}
    refused: list[str] = []
    for attempt in range(_TRIES):
        body = {"value": list(waiting.values())}
        answer = to.service.call("POST", f"{index_url(to.index)}/docs/search.index", body) or {}
        results = {str(result.get("key")): result for result in answer.get("value", ())}
        again: dict[str, dict[str, Any]] = {}
        for key, document in waiting.items():
            result = results.get(key, {"status": False, "errorMessage": "no answer for it"})
            if result.get("status"):
                continue
            if result.get("statusCode") in AGAIN and attempt < _TRIES - 1:
                again[key] = document
                continue
            place = f"passage {key}" + (f" of {document['source']}" if "source" in document else "")
            reason = one_line(str(result.get("errorMessage") or "no reason given"))
            refused.append(f"{place}: {reason} (status {result.get('statusCode')})")
        waiting = again
        if not waiting:
            break
        # 1, 2, 4 … seconds: it is too busy, or the index is just being changed.
        sleep(min(2.0**attempt, 60.0))
    return refused


def _delete_stale(
    to: Destination,
    database: sqlite3.Connection,
    facts: dict[str, str],
    sleep: Callable[[float], None],
) -> int:
    """Delete the documents of earlier generations; how many there were."""
    current = {str(number) for (number,) in database.execute("SELECT id FROM passage")}
    deleted, last = 0, ""
    while True:
        # By the last id, because pages by number end at 100,000.
        after = f" and id gt '{last}'" if last else ""
        body = {
            "search": "*",
            "filter": f"generation ne {facts['generation']}{after}",
            "orderby": "id asc",
            "select": "id",
            "top": _PAGE,
        }
        path = f"{index_url(to.index)}/docs/search.post.search"
        answer = to.service.call("POST", path, body) or {}
        ids = [str(document["id"]) for document in answer.get("value", ())]
        # What was written a second ago may still be found with its old generation.
        stale = [key for key in ids if key not in current]
        if stale:
            actions = [{"@search.action": "delete", "id": key} for key in stale]
            refused = _post(to, actions, sleep)
            if refused:
                raise StageError(
                    f"{to.service.endpoint} refused to delete {len(refused)} passages that are no "
                    f"longer in the documents:\n  {refused[0]}\nRun the same command again"
                )
            deleted += len(stale)
        if len(ids) < _PAGE:
            return deleted
        last = ids[-1]
