"""The parts of `prompt.py`: template rendering, the guard against forged roles, streaming text.

Reads what `ChatFormat` hands over; writes nothing.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

# Marks of a sentence's start and end, which some tokenizers (Phi-3's too) do not call special.
_CLASSIC_CONTROLS = frozenset({"<s>", "</s>"})
# Private-use characters that frame our own marks, together with a random number per process.
_SEAL = ("\U0010fffa", "\U0010fffb")
_ESCAPE = ("\U0010fffc", "\U0010fffd")
_BROKEN_CHARACTER = "\ufffd"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def token_text(value: object) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string or an object."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what is learnt; for rendering it is the text inside it."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - jinja declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A tokenizer's jinja chat template, rendered in a sandbox as transformers renders it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"The model's chat template is not valid: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as text; ValueError when the template refuses it."""
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The model's chat template refuses the conversation: {error}"
            ) from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


class Guard:
    """A tokenizer whose control tokens answer to secret names, so that no message can write them.

    `escape` hides control texts in a message before the template runs, `seal` gives the ones
    that the template wrote their secret names and brings the hidden ones back as plain text.
    Ids equal those of the original tokenizer on the whole rendered text.
    """

    def __init__(self, tokenizer_json: str, special_texts: Collection[str]) -> None:
        content = json.loads(tokenizer_json)
        nonce = secrets.token_hex(8)
        self._seals: dict[str, str] = {}
        self._controls: dict[str, int] = {}
        original: dict[str, int] = {}
        for number, token in enumerate(content.get("added_tokens", [])):
            text = token["content"]
            if token.get("special") or text in special_texts or text in _CLASSIC_CONTROLS:
                self._controls[text] = token["id"]
                token["content"] = self._seals[text] = f"{_SEAL[0]}{nonce}{number}{_SEAL[1]}"
            original[token["content"]] = token["id"]
        self._tokenizer = Tokenizer.from_str(json.dumps(content))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._original_ids = {self._tokenizer.token_to_id(k): v for k, v in original.items()}
        sealed = self._seals.values()
        self._sealed_ids = {self._tokenizer.token_to_id(text) for text in sealed}
        self._control_ids = frozenset(self._controls.values())
        self._forgeable = self._control_ids - {_unknown_id(content)}
        names = sorted(self._controls, key=len, reverse=True)
        self._names = names
        # A pattern that matches nothing, for a tokenizer without control tokens.
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._escape_form = f"{_ESCAPE[0]}{nonce}{{}}{_ESCAPE[1]}"
        self._escaped = re.compile(f"{_ESCAPE[0]}{nonce}(\\d+){_ESCAPE[1]}")

    def control_id(self, text: str | None) -> int | None:
        """The id of a control token, or None when the tokenizer has none of that name."""
        return None if text is None else self._controls.get(text)

    def is_control(self, token: int) -> bool:
        """Whether an id is a control token's."""
        return token in self._control_ids

    def escape(self, content: str) -> str:
        """A message's text with control texts hidden."""
        return self._control.sub(
            lambda match: self._escape_form.format(self._names.index(match[0])), content
        )

    def seal(self, rendered: str) -> str:
        """The rendered text, ready for `encode`."""
        sealed = self._control.sub(lambda match: self._seals[match[0]], rendered)
        return self._escaped.sub(lambda match: self._names[int(match[1])], sealed)

    def encode(self, sealed: str) -> tuple[list[int], list[int], list[bool]]:
        """The ids, where each token starts in `sealed`, and whether it is a control token."""
        encoding = self._tokenizer.encode(sealed, add_special_tokens=False)
        control = [token in self._sealed_ids for token in encoding.ids]
        ids = [self._original_ids.get(token, token) for token in encoding.ids]
        if any(i in self._forgeable and not c for i, c in zip(ids, control, strict=True)):
            raise ValueError(
                "A message holds a control token of the model as text, and this tokenizer "
                "cannot write it as plain text; remove texts such as <|end|> from the message."
            )
        return ids, [start for start, _ in encoding.offsets], control


def _unknown_id(content: Mapping[str, Any]) -> int | None:
    """The id that stands for unknown characters: a message may hold those."""
    model = content.get("model", {})
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    vocabulary = model.get("vocab")
    found = vocabulary.get(model.get("unk_token")) if isinstance(vocabulary, dict) else None
    return found if isinstance(found, int) else None


class StreamDecoder:
    """Turns ids into text one at a time: never half a character, spaces as in one decoding."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # The window: ids already given out (for the spaces between them), then new ones.
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_BROKEN_CHARACTER):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return text

    def flush(self) -> str:
        """What is left when no more ids come."""
        text = self._new_text()
        self._ids, self._given = [], 0
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[: self._given])
        return self._decode(self._ids)[len(before) :]
