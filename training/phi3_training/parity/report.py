"""What the comparison found: for each place the first token that differs, in words and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

Ids = Sequence[int]


class Vocabulary:
    """Names the tokens of a model folder."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = self._tokenizer.get_added_tokens_decoder()
        self.controls = {i: token.content for i, token in added.items() if token.special}

    def text(self, token: int) -> str:
        """The token as the tokenizer spells it."""
        return str(self._tokenizer.id_to_token(token))

    def literals(self, most: int = 12) -> list[str]:
        """Texts that look like control tokens of this model."""
        phi3 = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>", "<s>"]
        return list(dict.fromkeys([*phi3, *self.controls.values()]))[:most]


@dataclass(frozen=True)
class Token:
    """A token in a report; None stands for the end of the prompt."""

    id: int
    text: str


@dataclass(frozen=True)
class Difference:
    """Where a place first writes another token than the trainer, or what else is wrong there."""

    case: str
    what: str
    position: int | None = None
    trained: Token | None = None
    written: Token | None = None

    def __str__(self) -> str:
        if self.position is None:
            return f"{self.case!r}: {self.what}"
        return (
            f"{self.case!r}, token {self.position}: trained {_shown(self.trained)}, "
            f"here {_shown(self.written)}; {self.what}"
        )


@dataclass
class Place:
    """One place that writes prompts: what was compared there, or why it was not."""

    name: str
    compared: int = 0
    skipped: str | None = None
    differences: list[Difference] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`same`, `differs` or `skipped`."""
        if self.skipped is not None:
            return "skipped"
        return "differs" if self.differences else "same"


@dataclass
class Report:
    """All places, in the order in which they were looked at."""

    cases: int
    places: list[Place] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not any(place.differences for place in self.places)

    def as_dict(self) -> dict[str, Any]:
        """For `-o json`."""
        places = [{**asdict(place), "status": place.status} for place in self.places]
        return {"ok": self.ok, "cases": self.cases, "places": places}

    def lines(self) -> list[str]:
        """For a terminal: a line per place, the first differences below it."""
        found = []
        for place in self.places:
            if place.skipped is not None:
                found.append(f"skipped  {place.name}: {place.skipped}")
                continue
            found.append(f"{place.status:<8} {place.name} ({place.compared} comparisons)")
            found += [f"           {difference}" for difference in place.differences[:3]]
            if len(place.differences) > 3:
                found.append(f"           … and {len(place.differences) - 3} more")
        return found


def first_difference(
    case: str, trained: Ids, written: Ids, names: Vocabulary, what: str
) -> Difference | None:
    """Where two prompts first differ; positions count from 0."""
    if list(trained) == list(written):
        return None
    pairs = enumerate(zip(trained, written, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(trained), len(written)))
    return Difference(case, what, at, _token(trained, at, names), _token(written, at, names))


def _token(ids: Ids, at: int, names: Vocabulary) -> Token | None:
    return Token(ids[at], names.text(ids[at])) if at < len(ids) else None


def _shown(token: Token | None) -> str:
    return "ends" if token is None else f"{token.id} {token.text!r}"
