"""`phi3 rag index | search | evaluate | make-chats`: documents into an index or into chats."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from phi3_tool.embedders import embedder_of
from phi3_tool.index import QUERY_TYPES, DocumentIndex

from .. import console
from ..errors import UsageError
from ..project import RAG_FLOW
from ..run import Run
from . import HELP
from .common import add_command
from .rag_compare import DEFAULT_DOCUMENTS, register_compare

_SHOWN_CHARACTERS = 300
_SHOWN_QUESTIONS = 5


def register_rag(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("rag", help=HELP["rag"])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    index = add_command(
        actions, "index", "bring the index up to date with your documents",
        "phi3 rag index handbook/", run_index,
    )  # fmt: skip
    index.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="FOLDER | FILE",
        help="Markdown, text, HTML, PDF, DOCX, or passages in CSV or JSONL; "
        "the index holds exactly these afterwards",
    )
    index.add_argument(
        "--embedder",
        choices=("auto", "onnx", "endpoint", "none"),
        default="auto",
        help="auto (default): all-MiniLM-L6-v2 on this machine, words alone where it cannot be "
        "downloaded; onnx: MiniLM or --embedder-folder, nothing else; endpoint: --base-url; "
        "none: words alone",
    )
    index.add_argument(
        "--embedder-folder",
        type=Path,
        metavar="FOLDER",
        help="a sentence-transformers model in ONNX form: model.onnx and tokenizer.json",
    )
    index.add_argument(
        "--base-url",
        metavar="URL",
        help="an endpoint that speaks /v1/embeddings; its key is read from $PHI3_EMBEDDINGS_KEY",
    )
    index.add_argument(
        "--embedding-model", metavar="NAME", help="the model or deployment at --base-url"
    )
    index.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="index the other documents when some cannot be read",
    )
    index.add_argument("--rebuild", action="store_true", help="start over from nothing")
    _add_run(index)
    search = add_command(
        actions, "search", "show the passages that a question finds, with their scores",
        'phi3 rag search "how long is the warranty?"', run_search,
    )  # fmt: skip
    search.add_argument("question")
    search.add_argument("-k", "--top-k", type=int, default=4, metavar="COUNT", help="default 4")
    search.add_argument("--query-type", choices=QUERY_TYPES, default="hybrid")
    _add_run(search)

    evaluate = add_command(
        actions, "evaluate", "measure how well the index finds what your questions ask for",
        "phi3 rag evaluate questions.jsonl", run_evaluate,
    )  # fmt: skip
    evaluate.add_argument(
        "questions",
        type=Path,
        metavar="FILE",
        help='JSON lines: {"question", "answer", "source"}; {"question", "answerable": false}',
    )
    evaluate.add_argument(
        "--split",
        choices=("train", "test"),
        help="only the questions with this `split` (default: all)",
    )
    _add_run(evaluate)
    _register_make_chats(actions)
    register_compare(actions)


def _register_make_chats(actions: Any) -> None:
    making = add_command(
        actions, "make-chats", "turn the indexed documents into chats to train on",
        "phi3 rag make-chats --out chats.jsonl", run_make_chats,
    )  # fmt: skip
    making.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where the chats are written"
    )
    making.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="your own questions, as for phi3 rag evaluate; rows of the split test are left out",
    )
    making.add_argument(
        "--only",
        choices=("passages", "plain"),
        help="passages: questions with what the index finds for them; plain: questions alone "
        "(default: both)",
    )
    making.add_argument(
        "--per-passage",
        type=int,
        default=2,
        metavar="COUNT",
        help="most questions made of a passage by templates; 0: your own alone (default 2)",
    )
    making.add_argument(
        "--withheld",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the questions whose right passage is withheld, so that the model learns to "
        "say that the answer is not there (default 0.2)",
    )
    making.add_argument(
        "-k", "--top-k", type=int, default=4, metavar="COUNT",
        help="passages of a prompt, as in the flow (default 4)",
    )  # fmt: skip
    making.add_argument("--seed", type=int, default=42, metavar="N", help="default 42")
    _add_run(making)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        default=DEFAULT_DOCUMENTS,
        metavar="NAME",
        help=f"run folder (default: {DEFAULT_DOCUMENTS})",
    )


def index_file(run: Run) -> Path:
    """Where a run has its index."""
    return run.path / "rag" / "index.sqlite"


def run_index(args: argparse.Namespace) -> int:
    """Index documents into the run, and put a copy into the flow `phi3_rag_chat`."""
    from ..rag.build import choose_embedder, publish, sync

    if args.embedder_folder and args.embedder not in ("auto", "onnx"):
        raise UsageError("--embedder-folder goes with --embedder onnx")
    run = Run.open(args.runs / args.run)
    with console.progress_bar("index") as progress:
        chosen = choose_embedder(
            args.embedder,
            progress,
            folder=args.embedder_folder,
            base=args.base_url,
            model=args.embedding_model,
            key=os.environ.get("PHI3_EMBEDDINGS_KEY"),
        )
        synced = sync(
            index_file(run),
            args.sources,
            chosen,
            progress,
            skip_unreadable=args.skip_unreadable,
            rebuild=args.rebuild,
        )
    flow = RAG_FLOW if RAG_FLOW.is_dir() else None
    if flow is not None:
        publish(synced.path, flow / "index.sqlite")
    if args.output == "json":
        report = {**asdict(synced), "skipped": [str(fault) for fault in synced.skipped]}
        console.print_json({**report, "flow": flow})
        return 0
    console.out.print(
        f"{synced.path}: {synced.documents} documents, {synced.passages} passages "
        f"({synced.added} new, {synced.changed} changed, {synced.removed} removed, "
        f"{synced.unchanged} unchanged)",
        markup=False,
    )
    console.note(f"embedder: {chosen.reason}")
    for fault in synced.skipped:
        console.err.print(f"  skipped: {fault}", markup=False, style="yellow")
    if flow is not None:
        console.note(f"copied to {flow / 'index.sqlite'}, where the flow looks it up")
    console.out.print("Look up:", 'phi3 rag search "a question"', markup=False)
    return 0


def run_search(args: argparse.Namespace) -> int:
    """Show what a question finds."""
    index = DocumentIndex(index_file(Run(args.runs / args.run)))
    embedder = None
    if args.query_type != "keyword":
        embedder = embedder_of(index.facts(), index.path)
    hits = index.search(
        args.question, top_k=args.top_k, query_type=args.query_type, embedder=embedder
    )
    if args.output == "json":
        console.print_json([hit.as_lookup() for hit in hits])
        return 0
    for number, hit in enumerate(hits, 1):
        cosine = "" if hit.cosine is None else f", meaning {hit.cosine:.2f}"
        head = f"[{number}] {hit.score:.2f} (words {hit.words:.2f}{cosine})  {hit.place}"
        console.out.print(Text(head, style="bold"))
        text = " ".join(hit.text.split())
        console.out.print(
            Text("    " + text[:_SHOWN_CHARACTERS] + "…" * (len(text) > _SHOWN_CHARACTERS))
        )
    if not hits:
        console.out.print("Nothing was found.")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Look the questions of a file up and print the figures."""
    from ..rag.figures import measure
    from ..rag.questions import read_questions

    questions = read_questions(args.questions)
    if args.split:
        questions = [question for question in questions if question.split == args.split]
        if not questions:
            raise UsageError(f"{args.questions} has no question with the split {args.split}")
    index = DocumentIndex(index_file(Run(args.runs / args.run)))
    found = measure(index, embedder_of(index.facts(), index.path), questions)
    if args.output == "json":
        console.print_json(asdict(found))
        return 0
    rows = [
        [f"right passage among the first {k}", f"{share:.1%}"] for k, share in found.hits.items()
    ]
    for kind, hits in found.kinds.items():
        rows += [[f"{kind or 'of no kind'}: among the first {k}", f"{hits[k]:.1%}"] for k in (1, 5)]
    rows.append(["of all right passages, among the first 5", f"{found.recall[5]:.1%}"])
    rows += [["mean reciprocal rank (10)", f"{found.mrr:.3f}"], ["nDCG (10)", f"{found.ndcg:.3f}"]]
    rows.append([f"nothing scores {found.min_score}, so not answered", f"{found.lost:.1%}"])
    if found.refused is not None:
        text = f"unanswerable, and nothing scores {found.min_score}"
        rows.append([f"{text} ({found.unanswerable} questions)", f"{found.refused:.1%}"])
    rows.append(["time for a question (median)", f"{found.median_seconds * 1000:.1f} ms"])
    console.table(f"{found.questions} questions", ["", ""], rows)
    for line, question, place in found.worst[:_SHOWN_QUESTIONS]:
        console.out.print(f"  line {line}: {question}\n      first: {place}", markup=False)
    left = len(found.worst) - _SHOWN_QUESTIONS
    if left > 0:
        console.out.print(f"  … and {left} more; all of them with: -o json", markup=False)
    return 0


