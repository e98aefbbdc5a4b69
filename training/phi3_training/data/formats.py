"""The chat formats that people have, detected by their keys and read as messages.

`messages` (OpenAI, TRL), ShareGPT, Alpaca, pairs of a question and an answer under many names,
preferences (`chosen`), Prompt flow's own rows, and text that a chat template has written already.
Nothing that carries meaning is dropped: it is used, or the row is refused. Every other key that is
not read is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import faults
from .conversation import (
    CARRIED,
    ROLES,
    Message,
    check_characters,
    check_order,
    check_text,
    wrong_type,
)
from .faults import Problem


class Row(NamedTuple):
    """A row as it was read; `messages` count only without problems.

    `unused` are the keys that were not read (`messages[].name` for one of messages), `notes` what
    was decided about the row.
    """

    form: str | None
    messages: tuple[Message, ...]
    problems: list[Problem]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


LIST_KEYS = ("messages", "conversations", "conversation", "contents")
_FORMS = {
    "messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt",
    "contents": "gemini",
}  # fmt: skip
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "parts")
# ShareGPT's names, Cohere's and LangChain's, OpenAI's newer name for a system message, Gemini's
# for an answer.
ROLE_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "chatbot": "assistant", "ai": "assistant", "developer": "system", "model": "assistant",
}  # fmt: skip
# OpenAI's (`tool`, `function`), LLaMA-Factory's (`function_call`, `observation`), Llama 3's
# (`ipython`), and what other exports call the same.
TOOL_ROLES = frozenset(
    ("tool", "function", "function_call", "function_response", "observation", "ipython",
     "tool_call", "tool_response")
)  # fmt: skip
# OpenAI's `weight`, axolotl's `train` and `training`, ms-swift's `loss`: is an answer learnt?
_WEIGHTS = ("weight", "train", "training", "loss")
_WEIGHT_WORDS = {  # a table or an export may have written them as text
    **dict.fromkeys(("0", "0.0", "false"), False), **dict.fromkeys(("1", "1.0", "true"), True),
}  # fmt: skip
_PARTS_OF_ANSWERS = "train_detail"  # axolotl's: spans of an answer, each learnt or not
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
# With a conversation these change what the model should say, and Phi-3's template has no place.
_REFUSED = ("tools", "functions", "documents", "images", "image", "audio", "videos")
_GEMINI_SYSTEMS = ("systeminstruction", "system_instruction")
_SYSTEMS = ("system", "system_prompt", "system_message", *_GEMINI_SYSTEMS)
# `input_text` and `output_text` are Vertex AI's names, `text_input` is Google AI Studio's.
_ASKS = (
    "prompt", "question", "query", "instruction", "input_data", "user", "input",
    "input_text", "text_input",
)  # fmt: skip
_ANSWERS = ("completion", "answer", "response", "output", "assistant", "output_text")
_NAMED_PAIRS = {
    ("instruction", "output"): "alpaca",
    ("instruction", "response"): "alpaca",
    ("input_data", "answer"): "prompt flow",
}
_HISTORIES = ("chat_history", "history")
_EMPTY: tuple[object, ...] = (None, "", [], {})
_FAILED = "(Failed)"  # what `pf run show-details` writes for a line without an output


def read_row(row: Mapping[str, object]) -> Row:
    """The row's format, its messages, every problem, and what was not read."""
    reader = _Reader(row)
    form, messages = reader.read()
    problems = reader.problems
    if form is not None and not problems:
        problems = check_order([message.role for message in messages])
        if not any(message.learn for message in messages if message.role == "assistant"):
            problems = problems or [faults.NOTHING_TO_LEARN()]
        elif not problems:
            # What follows the last answer that is learnt teaches nothing, and costs time.
            while not messages[-1].learn or messages[-1].role != "assistant":
                messages.pop()
                reader.notes.add("turns after the last answer that is learnt are left out")
    left = reader.row.keys() - reader.read_keys - set(CARRIED)
    unused = [str(key) for key in left if reader.row[key] not in _EMPTY]
    not_read = (*sorted(unused), *sorted(reader.unused))
    return Row(form, tuple(messages), problems, not_read, tuple(sorted(reader.notes)))


