"""Documents to sections of plain text, with heading, page and offsets; every fault with its path.

Text, Markdown and HTML by the standard library, PDF by pypdf, DOCX by mammoth, passages in CSV or
JSON lines by the reader of chats. Nothing in a document is executed, fetched or followed.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

from ..data.readers import BrokenFileError, open_text, table_encoding
from ..data.sources import no_note, rows_of
from ..errors import MissingExtraError, Phi3TrainingError

#: Of any file: with the limits below, what one file may cost is known before it is opened.
MAX_BYTES = 200 << 20
#: Of HTML: measured 13 MB of memory and 2 s for each MB.
MAX_HTML = 32 << 20
#: Of a DOCX, unpacked, with its pictures; a zip bomb has gigabytes.
MAX_UNPACKED = 200 << 20
#: Of its XML: 1,000 pages have about 10 MB. Measured with mammoth: 35 MB of memory for each MB.
MAX_XML = 16 << 20
_HIDDEN = re.compile(r"^[.~]|^__MACOSX$|\.tmp$")
# Escape sequences would reach the terminal with every hit. Spaces, so that offsets stay.
_CONTROL = dict.fromkeys(
    [*range(0x09), 0x0B, *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0)], " "
)
# A citation shows a file's name: no line ends, escapes, turned directions or broken UTF-8.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Section:
    """Text under one heading; `start` is its offset in the document's text, in characters."""

    text: str
    heading: tuple[str, ...]
    page: int | None
    start: int


@dataclass(frozen=True)
class DocumentFault:
    """A file that cannot be read, why, and what to do."""

    path: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.fix}"


class DocumentError(Phi3TrainingError):
    """Documents that cannot be read; `faults` holds all of them."""

    def __init__(self, faults: Sequence[DocumentFault]) -> None:
        self.faults = tuple(faults)
        count = "1 document" if len(faults) == 1 else f"{len(faults)} documents"
        lines = "\n".join(f"  {fault}" for fault in faults)
        super().__init__(
            f"{count} could not be read; the index was not changed:\n{lines}\n"
            "Index the others with: --skip-unreadable"
        )


class UnreadableError(Exception):
    """Why a file cannot be read, and what to do; `fault_of` adds the path."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def files_of(sources: Sequence[Path]) -> tuple[dict[str, Path], list[DocumentFault]]:
    """The files that are meant, by the name that a citation shows, and what is wrong with others.

    A folder is read with its subfolders, in order of names; hidden files are left out. Links that
    lead out of the folder, and names that cannot be shown as one line of text, are faults.
    """
    files: dict[str, Path] = {}
    faults: list[DocumentFault] = []
    for source in sources:
        if source.is_dir():
            root = source.resolve()
            for folder, names, members in os.walk(source):
                # In place and sorted: os.walk goes down into what is left, and ids follow the
                # order.
                names[:] = sorted(name for name in names if not _HIDDEN.search(name))
                for member in sorted(members):
                    path = Path(folder) / member
                    name = path.relative_to(source).as_posix()
                    if _HIDDEN.search(member):
                        continue
                    # A link could bring any file of this machine into an index that is copied and
                    # served.
                    if not path.resolve().is_relative_to(root):
                        fault = DocumentFault(name, "is a link out of the folder", "copy the file")
                        faults.append(fault)
                    else:
                        files[name] = path
        elif source.is_file():
            files[source.name] = source
        else:
            faults.append(DocumentFault(str(source), "does not exist", "check the path"))
    for name in [name for name in files if _UNSHOWN.search(name)]:
        del files[name]
        what = "has a character in its name that cannot be shown"
        faults.append(DocumentFault(ascii(name)[1:-1], what, "rename it"))
    return files, faults


def read_sections(path: Path) -> Iterator[Section]:
    """The sections of a file, in order.

    Raises UnreadableError, or whatever a parser raises on a broken file: see `fault_of`.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(READERS))
        raise UnreadableError(f"files of the kind {path.suffix or '(none)'} are not read", known)
    most = MAX_HTML if reader is _html else MAX_BYTES
    if path.stat().st_size > most:
        raise UnreadableError(f"has more than {most >> 20} MB", "split it")
    has_text = False
    for section in reader(path):
        text = section.text.translate(_CONTROL)
        if text.strip():
            has_text = True
            heading = tuple(title.translate(_CONTROL) for title in section.heading)
            yield replace(section, text=text, heading=heading)
    if not has_text:
        raise UnreadableError(*_EMPTY.get(path.suffix.lower(), ("has no text", "remove it")))


