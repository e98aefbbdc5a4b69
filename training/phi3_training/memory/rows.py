"""How long the rows of a recipe are: counted if the chats and a tokenizer are available.

Reads run/data/*.jsonl once the chats are prepared, before that the recipe's own files, and a
tokenizer of this machine. Never the network; writes nothing that stays.
"""

from __future__ import annotations

import heapq
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from ..data.prepare import PARTS, chosen_sources
from ..data.scan import Table, scan_start
from ..data.sources import fingerprints, place_of
from ..evaluate.questions import extra_files
from ..manifests import BaseManifest, DatasetManifest
from ..models.small import prepared_folder
from ..prompt import ChatFormat
from ..recipe import HubSet, Recipe
from ..run import Run
from .model import cached_file

# This many of the largest rows of a part are counted, which takes a tenth of a second.
_COUNTED = 300
# Of files that are not prepared yet only this many rows are read, in blocks of 8 MB: 1 to 2 s
# for long chats.
_READ = 2000
# Bytes of a JSON line to a token where there is no tokenizer: English has 4, other European
# languages and code 3; the line's own braces and names make up for what a template adds.
_BYTES_PER_TOKEN = 3.0

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class RowSizes:
    """How long rows are, in tokens, before data.max_length and the model's context limit them.

    `how` ends the sentence "rows of up to … tokens, …".
    """

    longest: int  # row to train on
    learnt: int  # most tokens of one such row that are learnt
    share: float  # the highest share of a row that is learnt
    prompt: int  # longest question of the evaluation, all before it included
    scored: int  # longest conversation of the evaluation
    how: str
    rows: int | None = None  # to train on, casual copies included; None: unknown
    total: int | None = None  # tokens of all of them; None: unknown
    is_known: bool = True  # else the worst case


@dataclass(frozen=True)
class _Part:
    """The largest rows of a part, with their sizes in bytes; `rest`: the largest one left out."""

    largest: Sequence[tuple[int, Messages]]
    rest: int
    rows: int
    size: int  # bytes of all rows


@dataclass(frozen=True)
class _Tokens:
    """What is counted of one conversation."""

    row: int
    learnt: int
    prompt: int


def worst_case(recipe: Recipe, why: str = "their lengths are not known yet") -> RowSizes:
    """Rows as long as data.max_length lets them be, learnt whole."""
    most = recipe.data.max_length
    how = f"the worst case that data.max_length={most} allows: {why}"
    return RowSizes(most, most, 1.0, most, most, how, is_known=False)


def row_sizes(recipe: Recipe, run: Run) -> RowSizes:
    """The lengths of the recipe's rows, counted or estimated; the worst case where neither can be.

    Chats that have faults are no reason to fail here: `prepare` reports them all.
    """
    parts, place = _prepared(recipe, run), "the prepared chats"
    if parts is None:
        data = recipe.data
        hub = [s for s in (*data.train, *data.replay, *data.validation) if isinstance(s, HubSet)]
        if hub:
            return worst_case(recipe, f"{hub[0]} is read when the chats are prepared")
        parts, place = _unprepared(recipe)
    if not any(part.rows for part in parts.values()):
        return worst_case(recipe, "no chats could be read")
    folder = tokenizer_folder(recipe, run)
    if folder is not None:
        try:
            chat = ChatFormat.from_folder(folder)
        except ValueError:
            folder = None
    if folder is None:
        name = recipe.model.name_or_path
        how = f"estimated from the bytes of {place}: the tokenizer of {name} is not here yet"

        def guess(size: int, _row: Messages) -> _Tokens:
            tokens = math.ceil(size / _BYTES_PER_TOKEN)
            return _Tokens(tokens, tokens, tokens)

        return _combined(recipe, parts, guess, how)
    return _combined(recipe, parts, lambda _size, row: _count(chat, row), f"counted in {place}")


def tokenizer_folder(recipe: Recipe, run: Run | None) -> Path | None:
    """The folder of the base model's tokenizer; None while it is not on this machine."""
    base = run.read(BaseManifest) if run is not None else None
    named = recipe.model.name_or_path
    if run is not None and base is not None:
        # An earlier recipe of that run may have had another base.
        was = base.settings.get("name_or_path")
        if was == named or (was is None and recipe.model.is_tiny):
            return _with_tokenizer(run.path / base.path)
    folder = prepared_folder() if recipe.model.is_small else Path(named).expanduser()
    if folder is not None and folder.is_dir():
        return _with_tokenizer(folder)
    cached = cached_file(recipe.model, "tokenizer.json")
    return None if cached is None else cached.parent


