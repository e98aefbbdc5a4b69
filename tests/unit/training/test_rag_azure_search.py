"""`rag.store=azure_search` over HTTP: what is created, sent, found, deleted, and each refusal."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest

from phi3_tool.azure_search import SearchIndex, SearchService, share_of_words
from phi3_tool.errors import (
    AuthenticationError,
    ConfigurationError,
    RequestRejectedError,
    ServiceError,
)
from phi3_tool.grounding import grounded
from phi3_tool.index import DocumentIndex, index_path, open_index
from phi3_training.cli import main
from phi3_training.errors import StageError, UsageError
from phi3_training.progress import no_progress
from phi3_training.rag.azure_search import (
    Destination,
    Sent,
    Store,
    begin,
    destination,
    down,
    send,
)
from phi3_training.rag.build import Chosen, sync

from .search_service import KEY, SearchServiceStub

HANDBOOK = {
    "tents.md": "# Tents\n\nThe Mossback weighs 2.4 kg.\n\n## Care\n\nDry it before storing.\n",
    "returns.txt": "Unused goods come back within 60 days for a full refund.",
    "hours.txt": "Open from nine to six, on Sundays until noon.",
}
INDEX = "phi3-test"


class Bag:
    """Embeds a text as the bag of its words' hashes."""

    identity = "bag:1"
    dimension = 64

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, crc32(word.encode()) % self.dimension] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


class Shop:
    """A handbook, its index here and the index at a loopback service."""

    def __init__(self, folder: Path, service: SearchServiceStub) -> None:
        self.service, self.waited = service, list[float]()
        self.handbook = folder / "handbook"
        self.handbook.mkdir()
        self.database, self.path = folder / "index.sqlite", folder / "index.json"
        for name, text in HANDBOOK.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.handbook / name).write_text(text, encoding="utf-8")

    def client(self) -> SearchService:
        return SearchService(self.service.endpoint, key=KEY, sleep=self.waited.append)

    def index(self, *, embedder: Bag | None = None, rebuild: bool = False) -> Sent:
        chosen = Chosen(embedder, {"kind": "test"} if embedder else {}, "")
        sync(self.database, [self.handbook], chosen, no_progress, rebuild=rebuild)
        to = Destination(self.path, self.client(), INDEX)
        return send(self.database, to, no_progress, rebuild=rebuild, sleep=self.waited.append)

    def there(self) -> dict[str, str]:
        """The texts in the service, by id."""
        return {key: each["text"] for key, each in self.service.documents[INDEX].items()}

    def here(self) -> dict[str, str]:
        """The texts in the SQLite file, by id."""
        with closing(sqlite3.connect(self.database)) as database:
            return {
                str(key): text for key, text in database.execute("SELECT id, text FROM passage")
            }

    def open(self) -> SearchIndex:
        return SearchIndex(self.path, self.client())


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.delenv("PHI3_SEARCH_KEY", raising=False)
    with SearchServiceStub() as service:
        yield Shop(tmp_path, service)
        assert service.refused == []


def test_the_same_passages_under_the_same_ids(shop: Shop) -> None:
    sent = shop.index(embedder=Bag())

    assert shop.there() == shop.here()
    assert (sent.passages, sent.deleted, sent.index) == (4, 0, INDEX)
    fields = {field["name"]: field for field in shop.service.indexes[INDEX]["fields"]}
    assert fields["vector"]["dimensions"] == 64
    assert fields["vector"]["stored"] is False
    assert fields["text"]["analyzer"] == "en.lucene"
    (body,) = shop.service.sent("search.index")
    assert {action["@search.action"] for action in body["value"]} == {"mergeOrUpload"}


def test_no_key_and_no_vector_is_written_down(shop: Shop) -> None:
    shop.index(embedder=Bag())
    assert KEY not in shop.path.read_text("utf-8")
    assert json.loads(shop.path.read_text("utf-8"))["endpoint"] == shop.service.endpoint


def test_unchanged_documents_send_nothing(shop: Shop) -> None:
    shop.index()
    before = len(shop.service.seen)
    again = shop.index()
    assert (again.passages, again.deleted) == (0, 0)
    assert [method for method, _, _ in shop.service.seen[before:]] == ["GET"]


def test_a_changed_folder_leaves_nothing_of_the_old_one(shop: Shop) -> None:
    shop.index()
    shop.write("returns.txt", "Used goods do not come back.")
    (shop.handbook / "hours.txt").unlink()
    shop.write("tents.md", "# Tents\n\nThe Mossback weighs 2.2 kg.\n")
    sent = shop.index()
    assert shop.there() == shop.here()
    assert sent.deleted > 0
    assert not any("2.4 kg" in text or "Sundays" in text for text in shop.there().values())


