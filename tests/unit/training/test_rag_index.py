"""Documents to an index and back: what is read, cut, kept, found and refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sqlite3
import threading
import zipfile
from collections.abc import Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pypdf import PdfWriter

from phi3_tool.embedders import EndpointEmbedder, OnnxEmbedder
from phi3_tool.errors import ConfigurationError, RequestRejectedError, ServiceError
from phi3_tool.index import DocumentIndex
from phi3_training.errors import UsageError
from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, Synced, publish, sync
from phi3_training.rag.cutting import Cutter
from phi3_training.rag.documents import DocumentError, Section, read_sections
from phi3_training.rag.figures import Retrieval, measure
from phi3_training.rag.questions import Question, holds, read_questions, right_ids_of

SHIPPED = Path(__file__).parents[3] / "training/data/handbook"
HANDBOOK = {
    "tents.md": "# Tents\n\nThe Mossback weighs 2.4 kg.\n\n## Care\n\nDry it before storing.\n",
    "returns.txt": "Unused goods come back within 60 days for a full refund.",
    "hours.html": "<html><head><title>no</title></head><body><h1>Hours</h1><p>Open from nine."
    "</p><script>steal()</script></body></html>",
}


class Bag:
    """Embeds a text as the bag of its words' hashes; counts what it is asked for."""

    identity = "bag:1"
    dimension = 64

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.asked += texts
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, crc32(word.encode()) % self.dimension] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    folder.mkdir()
    for name, text in HANDBOOK.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def index(tmp_path: Path, folder: Path, embedder: Any = None, **options: Any) -> Synced:
    chosen = Chosen(embedder, {"kind": "test"} if embedder else {}, "")
    return sync(tmp_path / "index.sqlite", [folder], chosen, no_progress, **options)


def test_a_hit_says_file_heading_and_offsets(tmp_path: Path, handbook: Path) -> None:
    index(tmp_path, handbook)
    (hit,) = DocumentIndex(tmp_path / "index.sqlite").search("storing", top_k=1)
    assert (hit.source, hit.heading, hit.text) == (
        "tents.md",
        "Tents | Care",
        "Dry it before storing.",
    )
    assert HANDBOOK["tents.md"][hit.first : hit.last] == hit.text
    assert hit.cosine is None
    assert hit.place == "tents.md (Tents | Care)"


def test_scripts_and_what_a_browser_hides_are_not_text(handbook: Path) -> None:
    (section,) = read_sections(handbook / "hours.html")
    assert (section.heading, section.text) == (("Hours",), "Open from nine.")


def test_headings_in_fenced_code_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# One\n```\n# not a heading\n```\ntext\n## Two\nmore\n", encoding="utf-8")
    read = [s for s in read_sections(file) if s.text.strip()]
    assert [s.heading for s in read] == [("One",), ("One", "Two")]
    assert "# not a heading" in read[0].text


@pytest.mark.parametrize(
    ("title", "heading"),
    [("Terms of\nrental", ("Terms of rental",)), ("Microsoft Word - terms.docx", ()),
     ("Untitled 2", ()), ("terms.indd", ()), (None, ())],
)  # fmt: skip
def test_pages_of_a_pdf_stand_under_its_title(
    tmp_path: Path, title: str | None, heading: tuple[str, ...]
) -> None:
    """A page seldom says what its document is about; what programs write as a title says less."""
    writer = PdfWriter(clone_from=SHIPPED / "rental-terms.pdf")
    writer.metadata = {"/Title": title} if title else None
    writer.write(tmp_path / "a.pdf")
    read = list(read_sections(tmp_path / "a.pdf"))
    assert [(section.heading, section.page) for section in read] == [
        (heading, 1), (heading, 2), (heading, 3),
    ]  # fmt: skip


def test_unchanged_files_cost_nothing_and_removed_ones_leave(
    tmp_path: Path, handbook: Path
) -> None:
    bag = Bag()
    first = index(tmp_path, handbook, bag)
    assert (first.documents, first.added, first.embedded) == (3, 3, first.passages)
    again = index(tmp_path, handbook, bag)
    assert (again.unchanged, again.embedded) == (3, 0)
    os.utime(handbook / "returns.txt", (1, 1))  # touched, with the same content
    assert index(tmp_path, handbook, bag).unchanged == 3
    (handbook / "returns.txt").unlink()
    (handbook / "tents.md").write_text(
        "# Tents\n\nThe Mossback weighs 2.1 kg.\n\n## Care\n\nDry it before storing.\n"
    )
    bag.asked.clear()
    last = index(tmp_path, handbook, bag)
    assert (last.removed, last.changed, last.embedded) == (1, 1, 1)
    assert bag.asked == ["Tents: The Mossback weighs 2.1 kg."]
    opened = DocumentIndex(tmp_path / "index.sqlite")
    assert opened.search("refund", query_type="keyword") == []
    assert "2.1" in opened.search("what the Mossback weighs", embedder=bag, top_k=1)[0].text


