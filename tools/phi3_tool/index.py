"""The index of a user's documents: one SQLite file, searched by words (BM25) and by meaning.

Reads the file that `phi3 rag index` writes. Words need the standard library alone; meaning needs
numpy and the embedder that the index names (see `embedders`).

A passage scores `cosine + 0.5 * bm25 / reach`, where `reach` is the highest BM25 that any passage
could have for this question. Reciprocal rank fusion and min-max scaling give the best BM25 hit
full marks even where it matched one common word: on paraphrased questions they found the right
passage first in 3 % of the cases, dense retrieval alone in 80 %, this sum in 73 % (and more than
either on questions in the document's own words).
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from .errors import ConfigurationError, RequestRejectedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Part of the file; another format is refused, and `phi3 rag index` writes it again.
FORMAT = 1
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE document (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL,
    size INTEGER NOT NULL, modified INTEGER NOT NULL, passages INTEGER NOT NULL
);
CREATE TABLE passage (
    id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES document(id),
    number INTEGER NOT NULL, heading TEXT NOT NULL, text TEXT NOT NULL, page INTEGER,
    first INTEGER NOT NULL, last INTEGER NOT NULL, vector BLOB
);
CREATE INDEX passage_document ON passage(document);
CREATE VIRTUAL TABLE words USING fts5(
    heading, text, content='passage', content_rowid='id', tokenize='porter unicode61'
);
"""
#: Names the index for flows whose folder has none, for example in a container.
INDEX_VARIABLE = "PHI3_INDEX"
QUERY_TYPES = ("hybrid", "keyword", "vector")

_K1 = 1.2  # fixed in SQLite's FTS5, so a word adds at most idf * (k1 + 1)
_WORD_WEIGHT = 0.5  # measured: 0.3 and 1.0 were worse on one of the two kinds of questions
_CANDIDATES = 200  # of the word search; more changed no first place
# Function words are in nearly every passage: they cost 80 ms in 10,000 passages, and find nothing.
_STOP_WORDS = frozenset(
    """
    a an and are as at be been but by can could did do does for from had has have how i if in is
    it its may me my of on or our shall should so than that the their them then there these they
    this those to was we were what when where which who whom whose why will with would you your
    """.split()  # noqa: SIM905 - forty quoted words are hard to read
)
_WORD = re.compile(r"\w+")


class Embedder(Protocol):
    """What turns texts into unit vectors. `identity` names the weights, not the file."""

    identity: str
    dimension: int

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of shape (texts, dimension), each of length 1."""
        ...


class LookupResult(TypedDict):
    """A passage as Prompt flow's Index Lookup gives it; `metadata` has the rest of a `Hit`."""

    text: str
    score: float
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Hit:
    """A passage that was found, with the parts of its score.

    `page` counts from 1, and is None where the document has no pages; `first` and `last` are
    character offsets into the document's text. `cosine` is None without an embedder.
    """

    id: int
    text: str
    score: float
    words: float
    cosine: float | None
    source: str
    heading: str
    page: int | None
    first: int
    last: int

    @property
    def place(self) -> str:
        """File, page and heading in one line, as a citation shows them."""
        page = f", page {self.page}" if self.page is not None else ""
        heading = f" ({self.heading})" if self.heading else ""
        return f"{self.source}{page}{heading}"

    def as_lookup(self) -> LookupResult:
        """As Prompt flow's Index Lookup gives it."""
        facts = {k: v for k, v in asdict(self).items() if k not in ("text", "score")}
        return {"text": self.text, "score": self.score, "metadata": {**facts, "place": self.place}}


def hits_of(passages: Sequence[Mapping[str, Any]]) -> list[Hit]:
    """What `as_lookup` wrote, read again; raises RequestRejectedError for anything else."""
    try:
        return [
            Hit(
                text=passage["text"],
                score=passage["score"],
                **{key: value for key, value in passage["metadata"].items() if key != "place"},
            )
            for passage in passages
        ]
    except (KeyError, TypeError, AttributeError):
        raise RequestRejectedError(
            "passages must be the output of the lookup node: a list of "
            '{"text", "score", "metadata"}'
        ) from None


@dataclass(frozen=True)
class Query:
    """A checked question to an index."""

    question: str
    top_k: int
    query_type: str
    embedder: Embedder | None

    def needs_vectors(self, name: str, facts: Mapping[str, str]) -> bool:
        """Whether to search by meaning in the index `name`; `hybrid` does without where it must.

        Raises ConfigurationError for `vector` in an index without vectors.
        """
        if self.query_type == "vector" and facts["embedder"] == "none":
            raise ConfigurationError(
                f"{name} has no vectors; search by words with query_type keyword, or "
                "index with an embedder: phi3 rag index FOLDER --embedder onnx"
            )
        return self.query_type != "keyword" and facts["embedder"] != "none"