def _with_tokenizer(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer.json").is_file() else None


def _prepared(recipe: Recipe, run: Run) -> dict[str, _Part] | None:
    """The run's prepared chats, if they were made of what the recipe names now."""
    manifest = run.read(DatasetManifest)
    if manifest is None:
        return None
    try:
        chosen = chosen_sources({part: getattr(recipe.data, part) for part in PARTS}).sources
        for part in PARTS:
            known = [file.sha256 for file in manifest.inputs.get(part, ())]
            sources = [source for taken, source in chosen if taken == part]
            is_hub = any(isinstance(source, HubSet) for source in sources)  # has no hash
            if not is_hub and known != fingerprints(sources):
                return None
        outputs = manifest.outputs.items()
        return {name: _of_lines(run.path / file.path) for name, file in outputs}
    except OSError:
        return None


def _of_lines(path: Path) -> _Part:
    """A prepared file: lines are compared by their bytes, and only the largest are read as JSON."""
    rows = count()
    with path.open("rb") as stream:
        numbered = ((len(line), next(rows), line) for line in stream)
        lines = heapq.nlargest(_COUNTED + 1, numbered)
    rest = lines[_COUNTED][0] if len(lines) > _COUNTED else 0
    largest = [(size, json.loads(line)["messages"]) for size, _row, line in lines[:_COUNTED]]
    return _Part(largest, rest, next(rows), path.stat().st_size)


def _unprepared(recipe: Recipe) -> tuple[dict[str, _Part], str]:
    """The beginnings of the recipe's own files; held-out rows are still among those of train."""
    sources, *_ = chosen_sources({part: getattr(recipe.data, part) for part in PARTS})
    read: dict[str, list[_Part]] = {}
    is_cut = False
    with tempfile.TemporaryDirectory() as folder:
        for number, (part, source) in enumerate(sources):
            inner = Path(folder) / str(number)
            inner.mkdir()
            table = Table([scan_start(source, inner, _READ)])
            is_cut |= len(table) >= _READ
            order = np.argsort(-table.text_size.astype(np.int64), kind="stable")
            largest = []
            for row in order[:_COUNTED].tolist():
                turns = [message.to_dict() for message in table.conversation(row).messages]
                # A row's line has about 40 bytes per message besides its text, 80 in all at least.
                largest.append((int(table.text_size[row]) + 40 * len(turns), turns))
            rest = int(table.text_size[order[_COUNTED]]) + 80 if len(order) > _COUNTED else 0
            size = int(table.text_size.sum()) + 80 * len(table)
            read.setdefault(part, []).append(_Part(largest, rest, len(table), size))
    names = [place_of(source).name for _part, source in sources]
    place = names[0] if len(names) == 1 else f"{len(names)} files"
    start = f"the first {_READ:,} rows of " if is_cut else ""
    return {
        name: _Part(
            largest=[row for part in parts for row in part.largest],
            rest=max(part.rest for part in parts),
            rows=sum(part.rows for part in parts),
            size=sum(part.size for part in parts),
        )
        for name, parts in read.items()
    }, start + place


def _combined(
    recipe: Recipe,
    parts: dict[str, _Part],
    tokens_of: Callable[[int, Messages], _Tokens | None],
    how: str,
) -> RowSizes:
    """The lengths of what is trained on, and of what is evaluated."""
    data = {name: _lengths(part, tokens_of) for name, part in parts.items()}
    watched = ("validation",) if recipe.finetune.eval_steps else ()
    trained = [data[name] for name in ("train", "replay", *watched) if name in data]
    asked = [most.prompt for most, _share, _mean in data.values()]
    for _name, path in extra_files(recipe.evaluate):
        with suppress(OSError, ValueError, KeyError, TypeError):  # the evaluation reports it
            asked.append(_lengths(_of_lines(path), tokens_of)[0].prompt)
    # The most: a copy that equals another row is left out.
    copies = (2 if recipe.data.casual_copies else 1) * (1 + recipe.data.rewordings)
    times = {"train": copies, "replay": 1}
    learning = [(parts[n], data[n][2], times[n]) for n in times if n in parts]
    return RowSizes(
        longest=max(most.row for most, _share, _mean in trained),
        learnt=max(most.learnt for most, _share, _mean in trained),
        share=max(share for _most, share, _mean in data.values()),
        prompt=max(asked),
        scored=max(most.row for most, _share, _mean in data.values()),
        how=how,
        rows=sum(part.rows * n for part, _mean, n in learning),
        total=sum(math.ceil(part.size * mean * n) for part, mean, n in learning),
    )


def _lengths(
    part: _Part, tokens_of: Callable[[int, Messages], _Tokens | None]
) -> tuple[_Tokens, float, float]:
    """The most of a part, its highest learnt share, and tokens for a byte.

    Rows that were not counted are smaller than those that were, but may be written in smaller
    tokens: they are taken to be as dense as the densest one that was counted.
    """
    counted = [(size, tokens_of(size, row)) for size, row in part.largest]
    sound = [(size, tokens) for size, tokens in counted if tokens is not None]
    if not sound:
        return _Tokens(0, 0, 0), 0.0, 0.0

    def most(values: Sequence[int]) -> int:
        dense = max(n / size for (size, _), n in zip(sound, values, strict=True))
        return max(*values, math.ceil(dense * part.rest))

    share = max(tokens.learnt / max(1, tokens.row) for _size, tokens in sound)
    mean = sum(tokens.row for _, tokens in sound) / sum(size for size, _ in sound)
    longest = _Tokens(
        most([tokens.row for _, tokens in sound]),
        most([tokens.learnt for _, tokens in sound]),
        most([tokens.prompt for _, tokens in sound]),
    )
    return longest, share, mean


def _count(chat: ChatFormat, messages: Messages) -> _Tokens | None:
    """A conversation's tokens; None for one that cannot be written as tokens (training says why).

    A question without an answer, as in the evaluation's own files, has no trained tokens.
    """
    try:
        if messages[-1]["role"] == "user":
            asked = len(chat.encode_prompt(messages))
            return _Tokens(asked, 0, asked)
        example = chat.encode_example(messages)
    except (ValueError, IndexError):
        return None
    mask = example.assistant_mask
    answer = max((i for i, n in enumerate(mask) if n and not (i and mask[i - 1])), default=0)
    return _Tokens(len(mask), sum(mask), answer)
