"""Continuous batching: one owner thread runs a step model for every answer being written.

New answers join between two steps, finished and abandoned ones leave at once; nobody waits for a
batch to end. Long prompts are read in parts; answers continue and shorter prompts pass in between.
Threads: `submit` and `cancel` from anywhere, the step model only from the owner.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .base import EngineError, Sampling

logger = logging.getLogger(__name__)

Logits = NDArray[np.float32]

# e**-30 of the likeliest token: dropping what is rarer keeps the sort below short.
_NEGLIGIBLE = 30.0


def defaults_of(model_dir: Path) -> Sampling:
    """The model's own defaults: generation_config.json as `generate` would follow it."""
    try:
        config = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if not config.get("do_sample"):
        return Sampling(temperature=0.0, top_p=1.0, top_k=0)
    return Sampling(
        temperature=float(config.get("temperature") or 1.0),
        top_p=float(config.get("top_p") or 1.0),
        top_k=int(config.get("top_k") or 0),
    )


def with_defaults(sampling: Sampling, defaults: Sampling) -> Sampling:
    """`sampling` with what it leaves open filled in."""
    names = ("temperature", "top_p", "top_k")
    open_ones = {n: getattr(defaults, n) for n in names if getattr(sampling, n) is None}
    return replace(sampling, **open_ones)


class Sampler:
    """Chooses the tokens of one answer: greedy, temperature, top-k, top-p, penalties."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature or 0.0
        self._top_p = 1.0 if sampling.top_p is None else sampling.top_p
        self._top_k = sampling.top_k or 0
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        # A stream of its own, so that neighbours in the batch do not change what is drawn.
        self._random = np.random.default_rng(sampling.seed)
        self._counts: NDArray[np.int32] | None = None

    def pick(self, logits: Logits) -> int:
        """The next token for a row of logits."""
        if self._presence or self._frequency:
            if self._counts is None:
                self._counts = np.zeros(logits.shape[-1], np.int32)
            # As OpenAI defines them: presence once for any token seen, frequency for each time.
            seen = (self._counts > 0) * self._presence
            often = self._counts * self._frequency
            penalised: Logits = (logits - seen - often).astype(np.float32)
            logits = penalised
        token = self._draw(logits) if self._temperature > 0 else int(logits.argmax())
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _draw(self, logits: Logits) -> int:
        scores = logits.astype(np.float64) / self._temperature
        candidates: NDArray[Any] = np.flatnonzero(scores > scores.max() - _NEGLIGIBLE)
        # Stable: equal scores keep the order of their ids, so that a seed gives the same answer.
        order = candidates[np.argsort(-scores[candidates], kind="stable")]
        if self._top_k > 0:
            order = order[: self._top_k]
        weights = np.exp(scores[order] - scores[order[0]])
        cumulative = np.cumsum(weights / weights.sum())
        if self._top_p < 1:
            # The smallest set that reaches top_p; the likeliest token is always in it.
            count = int(np.searchsorted(cumulative, self._top_p)) + 1
            order, cumulative = order[:count], cumulative[:count] / cumulative[:count][-1]
        drawn = int(np.searchsorted(cumulative, self._random.random(), side="right"))
        return int(order[min(drawn, len(order) - 1)])


# Prompt tokens processed between two steps: bounds how long running answers wait.
PREFILL_BUDGET = 256
# A longer prompt is read in parts of this many tokens. 512 tokens in four parts took no longer
# than at once (8-bit 135 M model).
PART_TOKENS = 128
# How long the others wait for new questions after an answer ended: at most 1 % of an answer of 24
# tokens at 15 ms each. A client on the same machine asks again within 1 to 3 ms.
REJOIN_SECONDS = 0.004


class StepModel(Protocol):
    """A model that holds rows (one per answer) and moves all of them by one token per call."""

    def has_room(self, length: int) -> bool:
        """Whether memory holds one more row of `length` tokens."""
        ...

    def add(self, ids: Sequence[int], length: int) -> Logits:
        """Append a row that may grow to `length` tokens; the logits after its prompt."""
        ...

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row, in row order; logits of shape (rows, vocabulary)."""
        ...

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        ...

    def reset(self) -> None:
        """Remove all rows, also after a failure."""
        ...