def fault_of(error: Exception, name: str) -> DocumentFault:
    """What an exception of `read_sections` means; raises it again when it is not about the file."""
    if isinstance(error, UnreadableError):
        fix = error.fix
        if error.what.endswith("are not read"):
            fix = f"convert it to one of {fix}"
        return DocumentFault(name, error.what, fix)
    if isinstance(error, BrokenFileError):
        return DocumentFault(name, error.problem.what, error.problem.fix)
    if isinstance(error, MissingExtraError):
        raise error
    if isinstance(error, OSError):
        return DocumentFault(name, error.strerror or str(error), "check the file")
    return DocumentFault(name, f"is broken ({type(error).__name__})", "open it and save it again")


# A scan is the usual reason for a PDF without text.
_EMPTY = {
    ".pdf": (
        "has no text: it is probably a scan",
        "run text recognition (OCR) on it first, for example with ocrmypdf",
    )
}


def _text_of(path: Path) -> str:
    with open_text(path, table_encoding(path, no_note)) as stream:
        return stream.read().decode("utf-8")


_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")


def _markdown(path: Path) -> Iterator[Section]:
    """One section per heading; lines that look like headings inside fenced code are text."""
    text = _text_of(path)
    heading: list[str] = []
    start = 0
    fence = ""
    for match in _LINE.finditer(text):  # a list of short lines would take twenty times the file
        line = match.group()
        border = _FENCE.match(line)
        if border:
            # A fence ends with its own mark only: ~~~ may hold a line of ```.
            fence = "" if fence == border.group(1) else fence or border.group(1)
        title = None if fence else _HEADING.match(line.rstrip("\r\n"))
        if title:
            yield Section(text[start : match.start()], tuple(heading), None, start)
            level = len(title.group(1))
            heading = [*heading[: level - 1], title.group(2)]
            start = match.end()
    yield Section(text[start:], tuple(heading), None, start)


