"""Makes the PDF and DOCX pages of the handbook from the Markdown texts beside this file.

The files in `handbook/` are kept in the repository; run this after a change to their texts, in an
environment with `pip install fpdf2==2.8.9 python-docx==1.2.0` (not needed by the product):

    python training/data/handbook_sources/make_files.py

Reads headings, paragraphs, lists and tables; `---` begins a new page of a PDF. The same text gives
the same bytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path

from docx import Document
from fpdf import FPDF

SOURCES = Path(__file__).parent
HANDBOOK = SOURCES.parent / "handbook"
# A fixed day, so that nothing changes but what the texts change.
MADE = datetime(2026, 1, 2, tzinfo=timezone.utc)


def blocks(text: str) -> Iterator[str | list[list[str]]]:
    """Paragraphs and headings as text, tables as rows of cells."""
    for block in text.strip().split("\n\n"):
        if block.startswith("|"):
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in
                    block.splitlines()]  # fmt: skip
            yield [row for row in rows if not set("".join(row)) <= {"-"}]
        else:
            yield " ".join(block.splitlines())


def pdf(text: str) -> bytes:
    """A page of A4 for each part between two `---`."""
    made = FPDF()
    made.set_creation_date(MADE)
    made.set_title(text.splitlines()[0].lstrip("# "))
    for page in text.split("\n---\n"):
        made.add_page()
        for block in blocks(page):
            if isinstance(block, list):
                made.set_font("Helvetica", size=10)
                with made.table() as table:
                    for cells in block:
                        table.row(cells)
                made.ln(3)
            else:
                level = len(block) - len(block.lstrip("#"))
                made.set_font("Helvetica", "B" if level else "", (11, 18, 13)[level])
                made.multi_cell(0, text=block.lstrip("# "), new_x="LMARGIN", new_y="NEXT")
                made.ln(2)
    return bytes(made.output())


def docx(text: str) -> bytes:
    """A document with real headings and tables."""
    made = Document()
    made.core_properties.author = "The outdoor shop"
    made.core_properties.created = made.core_properties.modified = MADE
    for block in blocks(text):
        if isinstance(block, list):
            table = made.add_table(len(block), len(block[0]), style="Table Grid")
            for row, cells in enumerate(block):
                for column, cell in enumerate(cells):
                    table.cell(row, column).text = cell
        elif block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            made.add_heading(block.lstrip("# "), level)
        else:
            made.add_paragraph(block)
    saved = BytesIO()
    made.save(saved)
    return dated(saved)


def dated(saved: BytesIO) -> bytes:
    """The same archive, with the fixed day instead of now in each of its members."""
    packed = BytesIO()
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in sorted(old.namelist()):
            member = zipfile.ZipInfo(name, MADE.timetuple()[:6])
            member.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(member, old.read(name))
    return packed.getvalue()


MAKERS: dict[str, Callable[[str], bytes]] = {".pdf": pdf, ".docx": docx}

if __name__ == "__main__":
    for source in sorted(SOURCES.glob("*.md")):
        target = HANDBOOK / source.stem
        target.write_bytes(MAKERS[target.suffix](source.read_text(encoding="utf-8")))
