"""`phi3 rag compare` and `phi3 chat --compare` with a real (random, tiny) base and tuned model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.integration.finetune_fixture import THINGS, make_base, make_recipe, make_run

from phi3_training.cli import main
from phi3_training.finetune import finetune
from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, sync
from phi3_training.recipe import save_recipe
from phi3_training.run import RECIPE_FILE


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a tuned run and an index."""
    folder = tmp_path_factory.mktemp("compare")
    recipe = make_recipe(folder, make_base(folder / "base"), "evaluate.max_new_tokens=8")
    run = make_run(folder / "runs", recipe)
    save_recipe(recipe, run.path / RECIPE_FILE)
    tuned = finetune(recipe, run, no_progress)
    assert tuned is not None
    run.write(tuned.model_copy(update={"done_id": "tuned"}))
    documents = folder / "documents"
    documents.mkdir()
    for number, thing in enumerate(THINGS):
        (documents / f"{thing}.md").write_text(f"The {thing} costs {10 + number} euros.\n")
    index = folder / "runs/documents/rag/index.sqlite"
    sync(index, [documents], Chosen(None, {}, ""), no_progress)
    questions = [
        {"id": t, "question": f"Price of a {t}?", "answer": f"{10 + n} euros", "source": f"{t}.md"}
        for n, t in enumerate(THINGS)
    ]
    questions.append({"question": "Who painted the boat?", "kind": "unanswerable"})
    lines = [json.dumps(question) for question in questions]
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    change = {"id": "lamp", "file": "lamp.md", "old": "10", "new": "99", "answer": "99 euros"}
    (folder / "changes.json").write_text(json.dumps([change]), encoding="utf-8")
    return folder / "runs"


def phi3(runs: Path, *words: str) -> int:
    return main([*words, "--run", "run", "--runs", str(runs)])


def test_all_arms_are_asked_once(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rag", "compare", str(runs.parent / "questions.jsonl"),
             "--changes", str(runs.parent / "changes.json")]  # fmt: skip
    assert phi3(runs, *words, "-o", "json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["arms"]) == ["base", "rag", "tuned", "both", "ceiling"]
    assert (figures["questions"], figures["unanswerable"]) == (8, 1)
    assert figures["changed"]["facts"] == 1
    assert figures["arms"]["both"]["prompt_tokens"] > figures["arms"]["tuned"]["prompt_tokens"] > 0
    assert Path(figures["report"]).is_file()

    answers = runs / "run/rag/answers"
    written = {path: path.stat().st_mtime_ns for path in answers.glob("*.json")}
    assert len(written) == 8
    (answers / "both.json").unlink()  # as after an interruption
    assert phi3(runs, *words) == 0
    again = {path for path in answers.glob("*.json") if path.stat().st_mtime_ns != written[path]}
    assert {path.name for path in again} == {"both.json"}
    shown = capsys.readouterr().out
    assert "ceiling" in shown
    assert "Too little data to say." in shown


def test_chat_shows_answers_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", "Price of a lamp?", "--compare", "base,both", "--max-new-tokens", "4"]
    assert phi3(runs, *words, "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["answers"]) == ["base", "both"]
    assert phi3(runs, *words) == 0
    heads = capsys.readouterr().out
    assert "base (" in heads
    assert "both (" in heads