class PassageIndex(ABC):
    """What finds passages: this module's SQLite file, or `azure_search.SearchIndex`."""

    path: Path

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What the index records of itself: embedder, dimension, generation, passages."""

    @abstractmethod
    def find(self, query: Query) -> list[Hit]:
        """What `search` returns, for a checked question."""

    def search(
        self,
        question: str,
        *,
        top_k: int = 4,
        query_type: str = "hybrid",
        embedder: Embedder | None = None,
    ) -> list[Hit]:
        """The passages that fit best, best first, at most `top_k` (1 to 100).

        `hybrid` falls back to words alone where the index has no vectors. Raises
        ConfigurationError when `embedder` is not the one that the index was made with, or is
        missing, and RequestRejectedError for an empty question or a wrong argument.
        """
        if not isinstance(question, str) or not question.strip():
            raise RequestRejectedError("The question is empty: type something to look up")
        if query_type not in QUERY_TYPES:
            raise RequestRejectedError(
                f"query_type {query_type!r} is unknown; choose one of: {', '.join(QUERY_TYPES)}"
            )
        if not 1 <= top_k <= 100:
            raise RequestRejectedError(f"top_k is {top_k}; it must be between 1 and 100")
        return self.find(Query(question, top_k, query_type, embedder))


def check_embedder(index: str, facts: Mapping[str, str], embedder: Embedder | None) -> Embedder:
    """The embedder that the index was made with; ConfigurationError for another, or for none."""
    if embedder is None:
        raise ConfigurationError(
            f"{index} was made with the embedder {facts['embedder']}, which is missing "
            "here; install what docs/rag.md names, or search with query_type keyword"
        )
    if embedder.identity != facts["embedder"]:
        raise ConfigurationError(
            f"{index} was made with the embedder {facts['embedder']}; the vectors of "
            f"{embedder.identity} mean something else. Use the first, or index again with: "
            "phi3 rag index FOLDER --rebuild"
        )
    return embedder


def question_words(question: str) -> list[str]:
    """The words to look up: once each, lower case, without function words unless all are."""
    asked = list(dict.fromkeys(word.lower() for word in _WORD.findall(question)))
    return [word for word in asked if word not in _STOP_WORDS] or asked


def score_of(words: float, cosine: float | None) -> float:
    """A passage's score: BM25 as a share of what it could reach, and the cosine if there is one."""
    return words if cosine is None else _WORD_WEIGHT * words + cosine


