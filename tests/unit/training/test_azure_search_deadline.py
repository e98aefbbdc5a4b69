"""A search service's deadline against the rehearsed Azure in this process: its clock moves."""

from __future__ import annotations

import datetime as dt
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import identity, jobs, logic, resources
from phi3_rehearsal.identity import token_for
from phi3_rehearsal.proxy import answer
from phi3_rehearsal.wire import ARM, Request
from phi3_tool.azure_search import SearchService
from phi3_training.cli import main
from phi3_training.errors import StageError, UsageError
from phi3_training.progress import no_progress
from phi3_training.rag import azure_search as rag_search
from phi3_training.rag.azure_search import MADE_BY, Store
from phi3_training.rag.index_files import service_line
from phi3_training.recipe.azure import AzureSection
from phi3_training.run import Run
from phi3_training.targets.azure import search_service
from phi3_training.targets.azure import target as azure_target
from phi3_training.targets.azure.search_service import (
    Wanted,
    ensure_service,
    exists,
    extend_search_deadline,
    made_services,
    read_search_deadline,
    remove_service,
    search_workflow_id,
)
from phi3_training.targets.azure.status import take_inventory
from phi3_training.targets.azure.teardown import Found

from .azure_rehearsed import Rehearsed, with_endpoint
from .search_service import KEY, SearchServiceStub

HOUR = 3600.0
NAME = "phi3-documents-1a2b3c4d"
SERVICES = (identity, jobs, logic, resources)  # importing a service's module declares its calls


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsed:
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search_service, "price_of", lambda _tier, _region, **_options: 0.1)
    return with_endpoint(tmp_path)


@pytest.fixture
def stub() -> Iterator[SearchServiceStub]:
    """The data plane, with an index that phi3 made."""
    with SearchServiceStub() as stub:
        listed = {"value": [{"name": "docs", "description": f"{MADE_BY}: passages"}]}
        stub.trouble = lambda _method, _path: (200, listed, {})
        yield stub


@pytest.fixture
def service(stub: SearchServiceStub) -> SearchService:
    return SearchService(stub.endpoint, key=KEY)


def service_id(azure: Rehearsed) -> str:
    return Wanted(NAME).id(azure.place)


def ensure(azure: Rehearsed, service: SearchService, deadline: str = "7d") -> str:
    wanted, section = Wanted(NAME, deadline=deadline), AzureSection(tags={"team": "ours"})
    return ensure_service(azure, wanted, section, no_progress, service=service)


def advance(azure: Rehearsed, hours: float) -> None:
    body = json.dumps({"seconds": hours * HOUR}).encode()
    assert (
        answer(azure.cloud, Request("POST", "rehearsal.invalid", "/clock", {}, body)).status == 200
    )


def days_left(azure: Rehearsed) -> float:
    at = read_search_deadline(azure, service_id(azure)).at
    assert at is not None
    return (at.timestamp() - time.time()) / HOUR / 24


def test_the_moved_clock_alone_ends_it(azure: Rehearsed, service: SearchService) -> None:
    told = ensure(azure, service)
    assert "at most 16.80 USD; then it deletes itself" in told
    assert "never verified on live Azure" in told
    advance(azure, 7 * 24 - 0.1)
    assert exists(azure, service_id(azure))
    before = len(azure.cloud.resources)
    advance(azure, 0.2)
    assert not exists(azure, service_id(azure))
    assert azure.cloud.get(azure.place.workspace_id()) is not None
    assert before - len(azure.cloud.resources) == 4  # with the roles at it


def test_its_identity_can_delete_nothing_else(azure: Rehearsed, service: SearchService) -> None:
    ensure(azure, service)
    workflow = azure.cloud.get(search_workflow_id(service_id(azure)))
    assert workflow is not None
    assert workflow["tags"]["team"] == "ours"
    token = token_for(azure.cloud, workflow["identity"]["principalId"], f"https://{ARM}")
    headers = {"authorization": f"Bearer {token}"}
    for key in [key for key in azure.cloud.resources if f"/searchservices/{NAME}" not in key]:
        assert answer(azure.cloud, Request("DELETE", ARM, key, headers, b"")).status == 403, key


def test_it_is_moved_later_and_never_earlier(azure: Rehearsed, service: SearchService) -> None:
    ensure(azure, service)
    ensure(azure, service, "1d")
    assert days_left(azure) == pytest.approx(7, abs=0.01)
    extend_search_deadline(azure, service_id(azure), dt.timedelta(days=2), no_progress)
    assert days_left(azure) == pytest.approx(9, abs=0.01)
    gone = Wanted("another").id(azure.place)
    with pytest.raises(StageError, match="does not exist"):
        extend_search_deadline(azure, gone, dt.timedelta(days=2), no_progress)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("PUT */Microsoft.Logic/* 403 code=RequestDisallowedByPolicy times=9", "policy"),
        # The caller's own two roles come after it.
        ("PUT */roleAssignments/* 403", "User Access Administrator"),
    ],
)
def test_where_none_can_be_made_it_says_so(
    azure: Rehearsed, service: SearchService, fault: str, reason: str
) -> None:
    azure.cloud.faults.add(fault)
    told = ensure(azure, service)
    assert told.startswith(f"NO deadline holds for {NAME}: ")
    assert reason in told
    assert azure.cloud.children("/subscriptions", logic.KIND) == []
    assert "no deadline" in made_services(azure)[0].text()


