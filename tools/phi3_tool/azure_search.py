"""An index of documents in Azure AI Search, queried over its REST API with `requests` alone.

Reads the small file that `phi3 rag index … rag.store=azure_search` writes instead of the SQLite
file: where the index is, and with which embedder it was made. Never a key: that comes from
$PHI3_SEARCH_KEY, else a token of Microsoft Entra ID is sent.

One hybrid question returns candidates, which Azure has ranked by reciprocal rank fusion. They are
ranked again by the sum that `index` explains, from the parts of the score that the service reports
on request (`debug: vector`): the cosine, and BM25. What BM25 could reach for the question is not
reported, so it is estimated: the best passage by words reaches 0.6 of the share of the question's
words that it holds.

Shapes as api-version 2026-04-01 has them. Tested against a loopback service, never against Azure's.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .connection import Address, is_loopback
from .credentials import clean_secret, entra_tokens
from .errors import (
    AuthenticationError,
    ConfigurationError,
    RequestRejectedError,
    ServiceError,
)
from .index import FORMAT, Hit, PassageIndex, Query, check_embedder, question_words, score_of
from .transport import new_session, request_with_retries, said_by

API_VERSION = "2026-04-01"
SCOPE = "https://search.azure.com/.default"
KEY_VARIABLE = "PHI3_SEARCH_KEY"
STORE = "azure_search"
#: Of both halves of a hybrid question: what reciprocal rank fusion itself looks at.
CANDIDATES = 50
#: Answers worth a retry: too busy, or an index that is just being changed.
AGAIN = frozenset((409, 422, 429, 503))

# A word that a passage holds once adds less than it could. Measured on 397 questions about 240
# paragraphs: with it the best passages score as in the SQLite file (1 % below 0.41, median 0.81; by
# words alone 0.15 and 0.45), so that `min_score` means the same.
_REACHED = 0.6
_TRIES = 6
_SELECTED = "id,text,source,heading,page,first,last"


class SearchService:
    """An Azure AI Search service. Safe to use from several threads.

    Raises ConfigurationError for an address that is none, or where a key would go over plain http
    to another host.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        key: str | None = None,
        token_provider: Callable[[], str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        match = re.fullmatch(
            r"(https?)://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?/*", endpoint.strip()
        )
        if match is None:
            raise ConfigurationError(
                f"The search endpoint {endpoint!r} is not an address; expected something like "
                "https://NAME.search.windows.net"
            )
        loopback = is_loopback(match[2].strip("[]"))
        if match[1] == "http" and not loopback:
            raise ConfigurationError(f"The key would go over plain http to {match[2]}; use https")
        self.endpoint = match[0].rstrip("/")
        key = "" if token_provider else key or os.environ.get(KEY_VARIABLE, "").strip()
        self._key = clean_secret(key, f"key ({KEY_VARIABLE})") if key else ""
        self._token = token_provider  # else what azure-identity finds, when it is first needed
        self._sleep = sleep
        self._session = new_session(Address(self.endpoint, self.endpoint, "score", loopback))
        self._lock = threading.Lock()

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        may_miss: bool = False,
    ) -> dict[str, Any] | None:
        """The answer's JSON; None for a 404 where `may_miss`. Every call here can be repeated.

        429, 5xx and lost connections are tried again, up to six times, after Retry-After where it
        is sent. Raises AuthenticationError, RequestRejectedError or ServiceError with the
        service's own words.
        """
        # Asked for at each call: azure-identity keeps the token, and renews it before it expires.
        if self._key:
            signature = {"api-key": self._key}
        else:
            with self._lock:
                if self._token is None:
                    self._token = entra_tokens(
                        SCOPE,
                        f"Azure AI Search without {KEY_VARIABLE} signs in with Microsoft Entra ID",
                    )
            signature = {"Authorization": f"Bearer {self._token()}"}
        answer = request_with_retries(
            self._session,
            method,
            self.endpoint + path,
            f"{self.endpoint} did not answer {method} {path}",
            tries=_TRIES,
            sleep=self._sleep,
            params={"api-version": API_VERSION},
            data=None if body is None else json.dumps(body, ensure_ascii=False).encode(),
            headers={
                "Content-Type": "application/json",
                "Accept": "application/json;odata.metadata=none",
                **signature,
                **(headers or {}),
            },
            timeout=(5, 120),
            allow_redirects=False,  # a key is never sent on to another host
        )
        if answer.status_code == 404 and may_miss:
            return None
        if answer.status_code in (401, 403):
            raise AuthenticationError(
                f"{self.endpoint} refused the sign-in ({said_by(answer)}). Set {KEY_VARIABLE}, or "
                "let the signed-in account have the roles Search Service Contributor and Search "
                "Index Data Contributor there (a question alone: Search Index Data Reader)",
                status=answer.status_code,
            )
        if not answer.ok:
            raise RequestRejectedError(
                f"{self.endpoint} refused {method} {path}: status {answer.status_code}: "
                f"{said_by(answer)}",
                status=answer.status_code,
            )
        if answer.status_code == 204 or not answer.content:
            return {}
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ServiceError(
                f"{self.endpoint} answered something else than JSON; is it an Azure AI Search "
                "service?"
            )
        return content


def index_url(name: str) -> str:
    """The path of an index."""
    return f"/indexes('{name}')"