def test_rebuild_starts_over_at_the_service(shop: Shop) -> None:
    shop.index()
    shop.index(embedder=Bag(), rebuild=True)
    assert shop.there() == shop.here()
    assert any(field["name"] == "vector" for field in shop.service.indexes[INDEX]["fields"])


def test_a_rebuild_that_was_cut_off_is_not_taken_for_done(shop: Shop) -> None:
    """The generation counts from 1 again: the content says what was sent."""
    shop.index()
    shop.write("returns.txt", "Used goods do not come back.")
    sync(shop.database, [shop.handbook], Chosen(None, {}, ""), no_progress, rebuild=True)
    shop.index()
    assert shop.there() == shop.here()


def test_an_index_that_was_deleted_there_is_made_again(shop: Shop) -> None:
    shop.index()
    del shop.service.indexes[INDEX], shop.service.documents[INDEX]
    with pytest.raises(ConfigurationError, match="any more"):
        shop.open().search("goods")
    assert shop.index().passages == 4


@pytest.mark.parametrize("query_type", ["hybrid", "keyword", "vector"])
def test_a_question_finds_the_same_passage_as_here(shop: Shop, query_type: str) -> None:
    shop.index(embedder=Bag())
    ask = {"query_type": query_type, "embedder": Bag()}
    (there,) = shop.open().search("how do I store the tent before winter, dry?", top_k=1, **ask)  # type: ignore[arg-type]
    (here,) = DocumentIndex(shop.database).search(
        "how do I store the tent before winter, dry?", top_k=1, **ask  # type: ignore[arg-type]
    )  # fmt: skip
    names = ("id", "text", "source", "heading", "page", "first", "last")
    assert [getattr(there, name) for name in names] == [getattr(here, name) for name in names]
    assert there.as_lookup().keys() == here.as_lookup().keys()
    assert there.as_lookup()["metadata"].keys() == here.as_lookup()["metadata"].keys()


def test_the_hybrid_request(shop: Shop) -> None:
    shop.index(embedder=Bag())
    shop.open().search('what about "-goods" AND refund?', embedder=Bag())
    body = shop.service.sent("search.post.search")[-1]
    (query,) = body["vectorQueries"]
    assert body["search"] == "about goods refund"  # no operators, no function words
    assert len(query.pop("vector")) == 64
    assert query == {"kind": "vector", "k": 50, "fields": "vector"}
    assert body["top"] == 50


def test_a_cosine_from_there_is_the_cosine_from_here(shop: Shop) -> None:
    shop.index(embedder=Bag())
    there = {hit.id: hit for hit in shop.open().search("a full refund", embedder=Bag())}
    here = DocumentIndex(shop.database).search("a full refund", embedder=Bag())
    for hit in here:
        assert there[hit.id].cosine == pytest.approx(hit.cosine, abs=2e-3)  # float16 vectors


def test_words_that_nothing_holds_score_low(shop: Shop) -> None:
    """One common word is no answer: `min_score` must see it."""
    shop.index()
    best = shop.open().search("which goods does the moon colony export to Mars?")[0]
    assert best.score < 0.15
    right = shop.open().search("unused goods within days refund")[0]
    assert right.score == 0.6  # all of its words
    assert grounded("q", [right.as_lookup()])["text"]


def test_the_order_is_ours_not_rank_fusion(shop: Shop) -> None:
    """Fusion by ranks gives the best word match full marks where one common word matched."""
    shop.index(embedder=Bag())
    hits = shop.open().search("nine noon Sundays open until six from to on", embedder=Bag())
    assert hits[0].source == "hours.txt"
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_service_that_reports_no_parts_keeps_its_own_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHI3_SEARCH_KEY", raising=False)
    with SearchServiceStub(tells_parts=False) as service:
        shop = Shop(tmp_path, service)
        shop.index(embedder=Bag())
        hits = shop.open().search("a full refund for unused goods", embedder=Bag())
    assert hits[0].source == "returns.txt"
    assert hits[0].cosine is None
    assert 0 < hits[-1].score <= hits[0].score <= 1


def test_busy_now_is_tried_again_when_it_says(shop: Shop) -> None:
    busy = iter([(429, {}, {"Retry-After": "7"}), (503, {}, {})])
    shop.service.trouble = lambda _method, path: (
        next(busy, None) if path.endswith("search.index") else None
    )
    shop.index()
    assert shop.there() == shop.here()
    assert shop.waited == [7.0, 2.0]