def carried(row: Mapping[str, object]) -> tuple[dict[str, object], list[Problem]]:
    """What goes along with a row (CARRIED), unless its format gives the key a meaning."""
    extra = {key: row[key] for key in CARRIED if row.get(key) is not None}
    lists = any(str(key).strip().lower() in LIST_KEYS for key in row)
    if not lists or isinstance(row.get("prompt"), list):
        extra.pop("prompt", None)
    problems = []
    for key, value in extra.items():
        if key == "accept":
            listed = value if isinstance(value, list) else []
            texts = [text for text in listed if isinstance(text, str) and text.strip()]
            if not texts or len(texts) < len(listed):
                problems.append(faults.WRONG_ACCEPT())
            else:
                problems += [p for text in texts for p in check_characters("accept", text)]
        elif isinstance(value, str):
            problems += check_characters(key, value)
        elif key == "prompt" or not isinstance(value, int):
            problems.append(wrong_type(key, value, "text"))
    return extra, problems


def _without_prefixes(row: Mapping[str, object]) -> tuple[dict[str, object], bool]:
    """Prompt flow's batch outputs name their columns `inputs.X` and `outputs.X`; so do we not.

    An input may have the name of an output, as where the right answers are asked along: the
    answer is the output's, anything else the input's. The other one keeps its prefix.
    """
    sides: dict[str, dict[str, object]] = {
        side: value for side in ("inputs", "outputs") if isinstance(value := row.get(side), dict)
    }
    if len(sides) < 2:
        sides = {
            side: {
                str(key).removeprefix(f"{side}."): value
                for key, value in row.items()
                if str(key).startswith(f"{side}.")
            }
            for side in ("inputs", "outputs")
        }
    if not any(sides.values()):
        return dict(row), False
    columns = {
        key: value
        for key, value in row.items()
        if key not in sides and not str(key).startswith(("inputs.", "outputs."))
    }
    for side in ("inputs", "outputs"):
        other = sides["outputs" if side == "inputs" else "inputs"]
        for key, value in sides[side].items():
            gives_way = key in other and (key in _ANSWERS) == (side == "inputs")
            taken = key in columns and columns[key] != value
            columns[f"{side}.{key}" if gives_way or taken else key] = value
    return columns, True


