"""`phi3 rag`: documents into an index or into chats, what the index finds, and what it costs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.text import Text

from phi3_tool.azure_search import read_settings
from phi3_tool.embedders import embedder_of
from phi3_tool.errors import ConfigurationError
from phi3_tool.index import QUERY_TYPES, DocumentIndex, open_index

from .. import console
from ..errors import Phi3TrainingError, UsageError
from ..project import RAG_FLOW
from ..recipe.azure import AzureSection, duration_of
from ..run import Run, write_atomically
from . import HELP
from .common import add_command
from .rag_compare import DEFAULT_DOCUMENTS, register_compare

if TYPE_CHECKING:
    from ..rag.azure_search import Destination, Store
    from ..targets.azure.clients import Clients

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
    evaluate.add_argument(
        "--split",
        choices=("train", "test"),
        help="only the questions with this `split` (default: all)",
    )
    _add_run(evaluate)
    _register_make_chats(actions)
    register_compare(actions)
    plan = add_command(
        actions, "plan", "say what rag.search.create=true would create, and what it costs",
        "phi3 rag plan rag.search.tier=basic azure.location=westeurope", run_plan,
    )  # fmt: skip
    plan.add_argument("words", nargs="*", metavar="KEY=VALUE", help="rag.search.*, azure.*")
    _add_run(plan)
    extend = add_command(
        actions, "extend", "move the time at which the run's search service deletes itself",
        "phi3 rag extend 2d", run_extend,
    )  # fmt: skip
    extend.add_argument("by", metavar="DURATION", help="how much later, such as 12h or 2d")
    _add_run(extend)
    down = add_command(
        actions, "down", "delete what was made in Azure AI Search: the index, or its service",
        "phi3 rag down", run_down,
    )  # fmt: skip
    _add_run(down)


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


def search_file(run: Run) -> Path:
    """Says where a run's passages are in Azure AI Search; missing where they are not there."""
    return run.path / "rag" / "index.json"


def index_of(run: Run) -> Path:
    """What a run's questions are looked up in."""
    elsewhere = search_file(run)
    return elsewhere if elsewhere.is_file() else index_file(run)


def run_index(args: argparse.Namespace) -> int:
    """Index documents into the run, and put a copy into the flow `phi3_rag_chat`."""
    from ..rag.azure_search import Store, begin, destination, send
    from ..rag.build import choose_embedder, sync

    settings, azure = _keys(args.words, "rag."), _keys(args.words, "azure.")
    sources = [Path(word) for word in args.words if word not in (*settings, *azure)]
    if not sources:
        raise UsageError("Name a folder or files to index")
    if args.embedder_folder and args.embedder not in ("auto", "onnx"):
        raise UsageError("--embedder-folder goes with --embedder onnx")
    run = Run.open(args.runs / args.run)
    store = Store.of(settings)
    to = destination(search_file(run), store, args.run, partial(_service_id, azure))
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
        if to.service_id and (begin(synced.path, to) or _begins_anew(synced.path, to)):
            _create(azure, to, store)
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
        ends = "deletes it" if to and to.service_id else "deletes the index, not the service"
        console.note(f"it bills by the hour, empty or full; phi3 rag down {ends}")
    if copy is not None:
        console.note(f"copied to {copy}, where the flow looks it up")
    console.out.print("Look up:", 'phi3 rag search "a question"', markup=False)
    return 0


def _begins_anew(database: Path, to: Destination) -> bool:
    """Whether the run's service is gone and has to be created again; its passages are here."""
    from ..rag.azure_search import begin
    from ..targets.azure.search_service import exists

    if exists(_clients(_place_of(to.service_id)), to.service_id):
        return False
    console.note(f"{to.service.endpoint} is gone, by its deadline or by hand: created again")
    to.path.unlink()
    return begin(database, to)


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
    run = Run(args.runs / args.run)
    if not search_file(run).is_file():
        raise UsageError(f"The run {args.run} has no index in Azure AI Search")
    line = take_down(run)
    if args.output == "json":
        console.print_json({"deleted": [line]})
        return 0
    console.out.print(line, markup=False)
    console.note(f"questions are looked up in {index_file(run)} again")
    return 0


def run_extend(args: argparse.Namespace) -> int:
    """Move the deadline of the run's search service; print both times."""
    from ..targets.azure.search_deadline import extend_search_deadline

    try:
        by = duration_of(args.by)
    except ValueError as error:
        raise UsageError(f"{args.by!r}: {error}") from None
    path = search_file(Run(args.runs / args.run))
    service_id = read_settings(path).get("service_id") if path.is_file() else None
    if not service_id:
        raise UsageError(f"phi3 has created no search service for the run {args.run}")
    clients = _clients(_place_of(service_id))
    with console.progress_bar("deadline") as progress:
        before, after = extend_search_deadline(clients, service_id, by, progress)
    if args.output == "json":
        console.print_json({"service": service_id, "before": before.at, "deadline": after.at})
        return 0
    old = f"was: {before.text()}" if before.at else "had none"
    name = service_id.rsplit("/", 1)[-1]
    console.out.print(f"{name}: {after.text()}; {old}", markup=False, soft_wrap=True)
    return 0


