"""The comparison of arms: what is asked, scored, kept, and what happens when documents change.

A fake answers; the models are those of tests/e2e.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from phi3_tool.grounding import NOT_IN_DOCUMENTS, grounded_question
from phi3_tool.index import DocumentIndex
from phi3_training.errors import UsageError
from phi3_training.evaluate.questions import Question as Scored
from phi3_training.evaluate.rows import Answered, Said, make_rows
from phi3_training.manifests import ModelManifest, Resampling
from phi3_training.progress import no_progress
from phi3_training.rag.arms import ARMS, Arm, Prompt, Prompts
from phi3_training.rag.asking import Replies, Reply
from phi3_training.rag.build import Chosen, sync
from phi3_training.rag.changes import FactChange, changed_index, read_changes
from phi3_training.rag.compare import FILE, PAGE, ROWS, Comparison, compare_arms
from phi3_training.rag.questions import Question
from phi3_training.rag.scores import declines, support, without_citations
from phi3_training.run import Run

# Each page has a word of its own, so that the search by words alone finds it.
THINGS = (
    "tent",
    "stove",
    "lamp",
    "rope",
    "boot",
    "map",
    "mat",
    "kayak",
    "ski",
    "axe",
    "mug",
    "hat",
)
PRICES = {thing: 100 + 7 * number for number, thing in enumerate(THINGS)}
SETTINGS = Resampling(confidence=0.95, resamples=200, seed=1)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    folder = tmp_path_factory.mktemp("documents")
    for thing, price in PRICES.items():
        text = f"# About the {thing}\n\nOur {thing} costs\n{price} dollars.\n"
        (folder / f"{thing}.md").write_text(text, encoding="utf-8")
    path = tmp_path_factory.mktemp("index") / "index.sqlite"
    sync(path, [folder], Chosen(None, {}, ""), no_progress)
    return DocumentIndex(path)


def questions() -> list[Question]:
    asked = [
        Question(number, f"What is the price of a {thing}?", f"{PRICES[thing]} dollars",
                 f"{thing}.md", id=thing, kind="plain")
        for number, thing in enumerate(THINGS, 1)
    ]  # fmt: skip
    return [*asked, Question(99, "Is a map a hat?", answerable=False, kind="unanswerable")]


class Fake:
    """Answers by a function of arm and prompt; remembers what it was asked."""

    sentence = "answered by a fake"

    def __init__(self, answer: Callable[[Arm, Prompt], str]) -> None:
        self.answer, self.asked, self.total = answer, 0, 0

    def expect(self, total: int) -> None:
        self.total = total

    def ask(self, name: str, arm: Arm, prompts: Sequence[Prompt]) -> Replies:
        self.asked += len(prompts)
        return Replies(
            [
                Reply(self.answer(arm, prompt), False, bool(prompt.text), len(prompt.text), 5)
                for prompt in prompts
            ],
            1.0,
        )


def reads(arm: Arm, prompt: Prompt) -> str:
    """Base knows nothing, tuning knows the old prices by heart, both reads and cites."""
    asked = next(thing for thing in THINGS if thing in prompt.text.rpartition("Question: ")[2])
    if arm.passages == "none":
        return f"{PRICES[asked]} dollars" if arm.tuned else "No idea"
    for number, hit in enumerate(prompt.hits, 1):
        if f"the {asked}" in hit.heading and "Is a map" not in prompt.text:
            return f"{' '.join(hit.text.split()[-2:]).rstrip('.')} [{number}]"
    return NOT_IN_DOCUMENTS


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "runs" / "tuned")
    row = {"messages": [{"role": "user", "content": "What is the price of a hat?"}]}
    run.file("data", "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    run.write(ModelManifest(path="model", conversations={"train": 40}))
    return run


def compared(run: Run, index: DocumentIndex, changes: Sequence[FactChange] = ()) -> Comparison:
    fake = Fake(reads)
    found = compare_arms(
        run, index, None, questions(), changes, fake, SETTINGS, top_k=4, progress=no_progress
    )
    assert fake.asked == fake.total
    return found


def change(thing: str) -> FactChange:
    return FactChange(
        thing, f"{thing}.md", f"costs {PRICES[thing]} dollars", "costs 9 dollars", "9 dollars"
    )


def test_every_arm_is_scored(run: Run, index: DocumentIndex) -> None:
    found = compared(run, index)
    assert (found.questions, found.unanswerable, found.left_out) == (11, 1, 1)
    assert {name: arm.right for name, arm in found.arms.items()} == {
        "base": 0.0, "rag": 1.0, "tuned": 1.0, "both": 1.0, "ceiling": 1.0,
    }  # fmt: skip
    both = found.arms["both"]
    assert both.cited is not None
    assert (both.cited.answers, both.cited.exist, both.cited.hold, both.cited.support) == (1,) * 4
    assert (both.refused, both.declined, found.arms["ceiling"].refused) == (1.0, 0.0, None)
    assert both.kinds == {"plain": 1.0}
    assert found.retrieval.hits[1] == found.retrieval.recall[1] == 1.0
    assert found.recommendation.take == "undecided"  # eleven questions


def test_files_are_written_and_the_page_escapes(run: Run, index: DocumentIndex) -> None:
    def scripts(arm: Arm, prompt: Prompt) -> str:
        return "<script>alert(1)</script> [7]" if arm.tuned else reads(arm, prompt)

    found = compare_arms(
        run, index, None, questions(), [], Fake(scripts), SETTINGS, top_k=4, progress=no_progress
    )
    figures = json.loads((run.path / FILE).read_text(encoding="utf-8"))
    assert figures["arms"]["rag"]["right"] == 1.0
    assert figures["arms"]["both"]["cited"]["exist"] == 0.0
    rows = (run.path / ROWS).read_text(encoding="utf-8").splitlines()
    assert len(rows) == 11
    assert json.loads(rows[0])["arms"]["both"]["citations"][0]["holds"] is False
    page = (run.path / PAGE).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "no such passage" in page
    assert found.recommendation.headline in page


def test_changed_facts_are_kept_by_what_looks_them_up(run: Run, index: DocumentIndex) -> None:
    found = compared(run, index, [change("tent"), change("hat"), change("axe")])
    assert found.changed is not None
    assert (found.changed.facts, found.changed.lost) == (3, 3)
    assert found.changed.right == {"rag": 3, "tuned": 0, "both": 3}
    assert found.changed.kept == {"rag": 3, "both": 3}


def test_a_changed_index_is_a_copy(tmp_path: Path, index: DocumentIndex) -> None:
    edited = changed_index(index, None, [change("tent")], tmp_path / "changed.sqlite")
    (hit,) = edited.search("tent costs 9", top_k=1)
    assert hit.text == "Our tent costs 9 dollars."
    assert "107" in index.search("stove", top_k=1)[0].text
    assert not any("9 dollars" in hit.text.split("costs")[1][:4] for hit in index.passages())


def test_changes_that_fit_nothing_are_all_named(
    tmp_path: Path, run: Run, index: DocumentIndex
) -> None:
    wrong = [
        FactChange("tent", "tent.md", "costs 1 dollar", "x", "x"),
        FactChange("axe", "no.md", "Our", "x", "x"),
    ]
    with pytest.raises(UsageError, match=r"(?s)tent: no passage of tent.md.*axe: no passage of no"):
        changed_index(index, None, wrong, tmp_path / "changed.sqlite")
    assert list(tmp_path.glob("changed*")) == []
    with pytest.raises(UsageError, match="id of these changes: zeppelin"):
        compared(run, index, [FactChange("zeppelin", "tent.md", "Our", "x", "x")])
    file = tmp_path / "changes.json"
    file.write_text('[{"id": "a", "file": "b", "old": "c", "new": "d"}, 7]')
    with pytest.raises(UsageError, match=r"(?s)number 1: no text under answer.*number 2"):
        read_changes(file)


def test_questions_that_were_all_trained_on_are_refused(run: Run, index: DocumentIndex) -> None:
    only = [question for question in questions() if question.id == "hat"]
    with pytest.raises(UsageError, match='"split": "test"'):
        compare_arms(
            run, index, None, only, [], Fake(reads), SETTINGS, top_k=4, progress=no_progress
        )


def test_an_unfitting_question_is_not_asked(index: DocumentIndex) -> None:
    prompts = Prompts(index, None, top_k=2)
    assert prompts.of(ARMS["rag"], "zeppelin?").text == ""
    assert prompts.of(ARMS["base"], "zeppelin?").text == "zeppelin?"
    assert len(prompts.of(ARMS["both"], "tent or stove or axe?").hits) <= 2


def test_words_of_the_passages_are_not_words_of_the_question(index: DocumentIndex) -> None:
    """A right answer is copied from the passages; it counted as wrong in `phi3 evaluate`."""
    hits = index.search("tent", top_k=1)
    prompt = grounded_question("What is the price of a tent?", hits)
    asked = Scored("validation", 1, [{"role": "user", "content": prompt}], "107 dollars [1]")
    right, wrong = (Answered(Said(text), None) for text in ("107 dollars [1]", "9 dollars [1]"))
    (row,) = make_rows([asked], [wrong], [right])
    assert (row["before_right"], row["after_right"]) == (False, True)


def test_scoring_of_answers(index: DocumentIndex) -> None:
    assert without_citations("It costs 107 dollars [1], they say [2].") == (
        "It costs 107 dollars, they say."
    )
    assert declines("Sorry. That is not in the documents.")
    assert not declines("It is in the documents [1].")
    hits = index.search("tent", top_k=1)
    assert support("The tent costs 100 dollars. [1]", hits) == 1.0
    assert support("The tent costs 100 euros. [1]", hits) == pytest.approx(3 / 4)
    assert support("The tent costs 100 dollars. [3]", hits) == 0.0
