"""Which engine answers the questions: the same computation that the endpoint will do.

Reads model folders. An `int4` or `int8` endpoint is evaluated through its own engine, on both
models converted in the same way; `deploy` serves the tuned model's conversion. Everything else is
answered by the loaded weights: float32 on a CPU gives the same tokens as the fp32 conversion.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from transformers import DynamicCache, PreTrainedModel

from phi3_tool.client import Phi3Client
from phi3_tool.errors import EndpointTimeoutError, Phi3Error

from ..engine import choose_engine
from ..errors import StageError
from ..finetune.rewordings import Conversation
from ..finetune.runtime import choose_runtime, torch_threads, trim
from ..finetune.weights import chat_format, count_weights, load_model
from ..manifests import BaseManifest
from ..progress import no_progress
from ..prompt import ChatFormat, Example
from ..recipe import Recipe
from ..run import Run, fingerprint
from ..serve.config import ServerConfig
from ..serve.engines.base import Engine
from ..serve.engines.tokens import share_limit
from ..serve.engines.transformers import kept_rows, pad_left
from ..serve.export import converted, export_onnx
from ..serve.server import bind, create_app, server_of
from .rows import Answered, AnswerLoss, Said

# How probable a model finds the expected answers: negative log likelihood of their tokens.
# Perplexity of a set = exp(sum of -ln p(token | all tokens before it) / number of tokens), over the
# assistant's tokens and the tokens that end its turns, as training's mask marks them. Reads
# nothing.

# Rows times width of one forward pass: bounds the logits, which are what fills a GPU in evaluation.
TOKENS_PER_PASS = 4096


def answer_losses(
    model: PreTrainedModel,
    chat: ChatFormat,
    conversations: Sequence[Conversation],
    *,
    share_limit: int | None = None,
) -> list[AnswerLoss | None]:
    """The loss of each conversation's answers; None where it is longer than the context.

    `share_limit`: longer rows share no pass with the others (see engines/tokens.py).
    """
    examples = [chat.encode_example(conversation) for conversation in conversations]
    losses_of: list[AnswerLoss | None] = [None] * len(examples)
    fitting = [i for i, e in enumerate(examples) if len(e.input_ids) <= chat.context_length]
    for batch in _batches(fitting, examples, share_limit):
        rows = [(examples[i].input_ids, examples[i].assistant_mask) for i in batch]
        ids, seen, learnt = _padded(rows, chat.pad_token_id, model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=seen).logits
            # The first token follows nothing.
            losses = marked_losses(logits[:, :-1], ids[:, 1:], learnt[:, 1:])
        for index, loss in zip(batch, losses, strict=True):
            losses_of[index] = loss
    return losses_of


def _batches(
    rows: Sequence[int], examples: Sequence[Example], share_limit: int | None
) -> Iterator[list[int]]:
    """Rows of similar length together, at most this many tokens at a time."""
    batch: list[int] = []

    def longer(row: int) -> bool:
        return share_limit is not None and len(examples[row].input_ids) > share_limit

    for row in sorted(rows, key=lambda i: len(examples[i].input_ids)):
        # Sorted: this row is the longest so far, and the others are padded to it.
        wide = (len(batch) + 1) * len(examples[row].input_ids) > TOKENS_PER_PASS
        if batch and (wide or longer(batch[-1]) != longer(row)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids padded on the right, what of them is there (1), and what of them is marked (bool).

    Each row is its ids and, as long, which of them are marked.
    """
    shape = len(rows), max(len(ids) for ids, _ in rows)
    padded = torch.full(shape, pad)
    seen = torch.zeros(shape, dtype=torch.long)
    marked = torch.zeros(shape, dtype=torch.bool)
    for number, (ids, mask) in enumerate(rows):
        padded[number, : len(ids)] = torch.tensor(ids)
        seen[number, : len(ids)] = 1
        marked[number, : len(ids)] = torch.tensor(mask, dtype=torch.bool)
    return padded.to(device), seen.to(device), marked.to(device)


def marked_losses(
    logits: torch.Tensor, targets: torch.Tensor, marked: torch.Tensor
) -> list[AnswerLoss]:
    """The loss of each row's marked targets.

    `logits` has the shape (rows, positions, vocabulary), the others (rows, positions).
    """
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    # Only the marked positions are raised to float32: the rest is never looked at.
    losses[marked] = torch.nn.functional.cross_entropy(
        logits[marked].float(), targets[marked], reduction="none"
    ).double()
    sums, counts = losses.sum(dim=1).tolist(), marked.sum(dim=1).tolist()
    return [AnswerLoss(nll, int(count)) for nll, count in zip(sums, counts, strict=True)]