def read_settings(path: Path) -> dict[str, str]:
    """What the file says of the index. Raises ConfigurationError for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"There is no index at {path}; make one with: phi3 rag index FOLDER"
        ) from None
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("store") != STORE:
        raise ConfigurationError(
            f"{path} does not say where an index is; make it again with: phi3 rag index FOLDER"
        )
    if content.get("format") != str(FORMAT):
        raise ConfigurationError(
            f"{path} has the format {content.get('format')}, this version reads {FORMAT}; "
            "make it again with: phi3 rag index FOLDER --rebuild"
        )
    return {name: str(value) for name, value in content.items()}


class SearchIndex(PassageIndex):
    """An index in Azure AI Search, with the same questions and answers as `DocumentIndex`.

    Raises ConfigurationError when the file that names it is missing or is another one.
    """

    def __init__(self, path: Path, service: SearchService | None = None) -> None:
        self.path = path
        self._service = service or SearchService(read_settings(path)["endpoint"])

    def facts(self) -> dict[str, str]:
        """Embedder, dimension, generation and passages, as they were when it was filled."""
        return read_settings(self.path)

    def find(self, query: Query) -> list[Hit]:
        """Asks the service; raises what `SearchService.call` raises as well."""
        facts = self.facts()
        words = question_words(query.question)
        # More than are wanted: they are put in order again.
        wanted = max(query.top_k, CANDIDATES)
        body: dict[str, Any] = {"select": _SELECTED, "top": wanted}
        if query.query_type != "vector":
            # Words alone: in a question a leading minus or a quotation mark is no operator.
            body["search"] = " ".join(words)
            body["searchFields"] = "heading,text"
            body["searchMode"] = "any"
        by_meaning = query.needs_vectors(facts["index"], facts)
        if by_meaning:
            embedder = check_embedder(str(self.path), facts, query.embedder)
            vector = [float(value) for value in embedder.embed([query.question])[0]]
            body["vectorQueries"] = [
                {"kind": "vector", "vector": vector, "k": wanted, "fields": "vector"}
            ]
            body["debug"] = "vector"
        path = f"{index_url(facts['index'])}/docs/search.post.search"
        answer = self._service.call("POST", path, body, may_miss=True)
        if answer is None:
            raise ConfigurationError(
                f"The index {facts['index']} is not at {self._service.endpoint} any more; make it "
                "again with: phi3 rag index FOLDER --rebuild"
            )
        try:
            return _hits(answer["value"], words, by_meaning=by_meaning)[: query.top_k]
        except (KeyError, TypeError, ValueError):
            raise ServiceError(
                f"{self._service.endpoint} sent documents of another form than phi3 wrote; make "
                "the index again with: phi3 rag index FOLDER --rebuild"
            ) from None


def _hits(
    documents: Sequence[Mapping[str, Any]], words: Sequence[str], *, by_meaning: bool
) -> list[Hit]:
    """The documents as passages with our own score, best first; equal ones in Azure's order."""
    bm25: list[float] = []
    cosines: list[float | None] = []
    for document in documents:
        debug = document.get("@search.documentDebugInfo") or {} if by_meaning else {}
        parts = (debug.get("vectors") or {}).get("subscores") or {}
        # Without parts (a question of words alone, or a service that reports none) the service's
        # own score is BM25, or at least its order. With them, a passage that was found by its
        # meaning alone has no text score: it counts 0.
        whole = float(document["@search.score"])
        bm25.append(float((parts.get("text") or {}).get("searchScore") or 0.0) if parts else whole)
        cosines.append(
            next(
                (
                    float(result["vectorSimilarity"])
                    for query in parts.get("vectors") or []
                    for result in query.values()
                    if result.get("vectorSimilarity") is not None
                ),
                None,
            )
        )
    known = [cosine for cosine in cosines if cosine is not None]
    best = max(range(len(documents)), key=bm25.__getitem__, default=0)
    reached = _REACHED * share_of_words(words, documents[best]) if documents else 0.0
    hits = []
    for at, document in enumerate(documents):
        by_words = reached * bm25[at] / bm25[best] if bm25[best] else 0.0
        cosine: float | None = None
        if known:
            # Found by its words alone: it is further off than the last one found by meaning.
            reported = cosines[at]
            cosine = min(known) if reported is None else reported
        hits.append(
            Hit(
                id=int(document["id"]),
                text=document["text"],
                score=round(score_of(by_words, cosine), 4),
                words=round(by_words, 4),
                cosine=None if cosine is None else round(cosine, 4),
                source=document["source"],
                heading=document["heading"],
                page=document["page"],
                first=document["first"],
                last=document["last"],
            )
        )
    return sorted(hits, key=lambda hit: -hit.score)


def share_of_words(words: Sequence[str], document: Mapping[str, Any]) -> float:
    """How many of the question's words a passage holds, 0 to 1; endings do not count."""
    held = {_stem(word) for word in re.findall(r"\w+", f"{document['heading']} {document['text']}")}
    return sum(_stem(word) in held for word in words) / len(words) if words else 0.0


def _stem(word: str) -> str:
    """Roughly what the index's English analyzer makes of a word."""
    return re.sub(r"(?<=\w{3})(ies|es|s|ed|ing|y|e)$", "", word.casefold())
