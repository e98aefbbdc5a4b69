"""`phi3 rag`: documents into an index or into chats, what the index finds, and what it costs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from phi3_tool.embedders import embedder_of
from phi3_tool.index import QUERY_TYPES, DocumentIndex, open_index

from .. import console
from ..errors import UsageError
from ..project import DOCUMENTS_RUN
from ..rag.index_files import (
    azure_section,
    create_service,
    extend_service,
    index_file,
    index_of,
    is_gone,
    publish_to_flow,
    search_file,
    service_id,
    take_down,
)
from ..recipe.azure import duration_of
from ..run import Run
from . import HELP
from .options import Subparsers, add_command, add_run, add_top_k
from .rag_compare import add_questions, register_compare

_SHOWN_CHARACTERS = 300
_SHOWN_QUESTIONS = 5


def register_rag(subparsers: Subparsers) -> None:
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
        help="auto (default): all-MiniLM-L6-v2 on this machine, words only where it cannot be "
        "downloaded; onnx: MiniLM or --embedder-folder, nothing else; endpoint: --base-url; "
        "none: words only",
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
    index.add_argument("--rebuild", action="store_true", help="start over from scratch")
    search = add_command(
        actions, "search", "show the passages for a question, with their scores",
        'phi3 rag search "how long is the warranty?"', run_search,
    )  # fmt: skip
    search.add_argument("question", help="what to look up")
    add_top_k(search, "passages to show", most=100)
    search.add_argument(
        "--query-type",
        choices=QUERY_TYPES,
        default="hybrid",
        help="by words, by meaning (vector), or both (hybrid, the default)",
    )

    evaluate = add_command(
        actions, "evaluate", "measure how well the index answers your questions",
        "phi3 rag evaluate questions.jsonl", run_evaluate,
    )  # fmt: skip
    add_questions(evaluate)
    evaluate.add_argument(
        "--split",
        choices=("train", "test"),
        help="only the questions with this `split` (default: all)",
    )
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
        help="your own questions, as for phi3 rag evaluate; rows with the split test are left out",
    )
    making.add_argument(
        "--only",
        choices=("passages", "plain"),
        help="passages: questions with the passages found for them; plain: questions only "
        "(default: both)",
    )
    making.add_argument(
        "--per-passage",
        type=int,
        default=2,
        metavar="COUNT",
        help="maximum number of template questions per passage; 0: only your own (default 2)",
    )
    making.add_argument(
        "--withheld",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the questions whose right passage is withheld, so that the model learns to "
        "say that the answer is not there (default 0.2)",
    )
    add_top_k(making, "passages of a prompt, as in the flow")
    making.add_argument(
        "--seed", type=int, default=42, metavar="N", help="random seed (default 42)"
    )
    register_compare(actions)
    plan = add_command(
        actions, "plan", "show what rag.search.create=true would create, and what it costs",
        "phi3 rag plan rag.search.tier=basic azure.location=westeurope", run_plan,
    )  # fmt: skip
    plan.add_argument("words", nargs="*", metavar="KEY=VALUE", help="rag.search.*, azure.*")
    extend = add_command(
        actions, "extend", "move the time at which the run's search service deletes itself",
        "phi3 rag extend 2d", run_extend,
    )  # fmt: skip
    extend.add_argument("by", metavar="DURATION", help="how much later, such as 12h or 2d")
    down = add_command(
        actions, "down", "delete what was created in Azure AI Search: the index, or its service",
        "phi3 rag down", run_down,
    )  # fmt: skip
    for each in (index, search, evaluate, making, plan, extend, down):
        add_run(each, f"run folder (default: {DOCUMENTS_RUN})", default=DOCUMENTS_RUN)


def run_index(args: argparse.Namespace) -> int:
    """Index documents into the run, and put a copy into the flow `phi3_rag_chat`."""
    from ..rag.azure_search import Store, begin, destination, send
    from ..rag.build import choose_embedder, sync

    # The words are split by hand: keys and folders come in one list, in any order.
    settings, azure = _keys(args.words, "rag."), _keys(args.words, "azure.")
    sources = [Path(word) for word in args.words if word not in (*settings, *azure)]
    if not sources:
        raise UsageError("Name a folder or files to index")
    if args.embedder_folder and args.embedder not in ("auto", "onnx"):
        raise UsageError("--embedder-folder goes with --embedder onnx")
    run = Run.open(args.runs / args.run)
    store = Store.of(settings)
    to = destination(search_file(run), store, args.run, partial(service_id, azure))
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
        # Noted in the run before it is created: a service that nobody knows would bill for ever.
        is_new = bool(to.service_id) and begin(synced.path, to)
        if to.service_id and not is_new and is_gone(to.service_id):
            gone = "is gone, by its deadline or by hand"
            console.note(f"{to.service.endpoint} {gone}: created again")
            to.path.unlink()
            is_new = begin(synced.path, to)  # its passages are in the run's own file
        if is_new:
            with console.progress_bar("service") as progress:
                deadline = create_service(
                    azure,
                    to,
                    store,
                    progress,
                    lambda line: console.note(f"{line.stage:<10} {line.text}"),
                )
            console.note(deadline)
        with console.progress_bar("send") as progress:
            sent = send(synced.path, to, progress, rebuild=args.rebuild)
    # Also where the index is in Azure: the flow then gets the small file that says so.
    copy = publish_to_flow(run)
    if args.output == "json":
        report = {**asdict(synced), "skipped": [str(fault) for fault in synced.skipped]}
        remote = {} if sent is None else {"azure_search": asdict(sent)}
        console.print_json({**report, "flow": copy and copy.parent, **remote})
        return 0
    console.line(
        f"{synced.path}: {synced.documents} documents, {synced.passages} passages "
        f"({synced.added} new, {synced.changed} changed, {synced.removed} removed, "
        f"{synced.unchanged} unchanged)"
    )
    console.note(f"embedder: {chosen.reason}")
    for fault in synced.skipped:
        console.err.print(f"  skipped: {fault}", markup=False, style="yellow")
    if sent is not None:
        done = f"{sent.passages} passages sent, {sent.deleted} old ones deleted"
        state = done if sent.passages else "holds these passages already"
        console.line(f"{sent.endpoint}, index {sent.index}: {state}")
        ends = "deletes it" if to and to.service_id else "deletes the index, not the service"
        console.note(f"it bills by the hour, empty or full; phi3 rag down {ends}")
    if copy is not None:
        console.note(f"copied to {copy}, where the flow looks it up")
    console.line('Look up: phi3 rag search "a question"')
    return 0


def run_down(args: argparse.Namespace) -> int:
    """Delete what was made in Azure AI Search; the SQLite file stays and answers again."""
    run = Run(args.runs / args.run)
    if not search_file(run).is_file():
        raise UsageError(f"The run {args.run} has no index in Azure AI Search")
    with console.progress_bar("down") as progress:
        line = take_down(run, progress)
    console.show(args.output, {"deleted": [line]}, line)
    if args.output == "text":
        console.note(f"questions are looked up in {index_file(run)} again")
    return 0


def run_extend(args: argparse.Namespace) -> int:
    """Move the deadline of the run's search service; print both times."""
    try:
        by = duration_of(args.by)
    except ValueError as error:
        raise UsageError(f"{args.by!r}: {error}") from None
    with console.progress_bar("deadline") as progress:
        arm_id, before, after = extend_service(Run(args.runs / args.run), by, progress)
    old = f"was: {before.text()}" if before.at else "had none"
    moved = {"service": arm_id, "before": before.at, "deadline": after.at}
    return console.show(args.output, moved, f"{arm_id.rsplit('/', 1)[-1]}: {after.text()}; {old}")