# Before the parser, whose time grows with the square of what is never closed (Python 3.11: 60 kB
# of `<a <a <a …` took more than 20 s). Each of these runs once over the text.
_UNSEEN = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\b[^<>]*>?|\Z)|<[!?][^>]*(?:>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_NO_TAG = re.compile(r"<(?![a-z/][^<>]*>)", re.IGNORECASE)


class _Html(HTMLParser):
    """Text of a page by headings, a table row in a line; without what a browser does not show."""

    SKIPPED = frozenset(("script", "style", "template", "noscript", "svg", "head", "iframe"))
    BLOCKS = frozenset(
        """
        p div li ul ol tr table section article header footer main br h1 h2 h3 h4 h5 h6
        blockquote pre dt dd figure figcaption nav aside form
        """.split()  # noqa: SIM905 - easier to read than thirty quoted words
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[Section] = []
        self._heading: list[str] = []
        self._title: list[str] | None = None
        # In one buffer: as a list of pieces, a page took fifteen times its size.
        self._text = StringIO()
        self._cells = 0  # of the row so far
        self._in_cell = False
        self._skip = 0
        self._length = 0

    def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self._skip += 1
        elif not self._skip and re.fullmatch("h[1-6]", tag):
            self._close()
            self._title = []
        # Counted, not matched: pages leave end tags out, and one that is missing must not hide the
        # rest.
        elif tag == "body":  # `</head>` may be left out
            self._skip = 0
        elif tag in ("td", "th"):
            self._write(" | " if self._cells else "")
            self._cells, self._in_cell = self._cells + 1, True
        elif tag in self.BLOCKS:
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self._skip = max(0, self._skip - 1)
        elif re.fullmatch("h[1-6]", tag) and self._title is not None:
            title = " ".join("".join(self._title).split())
            self._heading = [*self._heading[: int(tag[1]) - 1], title]
            self._title = None
        elif tag in ("td", "th"):
            self._in_cell = False
        elif tag in self.BLOCKS:
            self._break(tag)

    def _break(self, tag: str) -> None:
        if tag in ("tr", "table"):
            self._cells, self._in_cell = 0, False
        # A paragraph inside a cell, as Word makes them, must not tear the row apart.
        self._write(" " if self._in_cell or self._title is not None else "\n")

    def _write(self, text: str) -> None:
        if self._title is None:
            self._text.write(text)
        else:
            self._title.append(text)

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self._write(data)

    def close(self) -> None:
        super().close()
        self._close()

    def _close(self) -> None:
        if self._title is not None:  # a heading that was never closed is text
            self._text.write("".join(self._title))
            self._title = None
        text = re.sub(r"[ \t\r\f\v]+", " ", self._text.getvalue())
        text = re.sub(r" ?\n[ \n]*", "\n", text).strip()
        if text:
            self.sections.append(Section(text, tuple(self._heading), None, self._length))
            self._length += len(text) + 1
        self._text = StringIO()


def _html_sections(text: str) -> list[Section]:
    parser = _Html()
    parser.feed(_NO_TAG.sub("&lt;", _UNSEEN.sub(" ", text)))
    parser.close()
    return parser.sections


def _html(path: Path) -> Iterator[Section]:
    yield from _html_sections(_text_of(path))


# What programs write as a title when nobody gave one.
_NO_TITLE = re.compile(
    r"\W*(untitled|document|title|slide|microsoft (word|powerpoint|excel)\b.*|.*\.\w{2,5})?[\W\d]*",
    re.IGNORECASE,
)


def _pdf(path: Path) -> Iterator[Section]:
    """One section per page, under the document's title; 10,000 pages are read one by one."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PdfReadError
    except ImportError:
        raise MissingExtraError("pypdf", "local") from None
    # What it finds odd it also reports as errors; its log would appear between the progress lines.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    offset = 0
    try:
        with PdfReader(path) as reader:
            # Many PDFs are encrypted with an empty password, only to forbid printing.
            if reader.is_encrypted and not reader.decrypt(""):
                raise UnreadableError("is locked with a password", "save it without one")
            title = ""
            with suppress(Exception):  # broken metadata do not make the pages unreadable
                title = str((reader.metadata and reader.metadata.title) or "").translate(_CONTROL)
            # A page often does not say what it is about: its document does.
            heading = () if _NO_TITLE.fullmatch(title) else (" ".join(title.split()),)
            for number, page in enumerate(reader.pages, 1):
                # One page at a time, so that a book of 10,000 pages is never in memory as a whole.
                text = page.extract_text()
                yield Section(text, heading, number, offset)
                offset += len(text) + 1
    except PdfReadError as error:
        raise UnreadableError(f"is a broken PDF ({error})", "open it and save it again") from None


def _docx(path: Path) -> Iterator[Section]:
    try:
        import mammoth
    except ImportError:
        raise MissingExtraError("mammoth", "local") from None
    # The sizes that the archive declares: mammoth would unpack whatever it is given.
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_UNPACKED:
                raise UnreadableError(
                    f"unpacks to more than {MAX_UNPACKED >> 20} MB", "save it without pictures"
                )
            xml = [member for member in members if member.filename.endswith((".xml", ".rels"))]
            if sum(member.file_size for member in xml) > MAX_XML:
                raise UnreadableError(f"has more than {MAX_XML >> 20} MB of XML", "split it")
    except zipfile.BadZipFile:
        raise UnreadableError("is not a DOCX file", "open it and save it as .docx") from None
    with path.open("rb") as file:
        # Pictures would come as base64 inside the text.
        no_picture = mammoth.images.img_element(lambda _image: {"src": ""})
        html = mammoth.convert_to_html(file, convert_image=no_picture).value
    yield from _html_sections(html)


_TEXT_KEYS = ("text", "content", "passage", "body")
_TITLE_KEYS = ("heading", "title", "name")


def _passages(path: Path) -> Iterator[Section]:
    """One section per row, read as chats in such files are."""
    offset = 0
    for number, raw in enumerate(rows_of(path), 1):
        if raw.problems:
            problem = raw.problems[0]
            where = f"row {number}: " if raw.line else ""
            raise UnreadableError(f"{where}{problem.what}", problem.fix)
        fields = raw.value if isinstance(raw.value, dict) else {}
        text = next((fields[key] for key in _TEXT_KEYS if isinstance(fields.get(key), str)), None)
        if text is None:
            wanted = " or ".join(_TEXT_KEYS)
            raise UnreadableError(f"row {number} has no passage", f"give it a key {wanted}")
        title = next((fields[key] for key in _TITLE_KEYS if isinstance(fields.get(key), str)), "")
        yield Section(text, (title,) if title else (), None, offset)
        offset += len(text) + 1


READERS: dict[str, Callable[[Path], Iterator[Section]]] = {
    ".md": _markdown,
    ".markdown": _markdown,
    ".txt": lambda path: iter([Section(_text_of(path), (), None, 0)]),
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".docx": _docx,
    ".csv": _passages,
    ".jsonl": _passages,
}
