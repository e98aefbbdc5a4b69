"""Where a run's passages are: its SQLite file, Azure AI Search, and the copy in the flow's folder.

Reads and writes `<run>/rag/` and the flow `phi3_rag_chat`; creates and deletes search services.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_tool.azure_search import read_settings
from phi3_tool.errors import ConfigurationError
from phi3_tool.index import open_index

from ..errors import Phi3TrainingError, UsageError
from ..progress import PlanLine, Progress
from ..project import RAG_FLOW
from ..recipe import AzureSection, azure_section_of
from ..run import Run, write_atomically

if TYPE_CHECKING:
    from ..targets.azure.search_service import SearchDeadline
    from .azure_search import Destination, Store


def index_file(run: Run) -> Path:
    """The run's SQLite index."""
    return run.path / "rag" / "index.sqlite"


def search_file(run: Run) -> Path:
    """Names the run's index in Azure AI Search; missing where it has none there."""
    return run.path / "rag" / "index.json"


def index_of(run: Run) -> Path:
    """What a run's questions are looked up in."""
    return search_file(run) if search_file(run).is_file() else index_file(run)


def checked_index(run: Run) -> Path:
    """The same, absolute. Raises ConfigurationError where there is none."""
    path = index_of(run).absolute()
    open_index(path)
    return path


def publish_to_flow(run: Run) -> Path | None:
    """Put what finds the run's passages into the flow's folder; None where there is no flow."""
    from .build import publish  # here, because `phi3 status` needs no numpy

    if not RAG_FLOW.is_dir():
        return None
    database, remote = RAG_FLOW / "index.sqlite", RAG_FLOW / "index.json"
    if search_file(run).is_file():
        write_atomically(remote, search_file(run).read_text(encoding="utf-8"))
        database.unlink(missing_ok=True)
        return remote
    publish(index_file(run), database)
    # Last: whichever of the two the flow finds names passages that are there.
    remote.unlink(missing_ok=True)
    return database


def services_of(runs: Path) -> list[Run]:
    """The runs for which a search service was created that bills until it is deleted."""
    billing = []
    # By the small file alone: no question to Azure, which may be slow or signed out.
    for path in sorted(runs.glob("*/rag/index.json")):
        try:
            if read_settings(path).get("service_id"):
                billing.append(Run(path.parents[1]))
        except ConfigurationError:  # another file; `phi3 rag` says so
            continue
    return billing


def take_down(run: Run, progress: Progress) -> str:
    """Delete the run's index, or its service where one was created; a line that says so."""
    from .azure_search import down

    path = search_file(run)
    settings = read_settings(path)
    service_id = settings.get("service_id")
    if service_id:
        from ..targets.azure.search_service import remove_service
        from ..targets.azure.target import clients_at

        clients = clients_at(azure_section(_place_of(service_id)))
        line = remove_service(clients, service_id, progress, ours=settings["index"])
        # Only after the service is gone: the file is what finds it again.
        path.unlink()
    else:
        line = f"{down(path)}; the service is not phi3's and keeps billing"
    publish_to_flow(run)
    return line


def service_id(words: Sequence[str], name: str) -> str:
    """The ARM id of a search service at the place that `azure.*` words name."""
    from ..targets.azure.search_service import Wanted
    from ..targets.azure.target import clients_at

    return Wanted(name).id(clients_at(azure_section(words)).place)


def create_service(
    words: Sequence[str],
    to: Destination,
    store: Store,
    progress: Progress,
    show: Callable[[PlanLine], None],
) -> str:
    """Create the run's service, or finish what an earlier command began; its deadline in words.

    `show` gets what it is and costs, before anything is created.
    """
    from ..targets.azure.search_service import Wanted, ensure_service, plan
    from ..targets.azure.target import clients_at

    wanted = Wanted(to.service_id.rsplit("/", 1)[-1], store.tier, store.deadline)
    clients = clients_at(azure_section([*words, *_place_of(to.service_id)]))
    for line in plan(wanted, clients.place):
        show(line)
    return ensure_service(clients, wanted, azure_section(words), progress, service=to.service)


def is_gone(service_id: str) -> bool:
    """Whether a search service does not exist (any more)."""
    from ..targets.azure.search_service import exists
    from ..targets.azure.target import clients_at

    return not exists(clients_at(azure_section(_place_of(service_id))), service_id)


def extend_service(
    run: Run, by: dt.timedelta, progress: Progress
) -> tuple[str, SearchDeadline, SearchDeadline]:
    """Move the deadline of the run's search service; its ARM id, the deadline before and after.

    Raises UsageError where phi3 has created none, StageError where Azure refuses.
    """
    from ..targets.azure.search_service import extend_search_deadline
    from ..targets.azure.target import clients_at

    path = search_file(run)
    service_id = read_settings(path).get("service_id") if path.is_file() else None
    if not service_id:
        raise UsageError(f"phi3 has created no search service for the run {run.name}")
    clients = clients_at(azure_section(_place_of(service_id)))
    return service_id, *extend_search_deadline(clients, service_id, by, progress)


def service_line(run: Run) -> str:
    """What Azure says of the service that was created for a run: its cost and its end."""
    from ..targets.azure.search_service import made_service
    from ..targets.azure.target import clients_at

    service_id = read_settings(search_file(run))["service_id"]
    try:
        found = made_service(clients_at(azure_section(_place_of(service_id))), service_id)
    except Phi3TrainingError as error:
        return f"{service_id.rsplit('/', 1)[-1]} could not be read: {error}"
    command = f"phi3 rag down --run {run.name}"
    if found is None:
        return f"its Azure AI Search service is gone; phi3 rag index makes it again, or: {command}"
    return f"{found.text()}; delete it: {command}"


def azure_section(words: Sequence[str]) -> AzureSection:
    """The place on Azure that `azure.KEY=VALUE` words name. Raises UsageError with every fault."""
    return azure_section_of(dict(word.removeprefix("azure.").split("=", 1) for word in words))


def _place_of(service_id: str) -> list[str]:
    """Subscription and group of an ARM id, as the words that name them."""
    parts = service_id.split("/")
    return [f"azure.subscription_id={parts[2]}", f"azure.resource_group={parts[4]}"]