def test_an_index_of_another_embedder_is_refused(tmp_path: Path, handbook: Path) -> None:
    index(tmp_path, handbook, Bag())
    other = Bag()
    other.identity = "bag:2"
    opened = DocumentIndex(tmp_path / "index.sqlite")
    with pytest.raises(ConfigurationError, match=r"bag:1.*bag:2.*--rebuild"):
        opened.search("tent", embedder=other)
    with pytest.raises(ConfigurationError, match=r"bag:1, which is missing"):
        opened.search("tent")
    assert opened.search("tent", query_type="keyword")
    with pytest.raises(UsageError, match=r"--rebuild"):
        index(tmp_path, handbook, other)
    assert index(tmp_path, handbook, other, rebuild=True).embedder == "bag:2"


def test_one_common_word_does_not_beat_the_meaning(tmp_path: Path) -> None:
    """What plain rank fusion gets wrong: the best BM25 hit here matches `much` alone."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Not much is known of the founder, and much of it is invented.")
    (folder / "b.txt").write_text("Price list: a tent costs 240 dollars, a stove costs 60.")
    (folder / "c.txt").write_text("Walkers meet on Sundays.")
    bag = Bag()
    index(tmp_path, folder, bag)
    hits = DocumentIndex(tmp_path / "index.sqlite").search(
        "how much: tent costs, list price", embedder=bag, top_k=3
    )
    assert hits[0].source == "b.txt"
    assert hits[0].score == pytest.approx((hits[0].cosine or 0) + 0.5 * hits[0].words, abs=2e-4)


@pytest.mark.parametrize("question", ['NEAR("', "a AND", "price: *", "-tent", "^", "tent's"])
def test_a_question_is_never_query_syntax(tmp_path: Path, handbook: Path, question: str) -> None:
    index(tmp_path, handbook)
    DocumentIndex(tmp_path / "index.sqlite").search(question)


def test_wrong_arguments_are_named(tmp_path: Path, handbook: Path) -> None:
    index(tmp_path, handbook)
    opened = DocumentIndex(tmp_path / "index.sqlite")
    with pytest.raises(RequestRejectedError, match="empty"):
        opened.search("  ")
    with pytest.raises(RequestRejectedError, match="top_k is 0"):
        opened.search("tent", top_k=0)
    with pytest.raises(RequestRejectedError, match="hybrid, keyword, vector"):
        opened.search("tent", query_type="semantic")
    with pytest.raises(ConfigurationError, match="no vectors"):
        opened.search("tent", query_type="vector")
    with pytest.raises(ConfigurationError, match="phi3 rag index FOLDER"):
        DocumentIndex(tmp_path / "missing.sqlite")
    (tmp_path / "other.sqlite").write_text("not a database, but long enough to be looked at" * 9)
    with pytest.raises(ConfigurationError, match="is not an index"):
        DocumentIndex(tmp_path / "other.sqlite")


@pytest.mark.patient
def test_every_unreadable_file_is_named_at_once(tmp_path: Path, handbook: Path) -> None:
    (handbook / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    scan = PdfWriter()
    scan.add_blank_page(200, 200)
    scan.write(handbook / "scan.pdf")
    locked = PdfWriter()
    locked.add_blank_page(200, 200)
    locked.encrypt("secret", algorithm="RC4-128")
    locked.write(handbook / "locked.pdf")
    (handbook / "letter.docx").write_text("no zip")
    with zipfile.ZipFile(handbook / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(201 << 20))
    (handbook / "table.xlsx").write_bytes(b"PK")
    (handbook / "rows.jsonl").write_text('{"text": "a"}\n{"other": 1}\n')
    (handbook / "out.txt").symlink_to("/etc/hostname")
    with pytest.raises(DocumentError) as caught:
        index(tmp_path, handbook)
    named = {fault.path: fault.what for fault in caught.value.faults}
    assert named.keys() == {
        "broken.pdf", "scan.pdf", "locked.pdf", "letter.docx", "bomb.docx", "table.xlsx",
        "rows.jsonl", "out.txt",
    }  # fmt: skip
    assert "scan" in named["scan.pdf"]
    assert "password" in named["locked.pdf"]
    assert "unpacks to more than 200 MB" in named["bomb.docx"]
    assert named["rows.jsonl"] == "row 2 has no passage"
    skipped = index(tmp_path, handbook, skip_unreadable=True)
    assert (skipped.documents, len(skipped.skipped)) == (3, 8)


def test_hidden_files_are_left_out(tmp_path: Path, handbook: Path) -> None:
    (handbook / ".git").mkdir()
    (handbook / ".git" / "HEAD.txt").write_text("ref")
    (handbook / "~$tents.docx").write_text("lock of an editor")
    assert index(tmp_path, handbook).documents == 3


def test_nothing_to_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="nothing to index"):
        index(tmp_path, tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="There is no index"):
        DocumentIndex(tmp_path / "index.sqlite")


def test_passages_fit_and_keep_their_place() -> None:
    def count(text: str) -> int:
        return len(text.split())

    text = "\n\n".join(f"Paragraph {n}. " + "word " * 60 for n in range(20))
    cut = list(Cutter(count, 100).passages(Section(text, ("A", "B"), 3, 10)))
    assert len(cut) > 10
    assert all(count(passage.searched) <= 100 for passage in cut)
    assert all(text[p.first - 10 : p.last - 10] == p.text for p in cut)
    assert {(p.page, p.heading) for p in cut} == {(3, "A | B")}
    assert " ".join(text.split()) == " ".join(" ".join(p.text for p in cut).split())


def test_a_line_of_many_megabytes_is_cut(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "long.txt").write_text("word" * 500_000)
    assert index(tmp_path, folder).passages >= 1


def sync_until_killed(file: Path, folder: Path, steps: int) -> int:
    """The wait status of a process that syncs and is killed at a step of its progress."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = steps

    def step(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sync(file, [folder], Chosen(Bag(), {"kind": "test"}, ""), step)
    finally:
        os._exit(0)


@pytest.mark.patient
def test_a_killed_run_leaves_the_generation_before(tmp_path: Path, handbook: Path) -> None:
    """Killed at ten points; the index answers as before, and the next run completes it."""
    index(tmp_path, handbook, Bag())
    for number in range(200):
        (handbook / f"{number}.txt").write_text(f"Shelf {number} holds article {number * 7}.")
    file = tmp_path / "index.sqlite"
    # While the files are read, between the batches of vectors, and when the index is written.
    for steps in (1, 2, 50, 150, 202, 203, 204, 205, 206, 208):
        run = sync_until_killed(file, handbook, steps)
        assert os.WIFSIGNALED(run), steps
        assert os.WTERMSIG(run) == signal.SIGKILL
        opened = DocumentIndex(file)
        assert opened.facts()["generation"] == "1"
        assert opened.search("storing", query_type="keyword")
        with closing(sqlite3.connect(file)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    bag = Bag()
    synced = index(tmp_path, handbook, bag)
    assert (synced.documents, synced.added) == (203, 200)
    assert synced.embedded < 200  # what a killed run had computed was kept
    assert not list(tmp_path.glob("*.vectors"))


def test_a_flows_copy_is_whole_and_seen_at_once(tmp_path: Path, handbook: Path) -> None:
    index(tmp_path, handbook)
    copy = tmp_path / "flow.sqlite"
    publish(tmp_path / "index.sqlite", copy)
    served = DocumentIndex(copy)
    assert served.search("refund")
    before = copy.stat().st_ino
    publish(tmp_path / "index.sqlite", copy)
    assert copy.stat().st_ino == before  # the same generation: nothing is written
    (handbook / "new.txt").write_text("Kayaks are rented by the hour.")
    index(tmp_path, handbook)
    publish(tmp_path / "index.sqlite", copy)
    assert served.search("kayaks")[0].source == "new.txt"


def test_onnx_embedder_averages_the_tokens_and_scales(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "red": 1, "blue": 2, "[PAD]": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = np.array([[0, 0, 1], [1, 0, 0], [0, 2, 0], [9, 9, 9]], np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["states"])],
        "bag",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "length"])],
        [helper.make_tensor_value_info("states", TensorProto.FLOAT, ["n", "length", 3])],
        [numpy_helper.from_array(table, "table")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "model.onnx")
    embedder = OnnxEmbedder(tmp_path)
    vectors = embedder.embed(["red blue", "red"])  # padding of the second must not count
    wanted = np.array([[0.5, 1.0, 0], [1, 0, 0]]) / [[np.sqrt(1.25)], [1]]
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)
    assert (embedder.dimension, embedder.count("red blue red")) == (3, 3)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer.json is missing"):
        OnnxEmbedder(tmp_path)