@runtime_checkable
class PartwiseModel(StepModel, Protocol):
    """A step model that can read a prompt in parts, with other work between them."""

    def add_in_parts(
        self, ids: Sequence[int], length: int, part: int
    ) -> Generator[Logits | None, None, None]:
        """Read `part` tokens at each call of `next`: None, and at last the logits.

        With the logits the row is there, as the last one. Closing the generator before that
        gives the prompt up.
        """
        ...


class Job:
    """One answer: its prompt, its sampler, and the tokens on their way to the caller."""

    def __init__(
        self, ids: Sequence[int], limit: int, sampler: Sampler, stop_ids: frozenset[int]
    ) -> None:
        self.ids = ids
        self.limit = limit
        self.sampler = sampler
        self.cancelled = False
        # Prompt tokens still to be read, and those of other prompts read in the meantime.
        self.unread = len(ids)
        self.passed = 0
        self.tokens: list[int] = []
        self.stop_ids = stop_ids
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[int | EngineError | None] = asyncio.Queue()

    @property
    def length(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.ids) + self.limit

    @property
    def read(self) -> int:
        """Tokens that the model has read: all but the last one of the answer."""
        return len(self.ids) + len(self.tokens) - 1

    def accept(self, logits: Logits) -> tuple[int, bool]:
        """Pick the next token; True when it is the last one."""
        token = self.sampler.pick(logits)
        self.tokens.append(token)
        return token, token in self.stop_ids or len(self.tokens) >= self.limit

    def post(self, item: int | EngineError | None) -> None:
        """Give an item to the caller; on the caller's event loop only. None: no more."""
        self._queue.put_nowait(item)

    async def next(self) -> int | None:
        """The next token id, None after the last; raises EngineError if the engine fails."""
        item = await self._queue.get()
        if isinstance(item, EngineError):
            raise item
        return item


Mail = tuple[Job, "int | EngineError | None"]


def deliver(mail: Sequence[Mail]) -> None:
    """Bring items to their callers' event loops, with one wake-up per loop."""
    for loop in {job.loop for job, _ in mail}:
        own = [(job, item) for job, item in mail if job.loop is loop]

        def post_all(own: Sequence[Mail] = own) -> None:
            for job, item in own:
                job.post(item)

        try:
            loop.call_soon_threadsafe(post_all)
        except RuntimeError:  # the loop is closed: the client is gone
            for job, _ in own:
                job.cancelled = True