class _Reader:
    """Reads one row; collects problems, and notes which keys it has read."""

    def __init__(self, row: Mapping[str, object]) -> None:
        self.problems: list[Problem] = []
        self.read_keys: set[str] = set()
        self.unused: set[str] = set()
        self.notes: set[str] = set()
        # OpenAI's rows of preferences hold what is asked in `input`: here under TRL's names.
        asked = row.get("input")
        if "preferred_output" in row and isinstance(asked, dict) and "messages" in asked:
            names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
            said = {names.get(key, key): value for key, value in row.items() if key != "input"}
            row = {**asked, **said}
        plain, self._from_run = _without_prefixes(row)
        # `Question ` and `question` are one key to whoever exports a table.
        self.row: dict[str, object] = {}
        for key, value in plain.items():
            low = str(key).strip().lower()
            name = low if low in _KNOWN else key
            if name not in self.row:
                self.row[name] = value
            elif self.row[name] != value:
                self.problems.append(faults.KEY_TWICE(key=name))

    def read(self) -> tuple[str | None, list[Message]]:
        """The format and its messages."""
        lists = [key for key in LIST_KEYS if key in self.row]
        if "contents" in lists and not isinstance(self.row["contents"], list):
            lists.remove("contents")  # any text may have that name; Gemini's is a list
        form: str | None
        # `chosen` alone may be any column, where the row has another format.
        has_chosen = isinstance(self.row.get("chosen"), (str, list, dict))
        if has_chosen and ("rejected" in self.row or not (lists or self._present(_ANSWERS))):
            form, messages = "preference", self._preferred(lists)
        elif lists:
            form, messages = self._lists(lists)
        else:
            form, messages = self._pair()
        if form is None:
            return None, []
        self._systems(messages)
        # What belongs to the conversation and was not read: without it the answer comes from
        # nowhere.
        meant = [key for key in _REFUSED if _from_json(self.row.get(key))]
        others = [key for key in ("context", *_HISTORIES) if key not in self.read_keys]
        meant += [key for key in others if self.row.get(key)]
        self.problems += [faults.MEANING(key=key) for key in meant]
        # TRL's unpaired preferences (KTO); a table has the word.
        if str(self.row.get("label")).lower() == "false":
            self.problems.append(faults.FALSE_LABEL())
        weight = self.row.get("weight")
        if weight is not None and not _WEIGHT_WORDS.get(str(weight).strip().lower()):
            self.problems.append(faults.WEIGHT_OF_ROW(value=str(weight)[:40]))
        self.read_keys.add("weight")
        for key in ("train", "training"):
            if _WEIGHT_WORDS.get(str(self.row.get(key)).strip().lower()) is False:
                self.problems.append(faults.NOT_TO_LEARN(key=key))
        return form, messages

    def _lists(self, keys: list[str]) -> tuple[str, list[Message]]:
        read = {key: self._messages(key, self.row[key]) for key in keys}
        self.read_keys.update(keys)
        asks, answers = self._asks(), self._present(_ANSWERS)
        if answers and asks:
            name = f"{asks[0]}/{answers[0]}"
            read[name] = self._conversational(asks[0], answers[0])
            self.read_keys.update((asks[0], answers[0]))
        text = self.row.get("text")
        if isinstance(text, str) and is_rendered(text):
            written = take_apart(text, "text")
            # The template strips; weights are not in it.
            stripped = [Message(m.role, m.content.strip()) for m in _said(read[keys[0]])]
            if not isinstance(written, Problem):
                self.read_keys.add("text")
                if [*_said(written)] != stripped:
                    read["text"] = written
        if len({_said(messages) for messages in read.values()}) > 1:
            self.problems.append(faults.TWO_CONVERSATIONS(keys=" and ".join(read)))
        systems = [m for found in read.values() for m in found[:1] if m.role == "system"]
        if any(system != systems[0] for system in systems):
            self.problems.append(faults.TWO_SYSTEMS(keys=" and ".join(read)))
        first = read[keys[0]]
        if systems and first and first[0].role != "system":
            first.insert(0, systems[0])
        return _FORMS[keys[0]], first

    def _messages(self, key: str, turns: object) -> list[Message]:
        turns = _from_json(turns)
        if not isinstance(turns, list):
            self.problems.append(wrong_type(key, turns, "a list of messages"))
            return []
        if not turns:
            self.problems.append(faults.NO_MESSAGES(key=key))
        messages = []
        for number, turn in enumerate(turns):
            before = len(self.problems)
            message = self._message(f"{key}[{number}]", f"{key}[]", turn)
            if message is not None and len(self.problems) == before:
                messages.append(message)
        return messages

    def _message(self, place: str, name: str, turn: object) -> Message | None:
        """One message; None where its problems leave nothing to go on with."""
        if not isinstance(turn, dict):
            expected = 'an object with "role" and "content"'
            self.problems.append(wrong_type(place, turn, expected))
            return None
        role_key = next((key for key in ROLE_KEYS if key in turn), None)
        text_key = next((key for key in TEXT_KEYS if key in turn), None)
        said = turn.get(role_key) if role_key else None
        role = None
        if role_key is None:
            self.problems.append(faults.NO_ROLE(place=place, roles=", ".join(ROLES)))
        elif not isinstance(said, str):
            self.problems.append(wrong_type(f"{place}.{role_key}", said, "text"))
        elif said in ROLES or said in ROLE_ALIASES:
            role = ROLE_ALIASES.get(said, said)
        elif said not in TOOL_ROLES:  # those have their own fault below
            near, known = said.strip().lower(), [*ROLE_ALIASES, *ROLES]
            fix = f"write {near!r}" if near in known else f"known roles: {', '.join(known)}"
            self.problems.append(faults.UNKNOWN_ROLE(place=place, role=said[:40], fix=fix))
        called = [key for key in TOOL_KEYS if turn.get(key)]
        if called or (isinstance(said, str) and said in TOOL_ROLES):
            how = ", ".join(map(repr, called)) or repr(said)
            self.problems.append(faults.TOOLS(place=place, how=how))
            return None
        if text_key is None:
            # Each family has its own pair of names: `from` and `value` (ShareGPT), or OpenAI's.
            key = TEXT_KEYS[role_key == "from"]
            self.problems.append(faults.NO_CONTENT(place=place, key=key))
            return None
        content = turn[text_key]
        # Parts of a text may have more keys than it, such as Anthropic's `cache_control`.
        more = {
            str(key)
            for part in (content if isinstance(content, list) else [content])
            if isinstance(part, dict)
            for key in part.keys() - {"type", "text"}
        }
        self.unused.update(f"{name}.{text_key}[].{key}" for key in more)
        text = _joined_parts(f"{place}.{text_key}", content)
        if isinstance(text, Problem):
            self.problems.append(text)
            return None
        drop = "system message" if role == "system" else "conversation"
        self.problems += check_text(f"{place}.{text_key}", text, drop=drop)
        learn = self._learn(place, turn) if role == "assistant" else True
        known_keys = {role_key, text_key, *(_WEIGHTS if role == "assistant" else ())}
        self.unused.update(
            f"{name}.{key}"
            for key, value in turn.items()
            if key not in known_keys and value not in _EMPTY
        )
        return Message(role or "", str(text), learn)

    def _learn(self, place: str, turn: Mapping[str, object]) -> bool:
        """Whether an answer is learnt: the weights that other trainers know, all of one mind."""
        said: dict[str, bool] = {}
        for key in _WEIGHTS:
            value = turn.get(key)
            if value is None:
                continue
            learnt = _WEIGHT_WORDS.get(str(value).strip().lower())
            if learnt is not None:
                said[key] = learnt
            else:
                value = str(value)[:40]
                self.problems.append(faults.WEIGHT(place=f"{place}.{key}", value=value))
        if len(set(said.values())) > 1:
            keys = " and ".join(map(repr, said))
            self.problems.append(faults.WEIGHTS_DIFFER(place=place, keys=keys))
        if turn.get(_PARTS_OF_ANSWERS):
            self.problems.append(faults.WEIGHT_OF_PARTS(place=f"{place}.{_PARTS_OF_ANSWERS}"))
        return all(said.values())

    def _pair(self) -> tuple[str | None, list[Message]]:
        asks, answers = self._asks(), self._present(_ANSWERS)
        text = self.row.get("text")
        if not asks and not answers and isinstance(text, str):
            self.read_keys.add("text")
            return "rendered text", self._rendered(text, "text")
        if not asks or not answers:
            row = self.row
            if "rejected" in row:
                what = "there is 'rejected' but no 'chosen'"
            elif here := [*asks, *answers]:
                missing = "an answer" if asks else "a question"
                names = ", ".join(map(repr, _ANSWERS if asks else _ASKS))
                what = f"{here[0]!r} needs {missing} in addition (one of {names})"
            elif {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
                what = "it is a single message, not a conversation"
            else:
                keys = ", ".join(repr(key)[:40] for key in list(row)[:6]) or "it has no keys"
                what = f"it has no 'messages' and fits no other format (keys: {keys})"
            self.problems.append(faults.UNKNOWN_FORMAT(what=what))
            return None, []
        ask = "instruction" if "instruction" in asks else asks[0]
        others = [key for key in asks if (ask, key) != ("instruction", "input") and key != ask]
        differing = [
            " and ".join(map(repr, (first, *(k for k in rest if self.row[k] != self.row[first]))))
            for first, *rest in ([ask, *others], answers)
            if any(self.row[key] != self.row[first] for key in rest)
        ]
        if differing:
            self.problems.append(faults.SEVERAL_FORMATS(keys=", ".join(differing)))
        answer = answers[0]
        self.read_keys.update((*others, *answers, ask))
        form = _NAMED_PAIRS.get((ask, answer), f"{ask}/{answer}")
        if self._from_run and self.row[answer] == _FAILED:
            self.problems.append(faults.FAILED_LINE(key=answer, text=_FAILED))
        asked, said = self.row[ask], self.row[answer]
        if isinstance(asked, str) and isinstance(said, str) and is_rendered(asked):
            return "rendered text", self._rendered(asked + said, ask, ends=False)
        return form, [*self._history(), *self._conversational(ask, answer)]

    def _asks(self) -> list[str]:
        """The keys that may hold the question; if there is another one, `user` names a person."""
        asks = self._present(_ASKS)
        if "assistant" not in self.row and ("messages" in self.row or len(asks) > 1):
            asks = [key for key in asks if key != "user"]
        # The whole prompt as it was rendered, in addition to its parts.
        part, whole = self.row.get("instruction"), self.row.get("prompt")
        if isinstance(part, str) and isinstance(whole, str) and part in whole and part != whole:
            asks.remove("prompt")
            self.unused.add("prompt")
        return asks

    def _present(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key in self.row and self.row[key] is not None]

    def _conversational(self, ask: str, answer: str) -> list[Message]:
        """A question and its answer, each a text or (TRL's form) a list of messages."""
        messages = self._question(ask)
        value = self.row[answer]
        if isinstance(value, dict):  # one message, as an API answers
            value = [value]
        if isinstance(value, list):
            return [*messages, *self._messages(answer, value)]
        self.problems += check_text(answer, value)
        return [*messages, Message("assistant", str(value))]

    def _question(self, ask: str) -> list[Message]:
        """What is asked: messages, or a text with the `input` or `context` that belongs to it."""
        value = self.row[ask]
        if isinstance(value, list):
            return self._messages(ask, value)
        self.problems += check_text(ask, value)
        question = str(value)
        for key in ("input", "context"):
            if key in self.row and key != ask and (key == "context" or ask == "instruction"):
                self.read_keys.add(key)
                if self.row[key] not in (None, ""):
                    self.problems += check_text(key, self.row[key], drop="key")
                    question = f"{question}\n\n{self.row[key]}"
        return [Message("user", question)]

    def _preferred(self, lists: Sequence[str]) -> list[Message]:
        """Of a preference row what was chosen, after what was asked where that is elsewhere.

        TRL's explicit prompt, its implicit one, and LLaMA-Factory's `conversations`. Where the
        question or the whole conversation is written twice, both must be the same.
        """
        self.read_keys.update(("chosen", "rejected"))
        self.notes.add("preference rows: 'chosen' is learnt, 'rejected' is not used")
        value = self.row["chosen"]
        if isinstance(value, str) and is_rendered(value):
            chosen = self._rendered(value, "chosen")
        elif isinstance(value, str):
            self.problems += check_text("chosen", value)
            chosen = [Message("assistant", value)]
        else:
            chosen = self._messages("chosen", value if isinstance(value, list) else [value])
        keys = [*lists, *self._asks()]
        if "instruction" in keys and "input" in keys:
            keys.remove("input")
        if not keys and isinstance(value, str) and not is_rendered(value):
            self.problems.append(faults.CHOSEN_WITHOUT_QUESTION())
        conversation = chosen
        for key in keys:
            self.read_keys.add(key)
            before = self._messages(key, self.row[key]) if key in lists else self._question(key)
            if key not in lists:
                before = [*self._history(), *before]
            whole = _asked_and_chosen(before, conversation)
            if whole is None:
                self.problems.append(faults.CHOSEN_DIFFERS(key=key))
            else:
                conversation = whole
        return conversation

    def _history(self) -> list[Message]:
        """Earlier turns: Alpaca's pairs, or Prompt flow's inputs and outputs."""
        messages: list[Message] = []
        for key in self._present(_HISTORIES):
            self.read_keys.add(key)
            turns = _from_json(self.row[key])
            if turns in _EMPTY:
                continue
            if not isinstance(turns, list):
                self.problems.append(wrong_type(key, turns, "a list of turns"))
                continue
            if isinstance(turns[0], dict) and turns[0].keys() & {*ROLE_KEYS}:
                messages += self._messages(key, turns)
                continue
            for number, turn in enumerate(turns):
                pair: tuple[object, object] | None = None
                if isinstance(turn, (list, tuple)) and len(turn) == 2:
                    pair = turn[0], turn[1]
                elif isinstance(turn, dict):  # Prompt flow's `inputs` and `outputs`
                    asked = _chat_text(turn.get("inputs"), _ASKS)
                    answered = _chat_text(turn.get("outputs"), _ANSWERS)
                    pair = None if asked is None or answered is None else (asked, answered)
                if pair is None:
                    expected = '["question", "answer"], or {"inputs": …, "outputs": …}'
                    self.problems.append(wrong_type(f"{key}[{number}]", turn, expected))
                    continue
                for role, text in zip(("user", "assistant"), pair, strict=True):
                    self.problems += check_text(f"{key}[{number}]", text)
                    messages.append(Message(role, str(text)))
        return messages

    def _systems(self, messages: list[Message]) -> None:
        """A system text in a key of its own goes in front."""
        for key in self._present(_SYSTEMS):
            self.read_keys.add(key)
            value = self.row[key]
            if key in _GEMINI_SYSTEMS and isinstance(value, dict) and "parts" in value:  # a turn
                value = value["parts"]
            text = _joined_parts(key, value)
            if isinstance(text, Problem):
                self.problems.append(text)
                continue
            if text == "":
                continue
            self.problems += check_text(key, text, drop="key")
            if messages and messages[0].role == "system":
                if messages[0].content != text:
                    self.problems.append(faults.SYSTEM_DIFFERS(key=key))
            else:
                messages.insert(0, Message("system", str(text)))

    def _rendered(self, text: str, key: str, *, ends: bool = True) -> list[Message]:
        messages = take_apart(text, key, ends=ends)
        if isinstance(messages, Problem):
            self.problems.append(messages)
            return []
        for message in messages:
            self.problems += check_text(f"{key} ({message.role})", message.content)
        return messages


def _said(messages: Sequence[Message]) -> tuple[Message, ...]:
    """What is said but the system message, to compare two spellings of a conversation."""
    return tuple(message for message in messages if message.role != "system")


def _asked_and_chosen(before: list[Message], chosen: list[Message]) -> list[Message] | None:
    """A question and what was chosen, which may repeat it, as one; None if they differ.

    `before` may be the whole conversation as well.
    """
    asked, said = _said(before), _said(chosen)
    system = [m for m in (*before[:1], *chosen[:1]) if m.role == "system"]
    if any(message != system[0] for message in system):
        return None
    if said[: len(asked)] == asked:  # chosen is the whole conversation
        return [*system[:1], *said]
    if said and asked[-len(said) :] == said:  # before is
        return [*system[:1], *asked]
    if said and asked and said[0].role == "assistant" and asked[-1].role == "user":
        return [*system[:1], *asked, *said]
    return None


#: Columns of a table that hold JSON where they start with a bracket.
JSON_CELLS = frozenset((*LIST_KEYS, *_HISTORIES, "inputs.chat_history", "chosen", "rejected"))
_KNOWN = frozenset(
    (*LIST_KEYS, *_ASKS, *_ANSWERS, *_SYSTEMS, *_HISTORIES, *_REFUSED, "chosen", "rejected",
     "context", "text", "label", "weight", "train", "training")
)  # fmt: skip


def _joined_parts(place: str, content: object) -> object:
    """Text given as OpenAI's list of parts; a Problem for a part that is not text."""
    if isinstance(content, dict):  # one part
        content = [content]
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind: object = "text"
        text = part
        if isinstance(part, dict):
            # Gemini's parts have no type, but a key that shows it.
            kind = part.get("type", "text" if "text" in part else next(iter(part), "text"))
            text = part.get("text")
            if part.get("thought"):  # Gemini's: what the model thought is no part of its answer
                kind = "thought"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            return faults.NOT_TEXT_PART(place=place, kind=str(kind)[:40])
        texts.append(text)
    return "\n".join(texts)


def _from_json(value: object) -> object:
    """A list or object that a table or an export holds as text; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _chat_text(side: object, names: Sequence[str]) -> str | None:
    """The text of a turn's side: the only one, or the one under a known name."""
    if not isinstance(side, dict):
        return None
    texts = {key: value for key, value in side.items() if isinstance(value, str)}
    if len(texts) == 1:
        return next(iter(texts.values()))
    known = [texts[name] for name in names if name in texts]
    return known[0] if len(known) == 1 else None


# Text that a chat template has written already, taken apart into its messages again: Phi-3's
# template, ChatML and the transcripts of Anthropic's preference data. Text of others is refused
# with the name of its template: guessed turns would be trained on without a word.

# How other chat templates begin, and ours: what a text shows that was rendered already.
_TEMPLATES = {
    "<|im_start|>": "ChatML",
    "<|user|>": "Phi-3",
    "<|system|>": "Phi-3",
    "<|start_header_id|>": "Llama 3",
    "[INST]": "Llama 2 or Mistral",
    "<start_of_turn>": "Gemma",
    "### Instruction:": "Alpaca's prompt",
    "### Human:": "Vicuna",
    "Below is an instruction": "Alpaca's prompt",
}
_RENDERED = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(?:<\|(?:user|assistant|system|im_start|start_header_id)\|>|\[INST\]|<start_of_turn>"
    r"|### (?:Instruction|Human):|Below is an instruction that)"
)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPOKEN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TURNS = {
    "Phi-3": (re.compile(r"<\|(system|user|assistant|tool)\|>"), "<|end|>"),
    "ChatML": (re.compile(r"<\|im_start\|>(\w+)\n"), "<|im_end|>"),
}
_TEXT_ENDS = ("<|endoftext|>", "</s>")


def is_rendered(text: str) -> bool:
    """Whether a text begins as a chat template writes it."""
    return _RENDERED.match(text) is not None or _is_transcript(text)


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def take_apart(text: str, key: str, *, ends: bool = True) -> list[Message] | Problem:
    """The messages of a text, or why they cannot be separated; `key` names the text.

    With `ends` False the last turn may be open, as a completion is.
    """
    if _is_transcript(text):
        _, *parts = _SPOKEN.split(text)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        turns = [Message(_SPEAKERS[who], said.strip()) for who, said in pairs]
        # A transcript ends where the answer would begin.
        return turns if turns[-1].content else turns[:-1]
    marks = sorted((text.find(mark), name) for mark, name in _TEMPLATES.items() if mark in text)
    if not marks:
        return faults.PLAIN_TEXT(key=key)
    template = marks[0][1]
    if template not in _TURNS:
        why = f"was written by another chat template ({template})"
        return faults.RENDERED_TEXT(key=key, why=why)
    messages = _turns(text, *_TURNS[template], ends=ends)
    if isinstance(messages, str):
        why = f"cannot be taken apart by {template}'s template: {messages}"
        return faults.RENDERED_TEXT(key=key, why=why)
    return messages


def _turns(text: str, opening: re.Pattern[str], end: str, *, ends: bool) -> list[Message] | str:
    """The turns of a text between the marks of a template, or why they cannot be separated."""
    body = text.strip().removeprefix("<s>").strip()
    for mark in _TEXT_ENDS:
        if body.endswith(mark):
            body, ends = body.removesuffix(mark).rstrip(), False
        if mark in body:
            return f"{mark} is in the middle of it, so it may hold several conversations"
    before, *turns = opening.split(body)
    if before.strip():
        return f"it starts with {before.strip()[:40]!r}"
    messages = []
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    for number, (role, said) in enumerate(pairs, start=1):
        is_last = number == len(pairs)
        if is_last and role == "assistant" and not said.strip():
            break  # where the answer would begin
        if role not in ROLES:
            return f"it has a turn of the role {role!r}"
        content, closed, after = said.partition(end)
        if (not closed and (ends or not is_last)) or after.strip():
            return f"turn {number} ({role}) does not end with {end}"
        messages.append(Message(role, content.strip()))
    return messages