class Embeddings(BaseHTTPRequestHandler):
    """Answers /v1/embeddings in the wrong order, once after a 429."""

    throttled = 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer planted-embeddings-key":
            self._send(401, {})
        elif Embeddings.throttled:
            Embeddings.throttled -= 1
            self._send(429, {"error": "slow down"}, {"Retry-After": "0"})
        else:
            data = [{"index": n, "embedding": [float(len(t)), 0]} for n, t in
                    enumerate(body["input"])]  # fmt: skip
            self._send(200, {"data": data[::-1]})

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(raw))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.patient
def test_endpoint_embedder_keeps_order_and_waits_when_throttled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Embeddings)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}/v1"
        # Neither a netrc entry in place of the key, nor a proxy on the way to this machine.
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n", "utf-8")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        embedder = EndpointEmbedder(base, "tiny", "planted-embeddings-key")
        assert embedder.dimension == 2
        np.testing.assert_allclose(embedder.embed(["a", "bbb"]), [[1, 0], [1, 0]])
        assert Embeddings.throttled == 0
        with pytest.raises(ServiceError, match="another length"):
            EndpointEmbedder(base, "tiny", "planted-embeddings-key", 7).embed(["a"])
        with pytest.raises(Exception, match="PHI3_EMBEDDINGS_KEY") as caught:
            EndpointEmbedder(base, "tiny", "wrong-planted-key")
        assert "wrong-planted-key" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
    with pytest.raises(ConfigurationError, match="plain http"):
        EndpointEmbedder("http://example.org/v1", "tiny", "planted-embeddings-key")


