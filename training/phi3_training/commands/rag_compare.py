"""`phi3 rag compare` and `phi3 chat --compare`: base, RAG, tuning and both, in figures or live."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from rich.table import Table
from rich.text import Text

from phi3_tool.embedders import embedder_of
from phi3_tool.grounding import Citation, citations
from phi3_tool.index import DocumentIndex

from .. import console
from ..errors import MissingExtraError, StageError, UsageError
from ..journey import RECIPE_FILE
from ..manifests import Resampling
from ..rag.index_files import index_file
from ..recipe import Recipe, load_recipe
from ..run import Run
from .common import tuned_run, typed_questions
from .options import Subparsers, add_command, add_documents, add_run, add_top_k

if TYPE_CHECKING:
    from ..rag.compare import Comparison


def register_compare(actions: Subparsers) -> None:
    """Add `phi3 rag compare`."""
    parser = add_command(
        actions, "compare", "compare base model, RAG, tuning and both on your own questions",
        "phi3 rag compare questions.jsonl --run mine", run_compare,
    )  # fmt: skip
    add_questions(parser, '; with "split", those of the split test are asked')
    add_run(parser)
    add_documents(parser)
    parser.add_argument(
        "--changes",
        type=Path,
        metavar="FILE",
        help='facts that change after tuning: a JSON list of {"id", "file", "old", "new", '
        '"answer"}, the id that of a question',
    )
    add_top_k(parser, "passages that a model is shown, as in the flow")


def add_questions(parser: argparse.ArgumentParser, more: str = "") -> None:
    """FILE of questions."""
    parser.add_argument(
        "questions",
        type=Path,
        metavar="FILE",
        help='JSON lines: {"question", "answer", "source"}; {"question", "answerable": false}'
        + more,
    )


def recipe_of_run(run: Run) -> Recipe:
    """The recipe that a run was made with. Raises StageError where it is gone."""
    path = run.path / RECIPE_FILE
    if not path.is_file():
        raise StageError(f"{path} is missing; create it with: phi3 up --run {run.name}")
    return load_recipe(path)


def run_compare(args: argparse.Namespace) -> int:
    """Ask all arms, print the table, write the report."""
    from ..rag.changes import read_changes
    from ..rag.questions import read_questions

    try:
        from ..rag.asking import Asking
        from ..rag.compare import PAGE, compare_arms
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "local") from None
    # The files' faults first, before the models are loaded.
    questions = read_questions(args.questions)
    changes = read_changes(args.changes) if args.changes else []
    run = tuned_run(args)
    index = DocumentIndex(index_file(Run(args.runs / args.documents)))
    embedder = embedder_of(index.facts(), index.path)
    with run.lock(), console.progress_bar("compare") as progress:
        recipe = recipe_of_run(run)
        # The recipe's own interval and seed, as `phi3 evaluate` uses them.
        settings = Resampling.model_validate(recipe.evaluate.model_dump(mode="json"))
        comparison = compare_arms(
            run, index, embedder, questions, changes, Asking(recipe, run, progress), settings,
            top_k=args.top_k, progress=progress,
        )  # fmt: skip
    report = run.path / PAGE
    if args.output == "json":
        console.print_json({**comparison.as_json(), "report": report})
        return 0
    _show(comparison, run)
    console.line(f"Report: {report}")
    return 0


def _show(figures: Comparison, run: Run) -> None:
    """The table fits 80 columns; the page has every figure under its full name."""
    arms = list(figures.arms.values())
    contains = [arm.metrics["contains"] for arm in arms]
    rows = [
        ["right answers", *(f"{c.after:.1%}" for c in contains)],
        [f"  {figures.settings.confidence:.0%} interval",
         *(f"{100 * c.after_low:.0f} to {100 * c.after_high:.0f}" for c in contains)],
        *([f"  {kind}", *(f"{arm.kinds[kind]:.1%}" for arm in arms)] for kind in arms[0].kinds),
        ["token F1", *(f"{arm.metrics['token_f1'].after:.1%}" for arm in arms)],
        ["unanswerable refused", *(_share(arm.refused) for arm in arms)],
        ["others refused", *(_share(arm.declined) for arm in arms)],
    ]  # fmt: skip
    for key, label in (
        ("answers", "with a citation"),
        ("hold", "right ones that hold"),
        ("support", "words in the cited"),
    ):
        rows.append([label, *(_share(getattr(arm.cited, key, None)) for arm in arms)])
    if figures.changed:
        right = figures.changed.right
        cells = (str(right.get(name, "–")) for name in figures.arms)
        rows.append([f"of {figures.changed.facts} changed facts", *cells])
    rows.append(["tokens of prompt", *(f"{arm.prompt_tokens:.0f}" for arm in arms)])
    rows.append(["tokens of answer", *(f"{arm.answer_tokens:.0f}" for arm in arms)])
    rows.append(["seconds an answer", *(f"{arm.seconds:.2f}" for arm in arms)])
    asked = f"{figures.questions} held-out questions, {figures.unanswerable} unanswerable"
    console.table(f"{asked}, run {run.name}", ["", *figures.arms], rows)
    hits, k = figures.retrieval.hits, figures.top_k
    console.line(
        f"The index: right passage first {hits[1]:.1%}, among the first 5 {hits[5]:.1%} "
        f"({k} are shown), nDCG {figures.retrieval.ndcg:.2f}"
    )
    if figures.left_out:
        console.note(f"{figures.left_out} questions were trained on word for word and are left out")
    advice = figures.recommendation
    console.line(advice.headline, "bold")
    for text in (advice.because, *advice.remarks):
        console.line(f"  {text}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


# ---- `phi3 chat --compare base,rag,tuned,both`: the same question in several ways, side by side
# The models are loaded in this process: the endpoint serves the tuned one alone.


def add_compare(parser: argparse.ArgumentParser) -> None:
    """--compare of `phi3 chat`."""
    parser.add_argument(
        "--compare",
        type=lambda text: text.split(","),
        metavar="WAYS",
        help="show answers side by side: any of base,rag,tuned,both, with commas between. Each "
        "question is asked without history; loads the run's models in this process",
    )


def run_chat_compare(args: argparse.Namespace) -> int:
    """One question, or several until an empty line."""
    from ..rag.arms import ARMS, Prompt, Prompts

    known = [name for name in ARMS if name != "ceiling"]
    wrong = [name for name in args.compare if name not in known]
    if wrong:
        raise UsageError(f"--compare takes {','.join(known)}; unknown: {', '.join(wrong)}")
    if args.web or args.system or args.temperature:
        raise UsageError("--compare goes without --web, --system and --temperature")
    arms = {str(name): arm for name, arm in ARMS.items() if name in args.compare}
    run = tuned_run(args)
    try:
        from ..rag.asking import answering
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "local") from None
    prompts = None
    if any(arm.passages == "found" for arm in arms.values()):
        index = DocumentIndex(index_file(Run(args.runs / args.documents)))
        prompts = Prompts(index, embedder_of(index.facts(), index.path), top_k=4)
    with answering(recipe_of_run(run), run, arms, args.max_new_tokens) as answer:

        def ask(question: str) -> dict[str, Timed]:
            answers: dict[str, Timed] = {}
            for name, arm in arms.items():
                started = time.monotonic()
                needs = prompts is not None and arm.passages == "found"
                prompt = prompts.of(arm, question) if needs and prompts else Prompt(question)
                text = answer(arm, prompt)
                seconds = round(time.monotonic() - started, 2)
                # Only those that exist: an invented [9] has no place to show.
                cited = [c for c in citations(text, prompt.hits) if c["exists"]]
                answers[name] = {"answer": text, "citations": cited, "seconds": seconds}
            return answers

        if args.question is not None:
            answers = ask(args.question)
            if args.output == "json":
                console.print_json({"question": args.question, "answers": answers})
            else:
                _side_by_side(answers)
            return 0
        console.err.print("Type a question; an empty line, Ctrl-C or Ctrl-D ends. Each one alone.")
        for question in typed_questions():
            _side_by_side(ask(question))
        return 0


class Timed(TypedDict):
    """An arm's answer, as `-o json` prints it."""

    answer: str
    citations: list[Citation]
    seconds: float


def _side_by_side(answers: dict[str, Timed]) -> None:
    # Columns of one width: answers are compared by reading across.
    table = Table(show_lines=False, expand=True)
    cells = []
    for name, reply in answers.items():
        table.add_column(f"{name} ({reply['seconds']:.1f} s)", ratio=1)
        sources = "".join(
            f"\n[{cited['number']}] {cited['source']}"
            + (f", page {cited['page']}" if cited["page"] else "")
            + (f" ({cited['heading']})" if cited["heading"] else "")
            for cited in reply["citations"]
        )
        cells.append(Text.assemble(reply["answer"], (sources, "dim")))
    table.add_row(*cells)
    console.out.print(table, soft_wrap=False)