def test_single_documents_are_sent_again_alone(shop: Shop) -> None:
    """A 207: each failed document has its own status."""
    refusals = iter([(503, "busy"), (409, "version conflict")])
    shop.service.fails = lambda action: next(refusals, None) if action["id"] == "2" else None
    shop.index()
    assert shop.there() == shop.here()
    sizes = [len(body["value"]) for body in shop.service.sent("search.index")]
    assert sizes == [4, 1, 1]


def test_documents_refused_for_good_are_all_named(shop: Shop) -> None:
    shop.index()
    shop.write("returns.txt", "Used goods do not come back.")
    (shop.handbook / "hours.txt").unlink()
    shop.service.fails = lambda action: (
        (400, "too large") if action["@search.action"] != "delete" else None
    )
    with pytest.raises(
        StageError, match=r"(?s)refused 3 of 3 .*tents\.md: too large.*returns\.txt"
    ):
        shop.index()
    assert any("Sundays" in text for text in shop.there().values())  # nothing was deleted
    shop.service.fails = lambda _action: None
    shop.index()
    assert shop.there() == shop.here()


def test_a_key_that_is_refused_names_the_roles(shop: Shop) -> None:
    shop.service.trouble = lambda _method, _path: (403, {"error": {"message": "no"}}, {})
    with pytest.raises(AuthenticationError, match="Search Index Data Contributor"):
        shop.index()


def test_what_the_service_says_is_passed_on(shop: Shop) -> None:
    shop.service.trouble = lambda method, _path: (
        (400, {"error": {"message": "quota of indexes exceeded"}}, {}) if method == "PUT" else None
    )
    with pytest.raises(RequestRejectedError, match="quota of indexes exceeded"):
        shop.index()


def test_a_service_that_stays_down(shop: Shop) -> None:
    shop.service.trouble = lambda _method, _path: (503, {"error": {"message": "down"}}, {})
    with pytest.raises(ServiceError, match="down"):
        shop.index()
    assert len(shop.waited) == 5


def test_somebody_elses_index_is_never_filled_or_deleted(shop: Shop) -> None:
    shop.service.indexes[INDEX] = {"name": INDEX, "fields": [], "description": "hotels"}
    for rebuild in (False, True):
        with pytest.raises(UsageError, match=r"rag\.search\.index=NAME"):
            shop.index(rebuild=rebuild)
    shop.path.write_text(json.dumps({**SETTINGS, "endpoint": shop.service.endpoint}), "utf-8")
    with pytest.raises(UsageError, match="not made by phi3"):
        down(shop.path, service=shop.client())
    assert list(shop.service.indexes) == [INDEX]


def test_down_deletes_the_index_and_the_file(shop: Shop) -> None:
    shop.index()
    assert INDEX in down(shop.path, service=shop.client())
    assert shop.service.indexes == {}
    assert not shop.path.exists()


