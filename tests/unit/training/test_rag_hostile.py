"""Documents that mean harm: refused or read as text, in bounded memory and linear time."""

from __future__ import annotations

import os
import resource
import time
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, sync
from phi3_training.rag.documents import Section, fault_of, files_of, read_sections

TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="xml" ContentType="application/xml"/><Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/></Types>'
)
RELATIONS = (
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/'
    'relationships/officeDocument" Target="word/document.xml"/></Relationships>'
)
BODY = (
    '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
    "<w:body>{}</w:body></w:document>"
)


def docx(path: Path, body: str, before: str = "", **members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", TYPES)
        archive.writestr("_rels/.rels", RELATIONS)
        archive.writestr("word/document.xml", before + BODY.format(body))
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def pdf(path: Path, contents: list[bytes], *, packed: bool = False) -> Path:
    """A PDF with one page for each content stream."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%b] >>" % (len(contents), kids),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, content in enumerate(contents):
        stream = zlib.compress(content) if packed else content
        how = b"/Filter /FlateDecode " if packed else b""
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * number),
            b"<< %b/Length %d >>\nstream\n%b\nendstream" % (how, len(stream), stream),
        ]
    written = bytearray(b"%PDF-1.4\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(b"%010d 00000 n \n" % len(written))
        written += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = len(written)
    written += b"xref\n0 %d\n0000000000 65535 f \n%b" % (len(objects) + 1, b"".join(places))
    written += b"trailer << /Size %d /Root 1 0 R >>\n" % (len(objects) + 1)
    written += b"startxref\n%d\n%%%%EOF\n" % table
    path.write_bytes(written)
    return path


def many_pages(count: int) -> list[bytes]:
    text = b"BT /F1 12 Tf 72 720 Td (Pass %d is %d meters high.) Tj ET"
    return [text % (number, number) for number in range(count)]


def grown(work: Callable[[], object]) -> int:
    """MB by which a process of its own grows while it works; it must succeed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            work()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writing, str((after - before) >> 10).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return int(said)


def index(tmp_path: Path, folder: Path) -> int:
    return sync(tmp_path / "i.sqlite", [folder], Chosen(None, {}, ""), no_progress).passages


def why(path: Path) -> str:
    """Why a document is refused."""
    with pytest.raises(Exception) as caught:  # a parser may raise anything
        list(read_sections(path))
    return str(fault_of(caught.value, path.name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    return tmp_path / "docs"


@pytest.mark.parametrize(
    "piece",
    ["<a ", '<a b="', "<a b='x>", "<!--", "<!", "<?", "</", "<![CDATA[", "<![CDATA[ >", "<script>",
     "<script></script", "&", "<h1>", "<table><td>"],
)  # fmt: skip
def test_html_that_is_never_closed_is_read_in_linear_time(tmp_path: Path, piece: str) -> None:
    """Python's parser alone took 9 s to hours for 20,000 of some of these."""
    page = tmp_path / "a.html"
    page.write_text("<p>Open from nine.</p>" + piece * 20_000)
    started = time.process_time()
    text = "\n".join(section.text for section in read_sections(page))
    assert time.process_time() - started < 10
    assert text.startswith("Open from nine.")


def test_scripts_and_comments_are_no_text_whatever_is_in_them(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text(
        "<html><head><title>t<body onload='steal()'><p>One &lt; two, 3 < 4.</p>"
        "<script>if (a<b) { '<!--' }</script><style>p::after {content: '</p>'}</style>"
        "<!-- <p>hidden</p> --><iframe src='http://example.com'>x</iframe>"
        "<img alt='a > b' onerror='steal()'><a href='javascript:steal()'>End</a>"
    )
    (section,) = read_sections(page)
    assert section == Section("One < two, 3 < 4.\nEnd", (), None, 0)


def test_a_row_of_a_table_is_one_line(tmp_path: Path) -> None:
    """As Word writes cells: with paragraphs in them."""
    page = tmp_path / "a.html"
    page.write_text(
        "<table><tr><td><p>Tent</p></td><td><p>240</p><p>dollars</p></td></tr>"
        "<tr><td>Stove<td>65 dollars</table>After"
    )
    (section,) = read_sections(page)
    assert section.text == "Tent | 240 dollars\nStove | 65 dollars\nAfter"


def test_a_heading_that_is_never_closed_is_text(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text("<h1>Hours<br>now</h1>Nine to five.<h2>Prices<p>A tent costs 240 dollars.")
    assert [(section.heading, section.text) for section in read_sections(page)] == [
        (("Hours now",), "Nine to five."),
        (("Hours now",), "Prices A tent costs 240 dollars."),
    ]


def test_html_of_many_megabytes_is_refused_unread(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    with page.open("wb") as file:
        file.truncate((32 << 20) + 1)
    assert "more than 32 MB" in why(page)


def test_docx_whose_xml_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    path = docx(tmp_path / "a.docx", "<w:p/>" * (3 << 20))
    assert path.stat().st_size < 100_000
    assert grown(lambda: why(path)) < 20
    assert "more than 16 MB of XML" in why(path)


@pytest.mark.patient
def test_docx_with_entities_of_entities_is_refused(tmp_path: Path) -> None:
    names = "abcdefg"
    entities = f'<!ENTITY a "{"lol" * 50}">' + "".join(
        f'<!ENTITY {name} "{f"&{before};" * 50}">' for before, name in pairwise(names)
    )
    body = "<w:p><w:r><w:t>&g;</w:t></w:r></w:p>"
    path = docx(tmp_path / "a.docx", body, f"<!DOCTYPE x [{entities}]>")
    assert grown(lambda: why(path)) < 100
    assert "is broken" in why(path)


def test_docx_reads_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("planted")
    path = docx(
        tmp_path / "a.docx",
        "<w:p><w:r><w:t>Hours &x;</w:t></w:r></w:p>",
        f'<!DOCTYPE x [<!ENTITY x SYSTEM "{secret.as_uri()}">]>',
        **{"../../escaped.txt": "planted"},
    )
    assert [section.text for section in read_sections(path)] == ["Hours"]
    assert {file.name for file in tmp_path.iterdir()} == {"secret.txt", "a.docx"}


@pytest.mark.patient
def test_pdf_stream_that_unpacks_to_a_hundred_megabytes_is_refused(tmp_path: Path) -> None:
    path = pdf(tmp_path / "a.pdf", [b"BT /F1 12 Tf (x) Tj ET\n" + b" " * (100 << 20)], packed=True)
    assert path.stat().st_size < 1 << 20
    assert grown(lambda: why(path)) < 200
    assert "is broken" in why(path)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_pages_of_a_pdf_are_read_one_by_one(tmp_path: Path, folder: Path, count: int) -> None:
    pdf(folder / "a.pdf", many_pages(count))
    assert grown(lambda: index(tmp_path, folder)) < 40 + count // 50
    assert index(tmp_path, folder) == count


@pytest.mark.parametrize("megabytes", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_line_without_an_end_is_cut(
    tmp_path: Path, folder: Path, megabytes: int, name: str
) -> None:
    (folder / name).write_text("word" * (megabytes << 18))
    assert grown(lambda: index(tmp_path, folder)) < 30 + 6 * megabytes
    assert index(tmp_path, folder) >= megabytes


@pytest.mark.patient
def test_lines_without_a_letter_cost_what_the_file_does(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("ab\n" * (2 << 20))
    assert grown(lambda: [len(section.text) for section in read_sections(file)]) < 60


@pytest.mark.parametrize(
    "name", ["a\nb.md", "\x1b[2Jclear.md", "\u202efdp.md", os.fsdecode(b"\xff.md")]
)
def test_names_that_cannot_be_shown_are_faults(folder: Path, name: str) -> None:
    (folder / name).write_text("# Hours")
    (folder / "<|end|> [1].md").write_text("# Hours")
    files, (fault,) = files_of([folder])
    assert list(files) == ["<|end|> [1].md"]
    assert "cannot be shown" in fault.what
    assert fault.path.isprintable()


def test_links_and_dots_do_not_lead_out_of_the_folder(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "secret.txt").write_text("planted")
    (folder / "up").symlink_to(tmp_path)
    (folder / "near.txt").symlink_to("../secret.txt")
    (folder / "...txt").write_text("hidden")
    (folder / "tents.md").write_text("# Tents")
    files, faults = files_of([folder])
    assert list(files) == ["tents.md"]
    assert [fault.path for fault in faults] == ["near.txt"]


def test_escape_sequences_of_a_document_become_spaces(tmp_path: Path) -> None:
    """They would reach the terminal with every hit; offsets stay as they are."""
    file = tmp_path / "a.md"
    file.write_text("# Ti\x1b[1mtle\n\nOpen\x1b[2J\x9b from\x00 nine.\tDaily\n")
    (section,) = read_sections(file)
    assert section.heading == ("Ti [1mtle",)
    assert section.text == "\nOpen [2J  from  nine.\tDaily\n"