def test_two_writers_do_not_meet(tmp_path: Path, handbook: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Waiting(Bag):
        def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            entered.set()
            go_on.wait(30)
            return super().embed(texts)

    first = threading.Thread(target=index, args=(tmp_path, handbook, Waiting()))
    first.start()
    try:
        assert entered.wait(30)
        with pytest.raises(Exception, match="Another phi3 is writing"):
            index(tmp_path, handbook, Bag())
    finally:
        go_on.set()
        first.join(30)
    assert index(tmp_path, handbook, Bag()).unchanged == 3


def figures_of(folder: Path, embedder: Bag | None, questions: list[Question]) -> Retrieval:
    index = DocumentIndex(folder / "index.sqlite")
    return measure(index, embedder, questions, right_ids_of(questions, index.passages()))


def test_figures_count_ranks_and_refusals(tmp_path: Path, handbook: Path) -> None:
    bag = Bag()
    index(tmp_path, handbook, bag)
    file = tmp_path / "questions.jsonl"
    rows = [
        {"question": "Mossback weighs kg", "answer": "2.4 kg"},
        {"question": "goods full refund", "answer": "60 DAYS"},
        {"question": "open from nine", "source": "tents.md", "heading": "Care"},
        {"question": "zeppelin", "answerable": False},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = figures_of(tmp_path, bag, read_questions(file))
    assert (found.questions, found.unanswerable, found.refused) == (3, 1, 1.0)
    assert found.hits[1] == pytest.approx(2 / 3)
    assert found.hits[10] == 1.0
    (missed,) = found.worst
    assert missed[0] == 3
    assert missed[2].startswith("hours.html")
    place = next(k for k in (2, 3, 4) if found.mrr == pytest.approx((2 + 1 / k) / 3))
    assert found.ndcg == pytest.approx((2 + 1 / math.log2(place + 1)) / 3)


def test_figures_by_kind(tmp_path: Path, handbook: Path) -> None:
    index(tmp_path, handbook)
    rows = [
        {"question": "full refund?", "source": "returns.txt", "kind": "plain", "split": "test"},
        {"question": "unused goods?", "source": "returns.txt", "kind": "plain"},
        {"question": "money again?", "source": "returns.txt", "kind": "other"},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    questions = read_questions(file)
    found = figures_of(tmp_path, None, questions)
    assert {kind: hits[1] for kind, hits in found.kinds.items()} == {"plain": 1.0, "other": 0.0}
    assert [question.split for question in questions] == ["test", "", ""]
    without = [Question(1, "refund?", "", "returns.txt", None, None, True)]
    assert figures_of(tmp_path, None, without).kinds == {}


@pytest.mark.parametrize(
    ("text", "held"),
    [("It costs 5 dollars.", True), ("It costs 15 dollars.", False), ("5\n Dollars", True),
     ("5 dollars' worth", True), ("1.5 dollars", False), ("5 dollarsigns", False)],
)  # fmt: skip
def test_an_answer_is_held_as_whole_words(text: str, held: bool) -> None:
    assert holds(text, "5 dollars") is held


def test_every_fault_of_the_questions_is_named(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a"}\n{\n{"question": "a", "answer": "b", "gold": 1}\n')
    with pytest.raises(UsageError, match=r"(?s):1: neither.*:2: not JSON.*:3: unknown key gold"):
        read_questions(file)