# What loaded weights answer greedily, and how probable they find the expected answers, at once.
# One pass reads a question together with its expected answer: it gives the loss and, as long as the
# model's own choice is the expected token, the answer itself. Only the rest is written token by
# token, many rows at a time. Exact: each token is the likeliest one after those before it.

# Rows that are done leave when they are this share of all: leaving copies the cache.
_LEAVE_AT = 0.25
# Each token copies the keys and values, a little longer: the heap fills with gaps.
_TRIM_TOKENS = 20


@dataclass(frozen=True)
class Asked:
    """A question; `expected` is empty where no answer is expected and none is measured."""

    prompt: Conversation
    expected: str = ""

    @property
    def whole(self) -> Conversation:
        """The question with its expected answer."""
        return [*self.prompt, {"role": "assistant", "content": self.expected}]


@dataclass
class _Row:
    """A question as token ids; `ids` are the prompt and, where it is one pass, what is expected."""

    index: int
    prompt: int
    ids: list[int]
    mask: list[int]
    limit: int
    alone: bool
    said: list[int] = field(default_factory=list)
    ended: bool = False

    @classmethod
    def of(
        cls, chat: ChatFormat, index: int, asked: Asked, limit: int, share_limit: int | None
    ) -> _Row | None:
        """A question that is to be answered; None where its prompt alone fills the context."""
        prompt = chat.encode_prompt(asked.prompt)
        room = chat.context_length - len(prompt)
        if room < 1:
            return None
        row = cls(index, len(prompt), prompt, [0] * len(prompt), min(limit, room), alone=False)
        example = chat.encode_example(asked.whole) if asked.expected else None
        longest = max(len(prompt) + row.limit, len(example.input_ids) if example else 0)
        row.alone = share_limit is not None and longest > share_limit
        if example is None or row.alone or len(example.input_ids) > chat.context_length:
            return row
        # An answer whose first token the tokenizer joins to its prompt cannot be read in the same
        # pass.
        if list(example.input_ids[: len(prompt)]) == list(prompt):
            row.ids, row.mask = list(example.input_ids), list(example.assistant_mask)
        return row

    @property
    def done(self) -> bool:
        return self.ended or len(self.said) >= self.limit

    def hear(self, token: int, stops: frozenset[int]) -> None:
        """Take the next token of the answer."""
        self.said.append(token)
        self.ended = token in stops


def examine(
    model: PreTrainedModel,
    chat: ChatFormat,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int,
    at_once: int,
    share_limit: int | None = None,
    step: Callable[[int], None] = lambda _count: None,
) -> list[Answered]:
    """The answer of at most `max_new_tokens` tokens to each question, and its expected one's loss.

    `said` is None where a prompt alone fills the context, `loss` where question and expected answer
    do not fit into it. `share_limit`: rows that may grow longer run alone (see engines/tokens.py).
    """
    losses: list[AnswerLoss | None] = [None] * len(asked)
    rows = []
    for index, question in enumerate(asked):
        row = _Row.of(chat, index, question, max_new_tokens, share_limit)
        if row is None:
            step(1)
        else:
            rows.append(row)
    together = {row.index for row in rows if len(row.ids) > row.prompt}
    apart = [i for i, question in enumerate(asked) if question.expected and i not in together]
    apart_losses = answer_losses(
        model, chat, [asked[i].whole for i in apart], share_limit=share_limit
    )
    for index, loss in zip(apart, apart_losses, strict=True):
        losses[index] = loss
    writer = _Writer(model, chat, losses, share_limit)
    # Like lengths together: less padding, and a batch of questions of one form ends together.
    waiting = deque(sorted(rows, key=lambda row: (row.alone, len(row.ids))))
    for turn in count():
        if not (waiting or writer.rows):
            break
        while waiting and (batch := _next_batch(waiting, len(writer.rows), at_once)):
            writer.read(batch)
        step(writer.write())
        if turn % _TRIM_TOKENS == 0:
            trim()
    said: list[Said | None] = [None] * len(asked)
    for row in rows:
        text = chat.decode(row.said[:-1] if row.ended else row.said)
        said[row.index] = Said(text, cut=not row.ended)
    return [Answered(*pair) for pair in zip(said, losses, strict=True)]


