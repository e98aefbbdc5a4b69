"""`phi3 rag index | search | evaluate | down`: documents into an index, and what it finds."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from phi3_tool.embedders import embedder_of
from phi3_tool.index import QUERY_TYPES, open_index

from .. import console
from ..errors import UsageError
from ..project import RAG_FLOW
from ..run import Run, write_atomically
from . import HELP
from .common import add_command

DEFAULT_RUN = "documents"
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
        "words",  # so named, they may also follow an option (cli.py)
        nargs="+",
        metavar="FOLDER | FILE",
        help="Markdown, text, HTML, PDF, DOCX, or passages in CSV or JSONL; "
        "the index holds exactly these afterwards. rag.store=azure_search "
        "rag.search.endpoint=URL: in Azure AI Search as well (docs/azure-ai-search.md)",
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
    _add_run(evaluate)
    down = add_command(
        actions, "down", "delete the index that was made in Azure AI Search", "phi3 rag down",
        run_down,
    )  # fmt: skip
    _add_run(down)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", default=DEFAULT_RUN, metavar="NAME", help=f"run folder (default: {DEFAULT_RUN})"
    )


def index_file(run: Run) -> Path:
    """Where a run has its index."""
    return run.path / "rag" / "index.sqlite"


def search_file(run: Run) -> Path:
    """Says where a run's passages are in Azure AI Search; missing where they are not there."""
    return run.path / "rag" / "index.json"


def index_of(run: Run) -> Path:
    """What a run's questions are looked up in."""
    elsewhere = search_file(run)
    return elsewhere if elsewhere.is_file() else index_file(run)


def run_index(args: argparse.Namespace) -> int:
    """Index documents into the run, and put a copy into the flow `phi3_rag_chat`."""
    from ..rag.azure_search import Store, destination, send
    from ..rag.build import choose_embedder, sync

    settings = [word for word in args.words if word.startswith("rag.") and "=" in word]
    sources = [Path(word) for word in args.words if word not in settings]
    if not sources:
        raise UsageError("Name a folder or files to index")
    if args.embedder_folder and args.embedder not in ("auto", "onnx"):
        raise UsageError("--embedder-folder goes with --embedder onnx")
    run = Run.open(args.runs / args.run)
    to = destination(search_file(run), Store.of(settings), args.run)
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
            sources,
            chosen,
            progress,
            skip_unreadable=args.skip_unreadable,
            rebuild=args.rebuild,
        )
    sent = None
    if to is not None:
        with console.progress_bar("send") as progress:
            sent = send(synced.path, to, progress, rebuild=args.rebuild)
    copy = _publish(run)
    if args.output == "json":
        report = {**asdict(synced), "skipped": [str(fault) for fault in synced.skipped]}
        remote = {} if sent is None else {"azure_search": asdict(sent)}
        console.print_json({**report, "flow": copy and copy.parent, **remote})
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
    if sent is not None:
        done = f"{sent.passages} passages sent, {sent.deleted} old ones deleted"
        console.out.print(
            f"{sent.endpoint}, index {sent.index}: "
            f"{done if sent.passages else 'holds these passages already'}",
            markup=False,
        )
        console.note(
            "it bills by the hour, empty or full; phi3 rag down deletes the index, not the service"
        )
    if copy is not None:
        console.note(f"copied to {copy}, where the flow looks it up")
    console.out.print("Look up:", 'phi3 rag search "a question"', markup=False)
    return 0


def _publish(run: Run) -> Path | None:
    """Put what finds the run's passages into the flow's folder; where, None without a flow."""
    from ..rag.build import publish

    if not RAG_FLOW.is_dir():
        return None
    here, elsewhere = RAG_FLOW / "index.sqlite", RAG_FLOW / "index.json"
    if search_file(run).is_file():
        write_atomically(elsewhere, search_file(run).read_text(encoding="utf-8"))
        here.unlink(missing_ok=True)
        return elsewhere
    publish(index_file(run), here)
    elsewhere.unlink(missing_ok=True)
    return here


def run_down(args: argparse.Namespace) -> int:
    """Delete what was made in Azure AI Search; the SQLite file stays and answers again."""
    from ..rag.azure_search import down

    run = Run(args.runs / args.run)
    if not search_file(run).is_file():
        raise UsageError(f"The run {args.run} has no index in Azure AI Search")
    line = down(search_file(run))
    copy = _publish(run)
    if args.output == "json":
        console.print_json({"deleted": [line], "flow": copy and copy.parent})
        return 0
    console.out.print(line, markup=False)
    console.note("the service itself was not made by phi3 and goes on billing")
    console.note(f"questions are looked up in {index_file(run)} again")
    return 0


def run_search(args: argparse.Namespace) -> int:
    """Show what a question finds."""
    index = open_index(index_of(Run(args.runs / args.run)))
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
    from ..rag.figures import measure, read_questions

    questions = read_questions(args.questions)
    index = open_index(index_of(Run(args.runs / args.run)))
    found = measure(index, embedder_of(index.facts(), index.path), questions)
    if args.output == "json":
        console.print_json(asdict(found))
        return 0
    rows = [
        [f"right passage among the first {k}", f"{share:.1%}"] for k, share in found.hits.items()
    ]
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