class Batcher:
    """Runs jobs on a step model, at most `slots` at a time.

    Short prompts are read first, but later ones cannot pass a prompt for ever. A job that may grow
    beyond `share_limit` tokens runs alone, and is read again at that length. After an answer ended,
    the next step waits up to `rejoin_seconds` for a new question in its place.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        slots: int,
        share_limit: int | None = None,
        rejoin_seconds: float = REJOIN_SECONDS,
    ) -> None:
        self._model = model
        self._slots = slots
        self._share_limit = share_limit
        self._rejoin_seconds = rejoin_seconds
        self._waiting: list[Job] = []
        self._reading: dict[Job, Generator[Logits | None, None, None]] = {}
        self._rows: list[Job] = []
        self._next: list[int] = []
        self._mail: list[Mail] = []
        self._wake = threading.Condition()
        self._closing = False
        # Daemon: a server that dies of an error must not wait for an answer to end.
        self._thread = threading.Thread(target=self._run, name="phi3-engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Jobs running or waiting."""
        return len(self._rows) + len(self._reading) + len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job; it joins the batch between two steps."""
        with self._wake:
            if self._closing:
                raise EngineError("The engine is shutting down.")
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Give up a job: its row is free before the next step."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Stop the owner thread; jobs not finished get an EngineError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self.active)
                if self._closing:
                    break
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - the owner thread must outlive any failure
                self._fail(error)
        with self._wake:
            jobs = [*self._rows, *self._reading, *self._waiting]
            self._rows, self._next, self._reading = [], [], {}
            self._waiting.clear()
        reason = "The engine was shut down before the answer was finished."
        deliver([(job, EngineError(reason)) for job in jobs])

    def _turn(self) -> None:
        """One step. A function of its own, so that no job outlives it while the thread waits."""
        for row in range(len(self._rows) - 1, -1, -1):
            if self._rows[row].cancelled:
                self._leave(row)
        for job in [job for job in self._reading if job.cancelled]:
            self._close_reading(job)
        self._admit()
        running = len(self._rows)
        if running:
            job = self._rows[0]
            if job.read == self._share_limit and job.length > self._share_limit:
                # From here on the model rotates by its other factors, and keys rotated by the first
                # ones would be misread (KL 0.54 at the next token of a random model).
                # transformers' own `generate` reads the conversation again here, too. The job is
                # alone: see `_has_room_for`.
                self._model.drop(0)
                logits = self._model.add([*job.ids, *job.tokens], job.length)[None]
            else:
                logits = self._model.step(self._next)
            # Backwards: `_leave` moves the last row into the place of the one that left.
            for row in range(running - 1, -1, -1):
                self._accept(row, logits[row])
        self._send()
        ended = running - len(self._rows)
        if ended and self._rows:
            # A program that asks again as soon as it is answered comes a moment after this; without
            # the wait it would just miss the next step.
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closing or len(self._waiting) >= ended,
                    timeout=self._rejoin_seconds,
                )

    def _admit(self) -> None:
        """Read prompts, or parts of them, until the budget is used up or none is waiting."""
        budget = PREFILL_BUDGET
        while budget > 0:
            job = self._next_to_read()
            if job is None:
                return
            before = job.unread
            # Where the rotation depends on the length, all parts must see the whole of it.
            fixed = self._share_limit is None or job.length <= self._share_limit
            in_parts = fixed and job.unread > PART_TOKENS
            if job not in self._reading and in_parts and isinstance(self._model, PartwiseModel):
                self._reading[job] = self._model.add_in_parts(job.ids, job.length, PART_TOKENS)
            if job in self._reading:
                logits = next(self._reading[job])
                job.unread = max(0, job.unread - PART_TOKENS)
                if logits is not None:  # that was the last part: the prompt is a row now
                    self._close_reading(job)
                    self._append(job)
                    self._accept(len(self._rows) - 1, logits)
            else:
                # Listed before `add`: if that fails, `_fail` must know of it.
                self._append(job)
                job.unread = 0
                self._accept(len(self._rows) - 1, self._model.add(job.ids, job.length))
            read = before - job.unread
            budget -= read
            with self._wake:
                for other in (*self._waiting, *self._reading):
                    other.passed += read if other is not job else 0
            # At once: the first token of one must not wait for the prompts of others.
            self._send()

    def _next_to_read(self) -> Job | None:
        """The prompt with the least left to read, less what was read while it waited.

        So no prompt waits for more tokens of later ones than it has itself.
        """
        with self._wake:
            self._waiting = [job for job in self._waiting if not job.cancelled]
            full = len(self._rows) + len(self._reading) >= self._slots
            open_ones = [*self._reading, *([] if full else self._waiting)]
            if not open_ones:
                return None
            job = min(open_ones, key=lambda job: job.unread - job.passed)
            if job not in self._reading:
                if not self._has_room_for(job.length):
                    # Rows must end first; prompts that are half read have their place already.
                    return min(self._reading, key=lambda job: job.unread, default=None)
                self._waiting.remove(job)
            return job

    def _append(self, job: Job) -> None:
        self._rows.append(job)
        self._next.append(0)

    def _close_reading(self, job: Job) -> None:
        self._reading.pop(job).close()

    def _has_room_for(self, length: int) -> bool:
        others = [*self._rows, *self._reading]
        if not others:  # alone it runs however long it is: nothing else could make room
            return True
        longest = max(length, *(job.length for job in others))
        shares = self._share_limit is None or longest <= self._share_limit
        return shares and self._model.has_room(length)

    def _accept(self, row: int, logits: Logits) -> None:
        job = self._rows[row]
        token, last = job.accept(logits)
        self._next[row] = token
        self._mail.append((job, token))
        if last:
            self._mail.append((job, None))
            self._leave(row)

    def _send(self) -> None:
        mail, self._mail = self._mail, []
        deliver(mail)

    def _leave(self, row: int) -> None:
        self._model.drop(row)
        self._rows[row] = self._rows[-1]
        self._next[row] = self._next[-1]
        self._rows.pop()
        self._next.pop()

    def _fail(self, error: Exception) -> None:
        logger.error("the engine failed: %s: %s", type(error).__name__, error)
        rows, self._rows, self._next = [*self._rows, *self._reading], [], []
        self._reading = {}
        self._model.reset()
        self._send()
        failure = EngineError("The model failed while generating this answer.")
        deliver([(job, failure) for job in rows])