def _next_batch(waiting: deque[_Row], running: int, at_once: int) -> list[_Row]:
    """The rows to read now: none while most slots are in use, or while one row runs alone."""
    if running > at_once // 2 or (running and waiting[0].alone):
        return []
    batch: list[_Row] = []
    while waiting and running + len(batch) < at_once:
        row = waiting[0]
        # Sorted: this row is the longest so far, and the others are padded to it.
        wide = (len(batch) + 1) * len(row.ids) > TOKENS_PER_PASS
        if batch and (wide or row.alone):
            break
        batch.append(waiting.popleft())
        if row.alone:
            break
    return batch


class _Writer:
    """The rows being answered: their keys and values, padded on the left, and their next tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        losses: list[AnswerLoss | None],
        share_limit: int | None,
    ) -> None:
        self.rows: list[_Row] = []
        self._share_limit = share_limit
        self._model = model
        self._device = model.device
        self._stops = frozenset(chat.stop_token_ids)
        self._pad = chat.pad_token_id
        self._losses = losses
        self._done_at_once = 0
        self._cache: Any = None  # none while no row is being answered
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def read(self, rows: Sequence[_Row]) -> None:
        """Read new rows, prompts and expected answers together; they join those being answered."""
        ids, seen, marked = _padded([(row.ids, row.mask) for row in rows], self._pad, self._device)
        # Logits are the widest thing here: only from the first position that is looked at.
        first = min(min(row.prompt, (*row.mask, 1).index(1)) for row in rows) - 1
        cache = DynamicCache()
        logits = self._model(
            input_ids=ids,
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=ids.shape[1] - first,
        ).logits
        losses = marked_losses(logits[:, :-1], ids[:, first + 1 :], marked[:, first + 1 :])
        chosen = logits.argmax(dim=-1).tolist()
        for row, loss, tokens in zip(rows, losses, chosen, strict=True):
            if any(row.mask):
                self._losses[row.index] = loss
            # The model's choices hold as long as what was read before them is its own answer.
            expected = row.ids[row.prompt :]
            choices = tokens[row.prompt - 1 - first :][: len(expected) + 1]
            for place, token in enumerate(choices):
                row.hear(token, self._stops)
                if row.done or place == len(expected) or token != expected[place]:
                    break
        self._join(rows, cache)

    def _join(self, rows: Sequence[_Row], cache: DynamicCache) -> None:
        """Add the rows that are not done, moved to the right end of what is kept of them."""
        open_rows = [number for number, row in enumerate(rows) if not row.done]
        self._done_at_once += len(rows) - len(open_rows)
        if not open_rows:
            return
        # The last token heard has not been read yet.
        sizes = [rows[n].prompt + len(rows[n].said) - 1 for n in open_rows]
        width = max(*sizes, self._mask.shape[1])
        columns = torch.arange(width, device=self._device)
        starts = width - torch.tensor(sizes, device=self._device)[:, None]
        mask = (columns >= starts).long()
        places = (columns - starts).clamp(min=0)
        chosen = torch.tensor(open_rows, device=self._device)
        old_mask = pad_left(self._mask, 1, width)
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values"):
                states = getattr(layer, name)[chosen]
                index = places[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                states = states.gather(2, index)
                if self.rows:
                    mine = getattr(self._cache.layers[number], name)
                    states = torch.cat([pad_left(mine, 2, width), states])
                setattr(layer, name, states)
        self._cache = cache
        self._mask = torch.cat([old_mask, mask]) if self.rows else mask
        self.rows += [rows[number] for number in open_rows]

    @torch.inference_mode()
    def write(self) -> int:
        """One more token of every row; how many answers are done since the last call."""
        done, self._done_at_once = self._done_at_once, 0
        if not self.rows:
            return done
        # A finished row waits until others finish, and generates tokens that are discarded.
        tokens = torch.tensor([[row.said[-1]] for row in self.rows], device=self._device)
        if self._mask.shape[1] == self._share_limit and self.rows[0].alone:
            # The next token is rotated by the other factors, and so must all before it be.
            row = self.rows[0]
            whole = [*row.ids[: row.prompt], *row.said]
            tokens = torch.tensor([whole], device=self._device)
            self._cache, self._mask = DynamicCache(), self._mask[:, :0]
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], dim=1)
        logits = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(dim=1) - 1)[:, -tokens.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        for row, token in zip(self.rows, logits[:, -1].argmax(dim=-1).tolist(), strict=True):
            if not row.done:
                row.hear(token, self._stops)
                done += row.done
        # Rows that are done leave together: each time the whole cache is copied.
        unfinished = [number for number, row in enumerate(self.rows) if not row.done]
        if len(self.rows) - len(unfinished) >= _LEAVE_AT * len(self.rows):
            self.rows = [self.rows[number] for number in unfinished]
            if unfinished:
                self._mask = kept_rows(self._mask, self._cache, unfinished)
            else:
                self._cache, self._mask = None, self._mask[:0, :0]
        return done


# Asks many questions: a served engine over HTTP, or loaded weights directly.
# Over HTTP the client and the server application are those that chat with users, on a loopback port
# of this process. Both give the same answers where the number types are the same. Writes nothing.

# The longest that the endpoint gives one request; questions never wait, there is a slot for each.
_REQUEST_TIMEOUT_MS = 180_000


def ask_served(
    engine: Engine,
    chat: ChatFormat,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    at_once: int,
    step: Callable[[int], None] = lambda _count: None,
) -> list[Said | None]:
    """The greedy answer to each prompt; None where a prompt alone fills the model's context.

    `chat` is the format of the engine's model. The engine is closed afterwards. Raises StageError
    when the endpoint fails.
    """

    def ask(prompt: Conversation) -> Said | None:
        if len(chat.encode_prompt(prompt)) >= chat.context_length:
            return None
        reply = client.chat(prompt, temperature=0.0, max_new_tokens=max_new_tokens)
        return Said(reply.text, reply.finish_reason == "length")

    replies = []
    with (
        _endpoint(engine, at_once) as (url, key),
        # No retries: a slot is free for each question, so an error is one.
        Phi3Client(url, key, max_retries=0) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):
        try:
            for said in pool.map(ask, prompts):
                replies.append(said)
                step(1)
        except EndpointTimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise StageError(
                "The model did not answer in time. Lower evaluate.max_new_tokens or "
                "evaluate.per_device_eval_batch_size, or evaluate fewer rows: evaluate.max_rows"
            ) from None
        except Phi3Error as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise StageError(f"The model could not be queried: {error}") from None
    return replies


def ask_all(
    model: PreTrainedModel,
    folder: Path,
    chat: ChatFormat,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    at_once: int,
    step: Callable[[int], None] = lambda _count: None,
) -> list[Said | None]:
    """The same of loaded weights, without a server. `folder` is where `model` was loaded from."""
    answered = examine(
        model,
        chat,
        [Asked(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        at_once=at_once,
        share_limit=share_limit(folder),
        step=step,
    )
    return [answer.said for answer in answered]


@contextmanager
def _endpoint(engine: Engine, at_once: int) -> Iterator[tuple[str, str]]:
    """The endpoint's URL and key while it is served from a thread on a free loopback port."""
    key = secrets.token_urlsafe(32)
    config = ServerConfig(
        max_concurrent_requests_per_instance=at_once, request_timeout_ms=_REQUEST_TIMEOUT_MS
    )
    listener = bind("127.0.0.1", 0)  # bound before the thread starts: the port is known and ours
    server = server_of(create_app(engine, config, key=key), config, drain_seconds=1)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="phi3-evaluate", daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions", key
    finally:
        server.should_exit = True
        thread.join()
        asyncio.run(engine.close())
        listener.close()


