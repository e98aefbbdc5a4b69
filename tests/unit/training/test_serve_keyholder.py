"""The key that the server hands to its own user: given there, refused elsewhere, on no disk."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from phi3_training.serve import keyholder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract Unix sockets")


async def asked_while_open(pid: int) -> str | None:
    holder = await keyholder.offer("the-Key-öß")
    assert holder is not None
    async with holder:
        return await asyncio.to_thread(keyholder.ask, pid)


def test_the_own_user_gets_the_key() -> None:
    assert asyncio.run(asked_while_open(os.getpid())) == "the-Key-öß"


def test_no_server_no_key() -> None:
    assert keyholder.ask(os.getpid()) is None
    assert asyncio.run(asked_while_open(os.getppid())) is None


def test_a_name_that_is_taken_stops_no_server() -> None:
    """Containers that share a network share these names, and may repeat process ids."""

    async def twice() -> None:
        first = await keyholder.offer("one")
        assert first is not None
        async with first:
            assert await keyholder.offer("two") is None

    asyncio.run(twice())


def test_another_user_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side trusts another user: here this process takes itself for one."""
    real = os.geteuid()
    answers = iter([real + 1, real])  # the server looks first, then the asker
    monkeypatch.setattr(os, "geteuid", lambda: next(answers))
    assert asyncio.run(asked_while_open(os.getpid())) is None


def test_a_server_of_another_user_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert asyncio.run(asked_while_open(os.getpid())) is None
