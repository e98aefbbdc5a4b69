"""Chats as Conversations: for callers that want a few of them in memory. A small set, all of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .conversation import Conversation
from .faults import in_order
from .findings import Findings, Rules
from .prepare import chosen_sources
from .scan import scan, scan_start
from .sources import source_of
from .table import Table


def read_conversations(paths: Sequence[Path]) -> list[Conversation]:
    """All conversations of all sources. Raises DataError with every fault of every one."""
    sources, faults = chosen_sources({"train": [source_of(path) for path in paths]})
    with tempfile.TemporaryDirectory() as folder:
        findings = Findings(scan(sources, Path(folder)), Rules("refuse", "warn"))
        if faults := [*faults, *findings.faults()]:
            raise DataError(faults)
        return [findings.table.conversation(row) for row in range(len(findings.table))]


def show(source: Path | str, count: int) -> list[Conversation]:
    """The first sound conversations of a source; reads no further than it must.

    Raises DataError with every fault met when there is no sound one.
    """
    sources, faults = chosen_sources({"train": [source_of(source)]})
    found: list[Conversation] = []
    with tempfile.TemporaryDirectory() as folder:
        for _, one in sources:
            scanned = scan_start(one, Path(folder), count - len(found))
            table = Table([scanned])
            wanted = range(min(len(table), count - len(found)))
            found += [table.conversation(row) for row in wanted]
            faults += scanned.faults
            if len(found) == count:
                return found
    if not found and faults:
        raise DataError(in_order(faults))
    return found