def test_killed_while_it_fills(shop: Shop) -> None:
    """The file names the index before it exists; the next run finishes it."""
    pid = os.fork()
    if pid == 0:
        shop.service.trouble = lambda _method, _path: None
        to = Destination(shop.path, shop.client(), INDEX)
        sync(shop.database, [shop.handbook], Chosen(None, {}, ""), no_progress)
        send(shop.database, to, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(pid, 0)
    assert json.loads(shop.path.read_text("utf-8"))["index"] == INDEX
    assert shop.index().passages == 4
    assert shop.there() == shop.here()


SETTINGS = {
    "format": "1", "store": "azure_search", "endpoint": "https://a.search.windows.net",
    "index": INDEX, "embedder": "none", "passages": "4", "generation": "1",
}  # fmt: skip


def test_a_flow_finds_the_file_in_its_folder(tmp_path: Path) -> None:
    assert index_path("", tmp_path) == tmp_path / "index.sqlite"
    (tmp_path / "index.json").write_text(json.dumps(SETTINGS), "utf-8")
    opened = open_index(index_path("", tmp_path))
    assert isinstance(opened, SearchIndex)
    assert opened.facts()["embedder"] == "none"


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "does not say"), ("no", "does not say"), ('{"store": "azure_search"}', "format None")],
)
def test_a_file_that_names_no_index(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "index.json").write_text(content, "utf-8")
    with pytest.raises(ConfigurationError, match=said):
        SearchIndex(tmp_path / "index.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rag.store=redis"], "sqlite or azure_search"),
        (["rag.store=sqlite", "rag.search.endpoint=https://a"], "goes with"),
        (["rag.store=azure_search", "rag.serch.endpoint=x"], "known: rag.store"),
        (["rag.search.index=Not--Good"], "no index name"),
        (["rag.search.create=yes"], "true or false"),
        (["rag.search.create=true", "rag.search.endpoint=https://a"], "leave"),
        (["rag.search.tier=huge"], "free, basic"),
    ],
)
def test_settings_that_cannot_be_meant(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Store.of(words)


def test_where_the_passages_go(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    here = Store.of(["rag.store=azure_search", "rag.search.endpoint=https://a.search.windows.net/"])
    assert destination(path, Store.of([]), "documents") is None
    with pytest.raises(UsageError, match=r"rag\.search\.endpoint=https"):
        destination(path, Store.of(["rag.store=azure_search"]), "documents")
    to = destination(path, here, "My Docs!")
    assert to is not None
    assert re.fullmatch(r"phi3-my-docs-[0-9a-f]{8}", to.index)
    path.write_text(json.dumps(SETTINGS), "utf-8")
    again = destination(path, Store.of([]), "documents")  # where they are
    assert again is not None
    assert (again.service.endpoint, again.index) == ("https://a.search.windows.net", INDEX)
    for other in (["rag.store=sqlite"], ["rag.search.endpoint=https://b.search.windows.net"]):
        with pytest.raises(UsageError, match="phi3 rag down"):
            destination(path, Store.of(other), "documents")


def test_a_service_of_its_own_is_written_down_before_it_exists(tmp_path: Path) -> None:
    path, database = tmp_path / "index.json", tmp_path / "index.sqlite"
    (tmp_path / "a.txt").write_text("Unused goods come back.", "utf-8")
    sync(database, [tmp_path / "a.txt"], Chosen(None, {}, ""), no_progress)
    create = Store.of(["rag.store=azure_search", "rag.search.create=true"])
    to = destination(path, create, "documents", lambda name: f"/subscriptions/1/{name}")
    assert to is not None
    assert to.service.endpoint == f"https://{to.index}.search.windows.net"
    assert begin(database, to)
    for again in (Store.of([]), create):
        known = destination(path, again, "documents")
        assert known is not None
        assert (known.index, known.service_id) == (to.index, f"/subscriptions/1/{to.index}")
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "content": "x"}), "utf-8")
    assert not begin(database, to)  # all of it is there


def test_addresses_that_a_key_must_not_go_to() -> None:
    for endpoint, said in (
        ("a.search.windows.net", "not an address"),
        ("https://user:password@a.search.windows.net", "not an address"),
        ("http://a.b", "use https"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            SearchService(endpoint)


def test_neither_a_netrc_entry_nor_a_proxy_comes_between(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n", "utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    shop.service.accepts_key = False  # tokens alone, in the header that netrc would replace
    service = SearchService(shop.service.endpoint, token_provider=lambda: KEY)
    assert service.call("GET", "/indexes('none')", may_miss=True) is None


def test_a_key_that_is_no_key_is_not_quoted() -> None:
    with pytest.raises(ConfigurationError, match="PHI3_SEARCH_KEY") as caught:
        SearchService("https://a.search.windows.net", key="planted\nkey")
    assert "planted" not in str(caught.value)


def test_the_share_of_words_forgives_endings() -> None:
    document = {"heading": "Tents | Care", "text": "Dry it before storing; batteries apart."}
    assert share_of_words(["tent", "stored", "battery", "moon"], document) == 0.75


def test_the_commands(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Index, unchanged, search, and back to the SQLite file; the flow's folder follows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHI3_SEARCH_KEY", KEY)
    flow = tmp_path / "flows" / "phi3_rag_chat"
    flow.mkdir(parents=True)
    there = f"rag.search.endpoint={shop.service.endpoint}"
    index = ["rag", "index", "handbook", "--embedder", "none"]

    assert main([*index, "rag.store=azure_search", there]) == 0
    assert main(index) == 0
    assert "4 passages sent" in (printed := capsys.readouterr().out)
    assert "holds these passages already" in printed
    assert [file.name for file in flow.iterdir()] == ["index.json"]
    assert main(["rag", "search", "refund for unused goods", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["metadata"]["source"].endswith("returns.txt")
    assert shop.service.sent("search.post.search")
    assert main(["rag", "down"]) == 0
    assert shop.service.indexes == {}
    assert [file.name for file in flow.iterdir()] == ["index.sqlite"]
    assert main(["rag", "search", "refund"]) == 0


def test_a_service_that_bills_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "runs" / "documents" / "rag" / "index.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**SETTINGS, "service_id": "/subscriptions/1/x"}), "utf-8")
    for command in (["status"], ["down"], ["down", "documents"]):
        assert main(command) == 0
        assert "phi3 rag down --run documents" in capsys.readouterr().out
    assert main(["down", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": [], "broken": []}