def run_make_chats(args: argparse.Namespace) -> int:
    """Write chats made from the index."""
    from ..rag.chats import Making, make_chats, write_chats
    from ..rag.questions import read_questions

    if not 0 <= args.withheld < 1 or args.per_passage < 0 or not 1 <= args.top_k <= 50:
        raise UsageError(
            "Expected --withheld from 0 to below 1, --per-passage of 0 or more, and --top-k from "
            "1 to 50"
        )
    index = DocumentIndex(index_file(Run(args.runs / args.run)))
    making = Making(
        top_k=args.top_k,
        per_passage=args.per_passage,
        withheld=args.withheld,
        with_plain=args.only != "passages",
        with_passages=args.only != "plain",
        seed=args.seed,
    )
    own = read_questions(args.questions) if args.questions else []
    with console.progress_bar("chats") as progress:
        embedder = embedder_of(index.facts(), index.path)
        counts = write_chats(make_chats(index, embedder, own, making, progress), args.out)
    if args.output == "json":
        console.print_json({"chats": args.out, "rows": sum(counts.values()), "kinds": counts})
        return 0
    console.out.print(
        f"{args.out}: {sum(counts.values())} chats: {counts['passages']} with passages that hold "
        f"the answer, {counts['withheld']} with passages that do not, {counts['plain']} questions "
        "alone",
        markup=False,
    )
    console.out.print(f"Train:  phi3 up small-rag data.train={args.out}", markup=False)
    return 0
