"""Continuous batching, on a step model that counts instead of computing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_training.serve.engines.base import EngineError, Sampling
from phi3_training.serve.engines.batch import PART_TOKENS, Batcher, Job, Logits, Sampler
from phi3_training.serve.engines.tokens import share_limit

VOCABULARY = 1000


class Counting:
    """Each row says its prompt's last token + 1, + 2, …; remembers what was asked of it."""

    def __init__(self, room: int = 10**6) -> None:
        self.rows: list[int] = []
        self.widths: list[int] = []
        self.threads: set[str] = set()
        self.added: list[list[int]] = []
        self.room = room
        self.fail = False
        self.gate = threading.Event()
        self.gate.set()

    def has_room(self, length: int) -> bool:
        return length <= self.room

    def add(self, ids: Sequence[int], length: int) -> Logits:
        self.rows.append(ids[-1])
        self.added.append(list(ids))
        return self._logits([ids[-1]])[0]

    def step(self, tokens: Sequence[int]) -> Logits:
        self.gate.wait(5)
        self.threads.add(threading.current_thread().name)
        self.widths.append(len(tokens))
        if self.fail:
            raise RuntimeError("forced")
        assert len(tokens) == len(self.rows)
        assert all(row < token for row, token in zip(self.rows, tokens, strict=True))
        self.rows = list(tokens)
        return self._logits(tokens)

    def drop(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def reset(self) -> None:
        self.rows = []

    def _logits(self, tokens: Sequence[int]) -> Logits:
        logits = np.zeros((len(tokens), VOCABULARY), np.float32)
        logits[np.arange(len(tokens)), [token + 1 for token in tokens]] = 1.0
        return logits


def job(first: int, limit: int = 5, stop: Sequence[int] = ()) -> Job:
    return Job([first], limit, Sampler(Sampling(temperature=0.0)), frozenset(stop))


async def tokens(batcher: Batcher, one: Job) -> list[int]:
    batcher.submit(one)
    found = []
    while (token := await one.next()) is not None:
        found.append(token)
    return found


def test_many_answers_share_steps_and_never_mix() -> None:
    model = Counting()
    model.gate.clear()

    async def main() -> list[list[int]]:
        batcher = Batcher(model, slots=8)
        asyncio.get_running_loop().call_later(0.1, model.gate.set)
        jobs = [tokens(batcher, job(20 * i, limit=3 + i % 4)) for i in range(30)]
        try:
            return await asyncio.gather(*jobs)
        finally:
            await asyncio.to_thread(batcher.close)

    answers = asyncio.run(main())
    for i, answer in enumerate(answers):
        assert answer == [20 * i + 1 + n for n in range(3 + i % 4)]
    assert max(model.widths) == 8, "the slots were not all used"
    assert model.threads == {"phi3-engine"}
    assert model.rows == []


def test_who_asks_again_at_once_joins_the_next_step() -> None:
    model = Counting()

    async def main() -> None:
        # As long as a slow machine may need.
        batcher = Batcher(model, slots=2, rejoin_seconds=30.0)
        model.gate.clear()
        long = asyncio.create_task(tokens(batcher, job(500, limit=40)))
        first = asyncio.create_task(tokens(batcher, job(10, limit=4)))
        while batcher.active < 2:
            await asyncio.sleep(0)
        model.gate.set()
        await first
        await tokens(batcher, job(20, limit=4))
        batcher.cancel(job(0))  # wakes the wait that follows the second answer
        long.cancel()
        await asyncio.to_thread(batcher.close)

    asyncio.run(main())
    assert model.widths[model.widths.index(2) :][:6] == [2] * 6


def test_a_stop_token_is_the_last_one() -> None:
    async def main() -> list[int]:
        batcher = Batcher(Counting(), slots=2)
        try:
            return await tokens(batcher, job(10, limit=50, stop=[13]))
        finally:
            await asyncio.to_thread(batcher.close)

    assert asyncio.run(main()) == [11, 12, 13]


def test_a_cancelled_answer_leaves_its_slot() -> None:
    model = Counting()

    async def main() -> list[int]:
        batcher = Batcher(model, slots=1)
        long = job(0, limit=900)
        batcher.submit(long)
        assert await long.next() == 1
        waiting = asyncio.create_task(tokens(batcher, job(500, limit=2)))
        batcher.cancel(long)
        try:
            return await asyncio.wait_for(waiting, 5)
        finally:
            assert batcher.active == 0
            await asyncio.to_thread(batcher.close)

    assert asyncio.run(main()) == [501, 502]


def test_a_failure_reaches_its_callers_and_the_next_answer_works() -> None:
    model = Counting()

    async def main() -> list[int]:
        batcher = Batcher(model, slots=2)
        model.fail = True
        try:
            with pytest.raises(EngineError, match="failed while"):
                await tokens(batcher, job(1))
            model.fail = False
            return await tokens(batcher, job(7, limit=2))
        finally:
            await asyncio.to_thread(batcher.close)

    assert asyncio.run(main()) == [8, 9]


def test_an_answer_waits_for_memory_but_not_when_alone() -> None:
    model = Counting(room=0)

    async def main() -> list[list[int]]:
        batcher = Batcher(model, slots=4)
        try:
            return await asyncio.gather(*[tokens(batcher, job(100 * i)) for i in range(3)])
        finally:
            await asyncio.to_thread(batcher.close)

    answers = asyncio.run(main())
    assert [answer[0] for answer in answers] == [1, 101, 201]
    assert set(model.widths) == {1}


def test_closing_ends_what_is_unfinished() -> None:
    async def main() -> None:
        batcher = Batcher(Counting(), slots=1)
        running, queued = job(0, limit=1_000_000), job(1)  # the first never ends by itself
        batcher.submit(running)
        batcher.submit(queued)
        await running.next()
        await asyncio.to_thread(batcher.close)
        with pytest.raises(EngineError, match="shut down"):
            await queued.next()
        with pytest.raises(EngineError, match="shutting down"):
            batcher.submit(job(2))

    asyncio.run(main())


def test_a_long_answer_runs_alone_where_lengths_must_not_mix() -> None:
    model = Counting()
    model.gate.clear()

    async def main() -> list[list[int]]:
        batcher = Batcher(model, slots=4, share_limit=10)
        asyncio.get_running_loop().call_later(0.1, model.gate.set)
        jobs = [job(0, limit=6), job(100, limit=6), job(200, limit=20), job(300, limit=6)]
        try:
            return await asyncio.gather(*[tokens(batcher, one) for one in jobs])
        finally:
            await asyncio.to_thread(batcher.close)

    assert [len(answer) for answer in asyncio.run(main())] == [6, 6, 20, 6]
    # The long one is read again at ten tokens, in the place of one step.
    assert model.widths == [2] * 5 + [1] * 18 + [1] * 5
    assert [len(ids) for ids in model.added] == [1, 1, 1, 11, 1]
    assert model.added[3] == list(range(200, 211))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, None),
        ({"rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
        (
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096},
            4096,
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 99}},
            99,
        ),
        ({"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 2048}, 2048),
    ],
)
def test_the_share_limit_is_read(config: dict[str, Any], limit: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert share_limit(tmp_path) == limit


class Partwise(Counting):
    """Reads in parts; remembers the order of all that was read."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[tuple[int, int]] = []
        self.open = 0

    def add(self, ids: Sequence[int], length: int) -> Logits:
        self.gate.wait(5)
        self.order.append((ids[-1], len(ids)))
        return super().add(ids, length)

    def add_in_parts(
        self, ids: Sequence[int], length: int, part: int
    ) -> Generator[Logits | None, None, None]:
        self.open += 1
        try:
            for start in range(0, len(ids), part):
                self.gate.wait(5)
                self.order.append((ids[-1], len(ids[start : start + part])))
                if start + part < len(ids):
                    yield None
        finally:
            self.open -= 1
        self.rows.append(ids[-1])
        yield self._logits([ids[-1]])[0]


def prompt(last: int, length: int, limit: int = 3) -> Job:
    ids = [1] * (length - 1) + [last]
    return Job(ids, limit, Sampler(Sampling(temperature=0.0)), frozenset())


def order_of(*jobs: tuple[int, int], slots: int = 8) -> list[tuple[int, int]]:
    """In which order prompts (last token, length) are read that wait behind another one."""
    model = Partwise()
    model.gate.clear()

    async def main() -> None:
        batcher = Batcher(model, slots=slots)
        try:
            first = asyncio.create_task(tokens(batcher, prompt(900, 1)))
            await asyncio.sleep(0.05)  # the model has it, and waits at its gate
            others = [asyncio.create_task(tokens(batcher, prompt(*one))) for one in jobs]
            await asyncio.sleep(0.05)
            model.gate.set()
            answers = await asyncio.gather(first, *others)
        finally:
            await asyncio.to_thread(batcher.close)
        for (last, _), answer in zip([(900, 1), *jobs], answers, strict=True):
            assert answer == [last + 1, last + 2, last + 3]

    asyncio.run(main())
    assert model.rows == []
    assert model.open == 0
    return model.order[1:]


def test_a_short_prompt_passes_a_long_one() -> None:
    long = 3 * PART_TOKENS
    assert order_of((100, long), (200, 5)) == [(200, 5), *[(100, PART_TOKENS)] * 3]


def test_a_prompt_is_not_passed_for_ever() -> None:
    model = Partwise()
    length = 4 * PART_TOKENS

    async def short_ones(batcher: Batcher) -> None:
        for _ in range(60):
            await tokens(batcher, prompt(200, 50, limit=1))

    async def main() -> None:
        batcher = Batcher(model, slots=8)
        try:
            users = [short_ones(batcher) for _ in range(3)]
            await asyncio.gather(*users, tokens(batcher, prompt(100, length)))
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(main())
    last = max(place for place, (token, _) in enumerate(model.order) if token == 100)
    passed = sum(size for token, size in model.order[:last] if token == 200)
    assert passed <= length + 3 * 50


def test_answers_continue_between_the_parts_of_a_prompt() -> None:
    model = Partwise()

    async def main() -> int:
        batcher = Batcher(model, slots=4)
        try:
            running = job(0, limit=400)
            batcher.submit(running)
            await running.next()
            before = len(model.widths)
            long = prompt(500, 8 * PART_TOKENS)
            batcher.submit(long)
            await long.next()
            batcher.cancel(running)
            return len(model.widths) - before
        finally:
            await asyncio.to_thread(batcher.close)

    assert asyncio.run(main()) >= 3


def test_a_prompt_given_up_half_read_leaves_nothing() -> None:
    model = Partwise()
    model.gate.clear()

    async def main() -> list[int]:
        batcher = Batcher(model, slots=1)
        try:
            long = prompt(500, 8 * PART_TOKENS)
            batcher.submit(long)
            await asyncio.sleep(0.05)
            batcher.cancel(long)
            model.gate.set()
            return await tokens(batcher, job(7, limit=2))
        finally:
            await asyncio.to_thread(batcher.close)

    assert asyncio.run(main()) == [8, 9]
    assert model.open == 0
    assert len(model.order) < 8