class DocumentIndex(PassageIndex):
    """An index file, open for searching. Safe to use from several threads.

    Raises ConfigurationError when the file is missing, is no index or has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._vectors: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None
        missing = ConfigurationError(
            f"There is no index at {path}; make one with: phi3 rag index FOLDER"
        )
        if not path.is_file():
            raise missing
        try:
            facts = self.facts()
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(
                f"{path} is not an index of documents ({error}); make one with: phi3 rag index"
            ) from None
        if not facts:  # nothing was ever written to it: its first run found a fault
            raise missing
        if facts.get("format") != str(FORMAT):
            raise ConfigurationError(
                f"{path} has the format {facts.get('format')}, this version reads {FORMAT}; "
                "make it again with: phi3 rag index FOLDER --rebuild"
            )

    def facts(self) -> dict[str, str]:
        """What the index records of itself: embedder, dimension, generation, passages."""
        with self._reading() as database:
            return dict(database.execute("SELECT key, value FROM meta"))

    def find(self, query: Query) -> list[Hit]:
        """By words, by meaning, or both, from one generation of the file."""
        with self._reading() as database:
            facts = dict(database.execute("SELECT key, value FROM meta"))
            by_words: dict[int, float] = {}
            by_meaning: dict[int, float] = {}
            if query.needs_vectors(str(self.path), facts):
                by_meaning = self._by_meaning(database, facts, query)
            if query.query_type != "vector":
                by_words = _by_words(database, query.question)
            scores = {
                number: score_of(by_words.get(number, 0.0), by_meaning.get(number))
                # All that words found, and the best by meaning: no first place was lost by that.
                for number in by_words.keys() | _best(by_meaning, _CANDIDATES)
            }
            best = _best(scores, query.top_k)
            return [
                Hit(
                    id=number,
                    text=text,
                    score=round(scores[number], 4),
                    words=round(by_words.get(number, 0.0), 4),
                    cosine=round(by_meaning[number], 4) if by_meaning else None,
                    source=source,
                    heading=heading,
                    page=page,
                    first=first,
                    last=last,
                )
                for number in best
                for text, heading, page, first, last, source in database.execute(
                    "SELECT text, heading, page, first, last, path FROM passage "
                    "JOIN document ON document.id = document WHERE passage.id = ?",
                    (number,),
                )
            ]

    def passages(self) -> list[Hit]:
        """Every passage in the order of the documents, scored 0."""
        with self._reading() as database:
            return [
                Hit(number, text, 0.0, 0.0, None, source, heading, page, first, last)
                for number, text, heading, page, first, last, source in database.execute(
                    "SELECT passage.id, text, heading, page, first, last, path FROM passage "
                    "JOIN document ON document.id = document ORDER BY passage.id"
                )
            ]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One transaction: a search sees one generation, whatever is being written."""
        try:
            file = self.path.stat()
        except OSError:
            raise ConfigurationError(
                f"The index {self.path} is gone; make it again with: phi3 rag index FOLDER"
            ) from None
        # A new index is put in the place of the old file; a served flow must see it.
        stamp = (file.st_dev, file.st_ino)
        database, opened = getattr(self._local, "opened", (None, None))
        if database is None or opened != stamp:
            address = f"{self.path.absolute().as_uri()}?mode=ro"
            # Read-only, so that a search cannot create or lock the file; one connection per thread,
            # because sqlite3 allows no other use.
            database = sqlite3.connect(address, uri=True, isolation_level=None, timeout=30)
            self._local.opened = (database, stamp)
        database.execute("BEGIN")
        try:
            yield database
        finally:
            # Nothing was written: it only ends the reading.
            database.execute("ROLLBACK")

    def _by_meaning(
        self, database: sqlite3.Connection, facts: Mapping[str, str], query: Query
    ) -> dict[int, float]:
        """Cosine of every passage with the question."""
        import numpy as np

        embedder = check_embedder(str(self.path), facts, query.embedder)
        generation = int(facts["generation"])
        with self._lock:
            # Read once for a generation: 10,000 passages are 7 MB, and take longer to read than to
            # search.
            if self._vectors is None or self._vectors[0] != generation:
                rows = database.execute("SELECT id, vector FROM passage ORDER BY id").fetchall()
                numbers = np.array([number for number, _ in rows], np.int64)
                packed = b"".join(vector for _, vector in rows)
                vectors = np.frombuffer(packed, np.float16).astype(np.float32)
                vectors = vectors.reshape(len(rows), embedder.dimension)
                self._vectors = (generation, numbers, vectors)
            _, numbers, vectors = self._vectors
        # All of them at once: 0.2 ms for 10,000 passages, so that no index of vectors is needed.
        cosines = vectors @ embedder.embed([query.question])[0]
        return dict(zip(numbers.tolist(), cosines.tolist()))  # noqa: B905 - Python 3.9


def index_path(named: str, flow_folder: Path) -> Path:
    """Where a flow's index is: the name it was given, else $PHI3_INDEX, else in its own folder.

    There it is `index.json` where the passages are in Azure AI Search, else `index.sqlite`.
    """
    named = named or os.environ.get(INDEX_VARIABLE, "")
    if named:
        return Path(named)
    elsewhere = flow_folder / "index.json"
    return elsewhere if elsewhere.is_file() else flow_folder / "index.sqlite"


_open: dict[Path, PassageIndex] = {}
_open_lock = threading.Lock()


def open_index(path: Path) -> PassageIndex:
    """The index at a path, opened once per process; `.json` names one in Azure AI Search.

    Raises ConfigurationError where there is none.
    """
    with _open_lock:
        if path not in _open:
            if path.suffix == ".json":
                # Here, because an index in a file needs no HTTP.
                from .azure_search import SearchIndex

                _open[path] = SearchIndex(path)
            else:
                _open[path] = DocumentIndex(path)
        return _open[path]


def _best(scores: Mapping[int, float], count: int) -> list[int]:
    """The numbers with the highest scores; equal scores in the order of the documents."""
    return sorted(scores, key=lambda number: (-scores[number], number))[:count]


def _by_words(database: sqlite3.Connection, question: str) -> dict[int, float]:
    """BM25 of the passages that hold a word of the question, divided by what it could reach."""
    words = question_words(question)
    if not words:
        return {}
    # Quoted, because a bare NEAR, AND or colon is syntax.
    quoted = [f'"{word}"' for word in words]
    (total,) = database.execute("SELECT count(*) FROM passage").fetchone()
    reach = 0.0
    for word in quoted:
        (having,) = database.execute(
            "SELECT count(*) FROM words WHERE words MATCH ?", (word,)
        ).fetchone()
        # FTS5's own idf, and its floor for words that more than half of the passages have.
        reach += (_K1 + 1) * max(math.log((total - having + 0.5) / (having + 0.5)), 1e-6)
    scored = database.execute(
        "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ? ORDER BY bm25(words) LIMIT ?",
        (" OR ".join(quoted), _CANDIDATES),
    )
    return {number: min(score / reach, 1.0) for number, score in scored}
