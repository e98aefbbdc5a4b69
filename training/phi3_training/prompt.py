"""Conversation to token ids and back: the one home of it for training, evaluation and serving.

Reads a model folder's tokenizer.json, tokenizer_config.json, chat_template.jinja,
generation_config.json and config.json. Needs `tokenizers` and `jinja2` only.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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
        # What transformers gives templates (utils/chat_template_utils.py): jinja's own `tojson`
        # escapes HTML, which would train the model on `\u003c`.
        environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None: json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent
        )

        def raise_exception(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda layout: (
            datetime.now().astimezone().strftime(layout)
        )
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


class Guard:
    """A tokenizer whose control tokens answer to secret names, so that no message can write them.

    `escape` hides control texts in a message before the template runs, `seal` gives the ones
    that the template wrote their secret names and brings the hidden ones back as plain text.
    Ids equal those of the original tokenizer on the whole rendered text.
    """

    def __init__(self, tokenizer_json: str, special_texts: Collection[str]) -> None:
        content = json.loads(tokenizer_json)
        # Random, because a message could otherwise spell a secret name and forge the token again.
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
        # The id for unknown characters is no control token: an ordinary message may contain it.
        # BPE files name its text (unk_token), Unigram files its id (unk_id).
        model = content.get("model", {})
        unknown = model.get("unk_id")
        if not isinstance(unknown, int):
            vocabulary = model.get("vocab")
            named = isinstance(vocabulary, dict)
            unknown = vocabulary.get(model.get("unk_token")) if named else None
        self._forgeable = self._control_ids - {unknown}
        # Longest first: in an alternation "<|end|>" must not match the head of a longer name.
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
                "A message contains a control token of the model as text, and this tokenizer "
                "cannot encode it as plain text; remove texts such as <|end|> from the message."
            )
        return ids, [start for start, _ in encoding.offsets], control


class StreamDecoder:
    """Turns ids into text one at a time: never half a character, spaces as in one decoding."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # The window: ids already given out (for the spaces between them), then new ones.
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        # A character outside ASCII may be several byte tokens; half of it decodes to U+FFFD.
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


Message = Mapping[str, Any]

# End-of-turn marks that are stop tokens wherever a tokenizer has them.
_KNOWN_STOPS = ("<|end|>", "<|endoftext|>")
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True)
class Example:
    """A conversation to train on: 1 in the mask where the model must learn to say the token."""

    input_ids: list[int]
    assistant_mask: list[int]


@dataclass(frozen=True)
class _FolderSettings:
    """What the JSON files of a model folder say of its tokens."""

    special_texts: set[str]
    eos_ids: list[int]
    eos_text: str | None
    pad_text: str | None
    pad_id: int | None
    context_length: int

    @classmethod
    def of(cls, model_dir: Path, config: Mapping[str, Any]) -> _FolderSettings:
        """Read config.json and generation_config.json; `config` is tokenizer_config.json."""
        model = read_json(model_dir / "config.json")
        generation = read_json(model_dir / "generation_config.json")
        eos_ids: list[int] = []
        for value in (generation.get("eos_token_id"), model.get("eos_token_id")):
            eos_ids += (
                value if isinstance(value, list) else [value] if isinstance(value, int) else []
            )
        pads = (generation.get("pad_token_id"), model.get("pad_token_id"))
        lengths = (model.get("max_position_embeddings"), config.get("model_max_length"))
        special = _special_tokens(config)
        return cls(
            special_texts=set(special.values()),
            eos_ids=eos_ids,
            eos_text=special.get("eos_token"),
            pad_text=special.get("pad_token"),
            pad_id=next((pad for pad in pads if isinstance(pad, int)), None),
            # transformers writes 1e30 where a tokenizer has no limit.
            context_length=next((n for n in lengths if isinstance(n, int) and n < 1e9), 2048),
        )