def run_plan(args: argparse.Namespace) -> int:
    """Say what a service of one's own would be and cost; nothing is created."""
    from ..rag.azure_search import Store
    from ..targets.azure.search_service import Wanted, plan
    from ..targets.azure.target import clients_at

    store = Store.of(_keys(args.words, "rag."))
    place = clients_at(azure_section(_keys(args.words, "azure."))).place
    lines = plan(Wanted(f"phi3-{args.run}-…", store.tier, store.deadline), place)
    texts = (f"{line.stage:<10} {line.text}" for line in lines)
    return console.show(args.output, [asdict(line) for line in lines], *texts)


def _keys(words: Sequence[str], prefix: str) -> list[str]:
    return [word for word in words if word.startswith(prefix) and "=" in word]


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
        console.line(head, "bold")
        text = " ".join(hit.text.split())
        console.line("    " + text[:_SHOWN_CHARACTERS] + "…" * (len(text) > _SHOWN_CHARACTERS))
    if not hits:
        console.line("Nothing was found.")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Look the questions of a file up and print the figures."""
    from ..rag.figures import measure
    from ..rag.questions import read_questions, right_ids_of

    run = Run(args.runs / args.run)
    questions = read_questions(args.questions)
    if args.split:
        questions = [question for question in questions if question.split == args.split]
        if not questions:
            raise UsageError(f"{args.questions} has no question with the split {args.split}")
    index = open_index(index_of(run))
    # The run keeps its own file in addition to an index in Azure AI Search, with the same ids.
    passages = DocumentIndex(index_file(run)).passages()
    right = right_ids_of(questions, passages)
    figures = measure(index, embedder_of(index.facts(), index.path), questions, right)
    if args.output == "json":
        console.print_json(asdict(figures))
        return 0
    rows = [
        [f"right passage among the first {k}", f"{share:.1%}"] for k, share in figures.hits.items()
    ]
    for kind, hits in figures.kinds.items():
        rows += [[f"{kind or 'of no kind'}: among the first {k}", f"{hits[k]:.1%}"] for k in (1, 5)]
    rows += [
        ["of all right passages, among the first 5", f"{figures.recall[5]:.1%}"],
        ["mean reciprocal rank (10)", f"{figures.mrr:.3f}"],
        ["nDCG (10)", f"{figures.ndcg:.3f}"],
        [f"nothing scores {figures.min_score}, so not answered", f"{figures.lost:.1%}"],
    ]
    if figures.refused is not None:
        text = f"unanswerable, and nothing scores {figures.min_score}"
        rows.append([f"{text} ({figures.unanswerable} questions)", f"{figures.refused:.1%}"])
    rows.append(["time for a question (median)", f"{figures.median_seconds * 1000:.1f} ms"])
    console.table(f"{figures.questions} questions", ["", ""], rows)
    for line, question, place in figures.worst[:_SHOWN_QUESTIONS]:
        console.line(f"  line {line}: {question}\n      first: {place}")
    left = len(figures.worst) - _SHOWN_QUESTIONS
    if left > 0:
        console.line(f"  … and {left} more; all of them with: -o json")
    return 0


def run_make_chats(args: argparse.Namespace) -> int:
    """Write chats made from the index."""
    from ..rag.chats import Making, make_chats, write_chats
    from ..rag.questions import read_questions

    if not 0 <= args.withheld < 1 or args.per_passage < 0:
        raise UsageError("Expected --withheld from 0 to below 1, and --per-passage of 0 or more")
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
    rows = sum(counts.values())
    return console.show(
        args.output,
        {"chats": args.out, "rows": rows, "kinds": counts},
        f"{args.out}: {rows} chats: {counts['passages']} with passages that hold the answer, "
        f"{counts['withheld']} with passages that do not, {counts['plain']} questions alone",
        f"Train:  phi3 up small-rag data.train={args.out}",
    )