def services_of(runs: Path) -> list[Run]:
    """The runs for which a search service was created that bills until it is deleted."""
    found = []
    for path in sorted(runs.glob("*/rag/index.json")):
        try:
            has_service = read_settings(path).get("service_id")
        except ConfigurationError:  # another file; `phi3 rag` says so
            continue
        if has_service:
            found.append(Run(path.parents[1]))
    return found


def service_line(run: Run) -> str:
    """What Azure says of the service that was created for a run: its cost and its end."""
    from ..targets.azure.search_service import made_service

    service_id = read_settings(search_file(run))["service_id"]
    try:
        found = made_service(_clients(_place_of(service_id)), service_id)
    except Phi3TrainingError as error:
        return f"{service_id.rsplit('/', 1)[-1]} could not be read: {error}"
    command = f"phi3 rag down --run {run.name}"
    if found is None:
        return f"its Azure AI Search service is gone; phi3 rag index makes it again, or: {command}"
    return f"{found.text()}; delete it: {command}"


def take_down(run: Run) -> str:
    """Delete the run's index, or its service where one was created; a line that says so."""
    from ..rag.azure_search import down

    path = search_file(run)
    settings = read_settings(path)
    service_id = settings.get("service_id")
    if service_id:
        from ..targets.azure.search_service import remove_service

        clients = _clients(_place_of(service_id))
        with console.progress_bar("down") as progress:
            line = remove_service(clients, service_id, progress, ours=settings["index"])
        path.unlink()
    else:
        line = f"{down(path)}; the service is not phi3's and goes on billing"
    _publish(run)
    return line


def run_plan(args: argparse.Namespace) -> int:
    """Say what a service of one's own would be and cost; nothing is created."""
    from ..rag.azure_search import Store
    from ..targets.azure.search_service import Wanted, plan

    store = Store.of(_keys(args.words, "rag."))
    clients = _clients(_keys(args.words, "azure."))
    lines = plan(Wanted(f"phi3-{args.run}-…", store.tier, store.deadline), clients.place)
    if args.output == "json":
        console.print_json([asdict(line) for line in lines])
        return 0
    for line in lines:
        console.out.print(f"{line.stage:<10} {line.text}", markup=False)
    return 0


def _keys(words: Sequence[str], prefix: str) -> list[str]:
    return [word for word in words if word.startswith(prefix) and "=" in word]


def _azure_section(words: Sequence[str]) -> AzureSection:
    """The place on Azure that the words name. Raises UsageError with every fault."""
    given = dict(word.removeprefix("azure.").split("=", 1) for word in words)
    try:
        return AzureSection.model_validate(given)
    except ValidationError as error:
        faults = (
            f"azure.{item['loc'][0]}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise UsageError("\n".join(faults)) from None


def _clients(words: Sequence[str]) -> Clients:
    """Azure at the place that the words, the environment and config.json name; no sign-in yet."""
    from ..targets.azure.clients import Clients
    from ..targets.azure.place import find_place
    from ..targets.azure.target import refuse_without_extra

    refuse_without_extra()
    section = _azure_section(words)
    return Clients(find_place(section, os.environ, Path.cwd()), section.poll)


def _service_id(words: Sequence[str], name: str) -> str:
    from ..targets.azure.search_service import Wanted

    return Wanted(name).id(_clients(words).place)


def _place_of(service_id: str) -> list[str]:
    """Subscription and group of an ARM id, as the words that name them."""
    parts = service_id.split("/")
    return [f"azure.subscription_id={parts[2]}", f"azure.resource_group={parts[4]}"]


def _create(words: Sequence[str], to: Destination, store: Store) -> None:
    """Create the run's service, or finish what an earlier command began."""
    from ..targets.azure.search_service import Wanted, ensure_service, plan

    wanted = Wanted(to.service_id.rsplit("/", 1)[-1], store.tier, store.deadline)
    clients = _clients([*words, *_place_of(to.service_id)])
    for line in plan(wanted, clients.place):
        console.err.print(f"  {line.stage:<10} {line.text}", markup=False)
    section = _azure_section(words)
    with console.progress_bar("service") as progress:
        told = ensure_service(clients, wanted, section, progress, service=to.service)
    console.note(told)


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
    from ..rag.figures import measure
    from ..rag.questions import read_questions, right_ids_of

    run = Run(args.runs / args.run)
    questions = read_questions(args.questions)
    if args.split:
        questions = [question for question in questions if question.split == args.split]
        if not questions:
            raise UsageError(f"{args.questions} has no question with the split {args.split}")
    index = open_index(index_of(run))
    # The run keeps its own file beside an index in Azure AI Search, with the same ids.
    passages = DocumentIndex(index_file(run)).passages()
    right = right_ids_of(questions, passages)
    found = measure(index, embedder_of(index.facts(), index.path), questions, right)
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
