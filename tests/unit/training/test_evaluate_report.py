"""The report: one page, nothing fetched, nothing that a model said becomes markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.unit.training.gate_rows import gate_of, right, rows_of

from phi3_training.evaluate import gate, report
from phi3_training.evaluate.compare import figures_of
from phi3_training.evaluate.questions import Question
from phi3_training.evaluate.rows import write_rows
from phi3_training.manifests import ModelManifest
from phi3_training.recipe import EvaluateSection, GateSection
from phi3_training.run import Run

NASTY = '<script>alert(1)</script> "&amp; <img src=x onerror=y>'


class Page(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def page(tmp_path: Path) -> str:
    def nasty(question: Question) -> str:
        return NASTY if question.part == "validation" and question.line < 4 else right(question)

    run = Run.open(tmp_path / "mine")
    rows = rows_of(nasty)
    settings = EvaluateSection(resamples=100)
    write_rows(run, rows)
    log = run.file("finetune", "loss.jsonl")
    log.write_text("".join(json.dumps({"step": n, "loss": 9 / n}) + "\n" for n in range(1, 40)))
    run.write(ModelManifest(path="model", summary="lora <b>", loss_log="finetune/loss.jsonl"))
    run.write(figures_of(rows, settings))
    verdict = gate.decide(rows, GateSection.model_validate(gate_of()), settings)
    return (run.path / report.write(run, verdict)).read_text("utf-8")


def test_nothing_is_fetched(page: str) -> None:
    found = Page(page)

    assert found.addresses == []
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_what_models_said_is_text(page: str) -> None:
    assert NASTY in Page(page).words
    assert "lora <b>" in Page(page).words


def test_pictures_tables_and_both_themes(page: str) -> None:
    found = Page(page)

    assert found.tags.count("svg") == 2
    assert found.tags.count("polyline") == 2
    assert found.tags.count("table") == 3
    assert "prefers-color-scheme: dark" in page
    assert "held-out: exact match" in found.words