def test_down_takes_the_deadline_with_it(azure: Rehearsed, service: SearchService) -> None:
    ensure(azure, service)
    remove_service(azure, service_id(azure), no_progress, ours="docs", service=service)
    assert not exists(azure, service_id(azure))
    assert azure.cloud.children("/subscriptions", logic.KIND) == []


def test_after_the_deadline_down_takes_what_is_left(
    azure: Rehearsed, service: SearchService
) -> None:
    ensure(azure, service)
    advance(azure, 7 * 24 + 1)
    told = remove_service(azure, service_id(azure), no_progress, ours="docs", service=service)
    assert told.startswith("Was deleted before")
    assert azure.cloud.children("/subscriptions", logic.KIND) == []


def test_status_and_a_lost_laptop_know_it(
    azure: Rehearsed, service: SearchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure(azure, service)
    (bill,) = [bill for bill in take_inventory(azure).bills() if "AI Search" in bill.text]
    assert bill.per_hour == 0.1
    assert bill.until_deadline == pytest.approx(16.8, abs=0.01)
    assert f"Azure AI Search {NAME}: basic; 0.100 USD per hour, at most 16.80 more" in bill.text
    found = Found(azure)
    assert f"search service {NAME} with its indexes" in found.names()
    monkeypatch.setattr(search_service, "SearchService", lambda _endpoint: service)
    told = found.delete(no_progress, everything=False)
    assert f"deleted: search service {NAME} (Deleted the search service {NAME})" in told
    assert Found(azure).names() == []


@pytest.mark.parametrize(
    ("status", "listed", "why"),
    [
        (401, {}, "does not tell its indexes"),
        (200, {"value": [{"name": "hotels", "description": "theirs"}]}, "other indexes.*hotels"),
    ],
)
def test_a_lost_laptop_leaves_what_may_be_somebody_elses(
    azure: Rehearsed,
    stub: SearchServiceStub,
    service: SearchService,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    listed: dict[str, object],
    why: str,
) -> None:
    ensure(azure, service)
    monkeypatch.setattr(search_service, "SearchService", lambda _endpoint: service)
    stub.trouble = lambda _method, _path: (status, listed, {})
    lines = "\n".join(Found(azure).delete(no_progress, everything=False))
    assert re.search(f"left alone: The search service {NAME} .*{why}", lines)
    assert exists(azure, service_id(azure))
    assert not read_search_deadline(azure, service_id(azure)).fault


def test_the_command_moves_it(
    azure: Rehearsed,
    service: SearchService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ensure(azure, service)
    file = tmp_path / "runs" / "documents" / "rag" / "index.json"
    file.parent.mkdir(parents=True)
    settings = {"store": "azure_search", "format": "1", "service_id": service_id(azure)}
    file.write_text(json.dumps(settings), "utf-8")
    monkeypatch.setattr(azure_target, "Clients", lambda *_args: azure)
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["rag", "extend", "2d", *runs]) == 0
    assert f"{NAME}: deletes itself at 20" in capsys.readouterr().out
    assert days_left(azure) == pytest.approx(9, abs=0.01)
    line = service_line(Run(file.parents[1]))
    assert re.search(r"0\.100 USD per hour, at most 21\.\d+ more until 20.*phi3 rag down", line)
    advance(azure, 10 * 24)
    assert "is gone; phi3 rag index makes it again" in service_line(Run(file.parents[1]))
    assert main(["rag", "extend", "2d", *runs]) == 1
    assert main(["rag", "extend", "soon", *runs]) == 2
    assert main(["rag", "extend", "2d", "--run", "other", *runs]) == 2


def test_after_its_deadline_the_next_index_makes_it_again(
    azure: Rehearsed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handbook").mkdir()
    (tmp_path / "handbook" / "a.txt").write_text("A refund takes five days.", encoding="utf-8")
    monkeypatch.setattr(azure_target, "Clients", lambda *_args: azure)
    here = azure.place
    place = [f"azure.subscription_id={here.subscription_id}", "rag.search.create=true"]
    index = ["rag", "index", "handbook", "--embedder", "none"]
    with SearchServiceStub() as stub:
        stub.trouble = lambda _method, path: (
            (200, {"value": []}, {}) if path == "/indexes" else None
        )
        reached = SearchService(stub.endpoint, key=KEY)
        monkeypatch.setattr(rag_search, "SearchService", lambda _endpoint: reached)
        assert main([*index, "rag.store=azure_search", *place]) == 0
        told = capsys.readouterr().err
        assert "then it deletes itself" in " ".join(told.split())
        (made,) = made_services(azure)
        advance(azure, 8 * 24)
        assert made_services(azure) == []
        stub.indexes.clear()

        assert main(index) == 0

        assert "is gone, by its deadline or by hand: created again" in capsys.readouterr().err
        assert [each.id for each in made_services(azure)] == [made.id]
        assert len(stub.indexes) == 1


@pytest.mark.parametrize("value", ["", "7", "5m", "91d", "never"])
def test_the_key_is_a_duration_or_none(value: str) -> None:
    with pytest.raises(UsageError, match=r"rag\.search\.deadline"):
        Store.of([f"rag.search.deadline={value}"])
    assert Store.of(["rag.search.deadline=None"]).deadline == "none"
    assert Store.of([]).deadline == "7d"