class ChatFormat:
    """How one model folder writes a conversation as tokens.

    Text that looks like a control token ("<|end|>") inside a message is encoded as plain text:
    a message can neither forge a role nor end a turn.
    """

    def __init__(
        self, tokenizer_json: str, template: ChatTemplate, settings: _FolderSettings
    ) -> None:
        self._template = template
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._guard = Guard(tokenizer_json, settings.special_texts)
        self.context_length = settings.context_length
        # A model that does not know all of its stop tokens never stops, and folders forget some:
        # the config's, the ones known by name, and the one that ends an answer in the template.
        known = {self._guard.control_id(text) for text in _KNOWN_STOPS}
        example = self.encode_example(_PROBE)
        learnt = zip(example.input_ids, example.assistant_mask, strict=True)
        ends = (i for i, trained in learnt if trained and self._guard.is_control(i))
        stops = {*settings.eos_ids, *known, next(ends, None)}
        stops.add(self._guard.control_id(settings.eos_text))
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(i for i in stops if i is not None))
        pad = self._guard.control_id(settings.pad_text)
        self.pad_token_id: int = next(
            i for i in (pad, settings.pad_id, self.stop_token_ids[0]) if i is not None
        )

    @classmethod
    def from_folder(cls, model_dir: Path) -> ChatFormat:
        """Read the format of a model folder.

        Raises ValueError when the folder has no tokenizer.json or no chat template.
        """
        try:
            tokenizer_json = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
        except OSError:
            raise ValueError(
                f"{model_dir} has no tokenizer.json; expected a Hugging Face model folder with a "
                "fast tokenizer (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes "
                "one)"
            ) from None
        config = read_json(model_dir / "tokenizer_config.json")
        # transformers writes a file of its own today; in older folders it is in the config.
        file = model_dir / "chat_template.jinja"
        source = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            raise ValueError(
                f"{model_dir} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); expected an instruct model, such as "
                "microsoft/Phi-3-mini-4k-instruct"
            )
        template = ChatTemplate(str(source), _special_tokens(config))
        return cls(tokenizer_json, template, _FolderSettings.of(model_dir, config))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text, written by the tokenizer's own chat template."""
        checked = _checked(messages)
        return self._template.render(checked, add_generation_prompt=add_generation_prompt)

    def encode_prompt(self, messages: Sequence[Message], *, any_order: bool = False) -> list[int]:
        """The token ids after which the model writes its answer.

        Raises ValueError, in a plain sentence, for a conversation that does not end with a user
        message or whose roles are out of order. `any_order`: the roles may come in any order that
        the template takes, as chat clients send them; only an answer cannot be the last message.
        """
        checked = _checked(messages, None if any_order else "user", any_order=any_order)
        text = self._guarded_text(checked, add_generation_prompt=True)
        return self._guard.encode(text)[0]

    def encode_example(self, messages: Sequence[Message]) -> Example:
        """The token ids of a whole conversation and the mask of what is to be learnt.

        Learnt are each answer without `"weight": 0`, the token that ends its turn, and the end of
        text that the template writes after the last one.
        """
        checked = _checked(messages, last_role="assistant")
        text = self._guarded_text(checked, add_generation_prompt=False)
        ids, starts, control = self._guard.encode(text)
        mask = [0] * len(ids)
        last = len(checked) - 1
        # OpenAI's `weight`: an answer of weight 0 is context for the next ones.
        learnt = iter(m.get("weight", 1) != 0 for m in messages if m["role"] == "assistant")
        for position, message in enumerate(checked):
            if message["role"] == "assistant" and next(learnt):
                start, end = self._answer_span(text, checked[:position], message["content"])
                for index, at in enumerate(starts):
                    if start <= at < end and not control[index]:
                        mask[index] = 1
                    elif at >= end and control[index]:
                        mask[index] = 1  # the end of the turn
                        if position != last:
                            break  # what follows is the next message's
        return Example(ids, mask)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens leave no trace."""
        plain = [token for token in ids if not self._guard.is_control(token)]
        return str(self._tokenizer.decode(plain, skip_special_tokens=True))

    def control_id(self, text: str) -> int | None:
        """The id of a control token such as "<|end|>", or None if there is none of that name."""
        return self._guard.control_id(text)

    def is_control(self, token: int) -> bool:
        """Whether an id is a control token's, which no message can write."""
        return self._guard.is_control(token)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes ids one by one and gives whole characters back."""
        return StreamDecoder(self.decode)

    def _guarded_text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        safe = [{**m, "content": self._guard.escape(m["content"])} for m in messages]
        rendered = self._template.render(safe, add_generation_prompt=add_generation_prompt)
        text = self._guard.seal(rendered)
        # Some templates (early ones of Phi-3) drop a system prompt without a word.
        systems = [m["content"].strip() for m in messages if m["role"] == "system"]
        if any(system not in text for system in systems):
            raise ValueError(
                "The model's chat template has no place for a system prompt and would drop it; "
                "remove the system prompt or put it into the first user message."
            )
        return text

    def _answer_span(self, text: str, before: Sequence[Message], answer: str) -> tuple[int, int]:
        """Where an answer is in `text`: right after the prompt that serving would send."""
        # Templates strip an answer's ends (Phi-3's does not, Llama's does): both forms are tried.
        prompt = self._guarded_text(before, add_generation_prompt=True)
        if text.startswith(prompt):
            for form in (answer, answer.strip()):
                if text.startswith(form, len(prompt)):
                    return len(prompt), len(prompt) + len(form)
        raise ValueError(
            "The model's chat template renders a finished answer differently from the prompt "
            "before it, so a trained answer would not follow the served prompt; use the model's "
            "original chat template."
        )


def _checked(
    messages: Sequence[Message], last_role: str | None = None, *, any_order: bool = False
) -> list[dict[str, str]]:
    """The messages as role and content only, an empty system prompt left out."""
    checked = []
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"Message {number} has the role {role!r}; expected system, user or assistant."
            )
        if role == "system" and (content is None or not str(content).strip()):
            continue
        if type(content) is not str:
            raise ValueError(
                f"The content of message {number} is {type(content).__name__}; expected text."
            )
        checked.append({"role": role, "content": content})
    roles = [message["role"] for message in checked]
    if any_order:
        if "user" not in roles:
            raise ValueError("The conversation has no user message.")
        if roles[-1] == "assistant":
            raise ValueError("The last message has the role assistant; expected user.")
    else:
        turns = roles[1:] if roles and roles[0] == "system" else roles
        if not turns:
            raise ValueError("The conversation has no user message.")
        if "system" in turns:
            raise ValueError("A system message is allowed only at the start of a conversation.")
        for number, role in enumerate(turns):
            if role != ("user", "assistant")[number % 2]:
                raise ValueError(
                    "User and assistant messages must alternate, starting with the user; the roles "
                    f"are: {', '.join(roles)}."
                )
        if last_role is not None and turns[-1] != last_role:
            raise ValueError(f"The last message has the role {turns[-1]}; expected {last_role}.")
    return checked


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, … as chat templates know them."""
    named = {
        key: token_text(value) for key, value in config.items() if re.match(r"\w+_token$", key)
    }
    return {key: text for key, text in named.items() if text is not None}