Step = Callable[[int], None]


def is_quantised(precision: str) -> TypeGuard[Literal["int4", "int8"]]:
    """Whether the endpoint's conversion answers otherwise than the weights."""
    return precision in ("int4", "int8")


@dataclass(frozen=True)
class Judge:
    """Examines a model folder in the number type of the endpoint."""

    recipe: Recipe
    run: Run
    engine: str
    precision: str
    reason: str

    @property
    def sentence(self) -> str:
        """The choice and its reason, for people."""
        return f"answered by {self.engine} in {self.precision}: {self.reason}"

    def as_dict(self) -> dict[str, str]:
        """For the manifest."""
        return {"engine": self.engine, "precision": self.precision, "reason": self.reason}

    def base_key(self, asked: Sequence[Asked]) -> str | None:
        """What the base model's answers depend on; None where its weights have no id."""
        base_id = self.run.require(BaseManifest).done_id
        if base_id is None:
            return None
        limit = self.recipe.evaluate.max_new_tokens
        prompts = [question.whole for question in asked]
        return fingerprint([base_id, self.engine, self.precision, limit, prompts])

    def examine(self, folder: Path, asked: Sequence[Asked], step: Step) -> list[Answered]:
        """The answers and losses of a model that is not to be served."""
        if not is_quantised(self.precision):
            return self._by_weights(folder, asked, step)
        with tempfile.TemporaryDirectory(dir=self.run.path, prefix=".onnx-base.") as scratch:
            onnx = Path(scratch) / "onnx"
            export_onnx(folder, onnx, self.precision)
            said = self._by_endpoint(onnx, asked, step)
        return self._with_losses(folder, asked, said)

    def examine_tuned(self, folder: Path, asked: Sequence[Asked], step: Step) -> list[Answered]:
        """The same for the run's model; a conversion is saved, and `deploy` serves it."""
        if not is_quantised(self.precision):
            return self._by_weights(folder, asked, step)
        onnx = converted(self.run, self.precision, no_progress)
        return self._with_losses(folder, asked, self._by_endpoint(onnx, asked, step))

    def _by_weights(self, folder: Path, asked: Sequence[Asked], step: Step) -> list[Answered]:
        settings = self.recipe.evaluate
        with self.loaded(folder) as model:
            return examine(
                model,
                chat_format(folder),
                asked,
                max_new_tokens=settings.max_new_tokens,
                at_once=settings.per_device_eval_batch_size,
                share_limit=share_limit(folder),
                step=step,
            )

    def _by_endpoint(self, onnx: Path, asked: Sequence[Asked], step: Step) -> list[Said | None]:
        from ..serve.engines import onnxruntime

        settings = self.recipe.evaluate
        at_once = settings.per_device_eval_batch_size
        engine = onnxruntime.load(onnx, slots=at_once, num_threads=self.recipe.finetune.num_threads)
        chat = chat_format(onnx)
        # Like lengths together, so that rows of one batch end together.
        order = sorted(range(len(asked)), key=lambda i: len(chat.encode_prompt(asked[i].prompt)))
        answers = ask_served(
            engine,
            chat,
            [asked[i].prompt for i in order],
            max_new_tokens=settings.max_new_tokens,
            at_once=at_once,
            step=step,
        )
        replies = dict(zip(order, answers, strict=True))
        return [replies[i] for i in range(len(asked))]

    def _with_losses(
        self, folder: Path, asked: Sequence[Asked], said: Sequence[Said | None]
    ) -> list[Answered]:
        """Losses are of the weights themselves: an engine gives tokens, not their probabilities."""
        known = [i for i, question in enumerate(asked) if question.expected]
        losses: list[AnswerLoss | None] = [None] * len(asked)
        with self.loaded(folder) as model:
            known_losses = answer_losses(
                model,
                chat_format(folder),
                [asked[i].whole for i in known],
                share_limit=share_limit(folder),
            )
        for index, loss in zip(known, known_losses, strict=True):
            losses[index] = loss
        return [Answered(*pair) for pair in zip(said, losses, strict=True)]

    @contextmanager
    def loaded(self, folder: Path) -> Iterator[PreTrainedModel]:
        """The weights of a model folder, on the device and in the number type of the answers."""
        runtime = choose_runtime(self.recipe, count_weights(folder))
        # On a CPU the endpoint computes in float32, whatever the training did.
        dtype = torch.float32 if runtime.device == "cpu" else runtime.torch_dtype
        with torch_threads(runtime.threads):
            model = load_model(folder, dtype, self.recipe.model.attn_implementation)
            yield model.to(runtime.device).eval()


def choose_judge(recipe: Recipe, run: Run) -> Judge:
    """The evaluation engine for a recipe, on this machine."""
    served, _ = choose_engine(recipe.serve.engine, adapters=recipe.serve.adapters)
    # int8 gives another token than fp32 at every tenth place (docs/export.md), int4 at every third.
    if served == "onnxruntime" and is_quantised(recipe.serve.precision):
        return Judge(recipe, run, "onnxruntime", recipe.serve.precision, "as it will be served")
    runtime = choose_runtime(recipe, 0)
    if runtime.device != "cpu":
        return Judge(recipe, run, "transformers", runtime.dtype, f"on this {runtime.device}")
    same = "the same tokens as the fp32 conversion that is served"
    reason = same if served == "onnxruntime" else "as it will be served"
    return Judge(recipe, run, "transformers", "fp32", reason)
