"""The chat formats that people have, detected by their keys and read as messages.

`messages` (OpenAI, TRL), ShareGPT, Alpaca, pairs of a question and an answer under many names,
preferences (`chosen`), Prompt flow's own rows, and text that a chat template has written already.
Nothing that carries meaning is dropped: it is used, or the row is refused. Every other key that is
not read is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
from .rendered import is_rendered, take_apart


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
_EXPECTED = (
    'expected \'messages\' (a list of {"role", "content"}), a question and its answer '
    "('prompt' + 'completion', 'question' + 'answer', 'instruction' + 'output', 'input' + "
    "'output'), 'conversations', or 'chosen'"
)
_EMPTY: tuple[object, ...] = (None, "", [], {})
_FAILED = "(Failed)"  # what `pf run show-details` writes for a line without an output


def read_row(row: Mapping[str, object]) -> Row:
    """The row's format, its messages, every problem, and what was not read."""
    reader = _Reader(row)
    form, messages = reader.read()
    problems = reader.problems
    if form is not None and not problems:
        problems = check_order([message.role for message in messages])
        if problems:
            problems = [
                problem._replace(
                    fix=f"{problem.fix}, or repair the file: phi3 data fix FILE -o NEW"
                )
                for problem in problems
            ]
        elif not any(message.learn for message in messages if message.role == "assistant"):
            what = "every answer has the weight 0, so there is nothing to learn"
            problems = [Problem("nothing-to-learn", what, "remove the row, or a weight")]
        else:
            # What follows the last answer that is learnt teaches nothing.
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
            problems += _accept(value)
        elif isinstance(value, str):
            problems += check_characters(key, value)
        elif key == "prompt" or not isinstance(value, int):
            problems.append(wrong_type(key, value, "text"))
    return extra, problems


def _accept(value: object) -> list[Problem]:
    listed = value if isinstance(value, list) else []
    texts = [text for text in listed if isinstance(text, str) and text.strip()]
    if not texts or len(texts) < len(listed):
        what = "'accept' is not a list of texts"
        fix = 'write "accept": ["a text that a correct answer contains"]'
        return [Problem("wrong-type", what, fix)]
    return [problem for text in texts for problem in check_characters("accept", text)]


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


def _openai_preference(row: Mapping[str, object]) -> Mapping[str, object]:
    """OpenAI's rows of preferences under TRL's names; any other row as it is."""
    asked = row.get("input")
    if "preferred_output" not in row or not isinstance(asked, dict) or "messages" not in asked:
        return row
    names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
    said = {names.get(key, key): value for key, value in row.items() if key != "input"}
    return {**asked, **said}


class _Reader:
    """Reads one row; collects problems, and notes which keys it has read."""

    def __init__(self, row: Mapping[str, object]) -> None:
        self.problems: list[Problem] = []
        self.read_keys: set[str] = set()
        self.unused: set[str] = set()
        self.notes: set[str] = set()
        plain, self._from_run = _without_prefixes(_openai_preference(row))
        # `Question ` and `question` are one key to whoever exports a table.
        self.row: dict[str, object] = {}
        for key, value in plain.items():
            low = str(key).strip().lower()
            name = low if low in _KNOWN else key
            if name not in self.row:
                self.row[name] = value
            elif self.row[name] != value:
                what = f"the row has the key {name!r} twice, with different contents"
                self.problems.append(Problem("two-formats", what, "keep the right one"))

    def read(self) -> tuple[str | None, list[Message]]:
        """The format and its messages."""
        lists = [key for key in LIST_KEYS if key in self.row]
        if "contents" in lists and not isinstance(self.row["contents"], list):
            lists.remove("contents")  # any text may have that name; Gemini's is a list
        form: str | None
        if self._is_preference(lists):
            form, messages = "preference", self._preferred(lists)
        elif lists:
            form, messages = self._lists(lists)
        else:
            form, messages = self._pair()
        if form is None:
            return None, []
        self._systems(messages)
        self._refuse_what_is_meant()
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
            what = f"the row holds two conversations that differ, under {' and '.join(read)}"
            self.problems.append(Problem("two-formats", what, "keep the right one"))
        systems = [m for found in read.values() for m in found[:1] if m.role == "system"]
        if any(system != systems[0] for system in systems):
            what = f"the row holds two system messages that differ, under {' and '.join(read)}"
            self.problems.append(Problem("two-formats", what, "keep the right one"))
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
            what = f"{key!r} is an empty list"
            fix = "write at least a question and its answer"
            self.problems.append(Problem("no-messages", what, fix))
        messages = []
        for number, turn in enumerate(turns):
            before = len(self.problems)
            message = self._message(f"{key}[{number}]", f"{key}[]", turn)
            if message is not None and len(self.problems) == before:
                messages.append(message)
        return messages

    def _message(self, place: str, name: str, turn: object) -> Message | None:
        if not isinstance(turn, dict):
            expected = 'an object with "role" and "content"'
            self.problems.append(wrong_type(place, turn, expected))
            return None
        role_key = next((key for key in ROLE_KEYS if key in turn), None)
        text_key = next((key for key in TEXT_KEYS if key in turn), None)
        role = self._role(place, turn, role_key)
        called = [key for key in TOOL_KEYS if turn.get(key)]
        said = turn.get(role_key) if role_key else None
        if called or (isinstance(said, str) and said in TOOL_ROLES):
            what = f"{place} uses tools ({', '.join(map(repr, called)) or repr(said)})"
            fix = "leave the row out, by hand or with: phi3 data fix FILE -o NEW"
            self.problems.append(Problem("tools", what, fix))
            return None
        if text_key is None:
            what = f"{place} has no {TEXT_KEYS[role_key == 'from']!r}"
            self.problems.append(Problem("missing-content", what, "add the text of the message"))
            return None
        text = _joined_parts(turn[text_key])
        self.unused.update(f"{name}.{text_key}[].{key}" for key in _more_of_parts(turn[text_key]))
        if isinstance(text, Problem):
            self.problems.append(text._replace(what=f"{place}.{text_key} {text.what}"))
            return None
        drop = "system message" if role == "system" else "conversation"
        self.problems += check_text(f"{place}.{text_key}", text, drop=drop)
        learn = self._learn(place, turn, role)
        known = {role_key, text_key, *(_WEIGHTS if role == "assistant" else ())}
        self.unused.update(
            f"{name}.{key}"
            for key, value in turn.items()
            if key not in known and value not in _EMPTY
        )
        return Message(role or "", str(text), learn)

    def _role(self, place: str, turn: Mapping[str, object], key: str | None) -> str | None:
        if key is None:
            fix = f"add one of {', '.join(ROLES)}"
            self.problems.append(Problem("missing-role", f"{place} has no 'role'", fix))
            return None
        role = turn[key]
        if not isinstance(role, str):
            self.problems.append(wrong_type(f"{place}.{key}", role, "text"))
            return None
        if role in ROLES or role in ROLE_ALIASES:
            return ROLE_ALIASES.get(role, role)
        if role in TOOL_ROLES:
            return None
        near = role.strip().lower()
        known = [*ROLE_ALIASES, *ROLES]
        fix = f"write {near!r}" if near in known else f"known roles: {', '.join(known)}"
        what = f"{place} has the unknown role {role[:40]!r}"
        self.problems.append(Problem("unknown-role", what, fix))
        return None

    def _learn(self, place: str, turn: Mapping[str, object], role: str | None) -> bool:
        said: dict[str, bool] = {}
        if role != "assistant":
            return True
        for key in _WEIGHTS:
            value = turn.get(key)
            if value is None:
                continue
            learnt = _WEIGHT_WORDS.get(str(value).strip().lower())
            if learnt is not None:
                said[key] = learnt
            else:
                what = f"{place}.{key} is {str(value)[:40]}"
                fix = "write 1 (learn this answer) or 0 (context only); shares are not supported"
                self.problems.append(Problem("weight", what, fix))
        if len(set(said.values())) > 1:
            what = f"{place} has contradictory weights: {' and '.join(map(repr, said))} differ"
            self.problems.append(Problem("weight", what, "keep the right one"))
        if turn.get(_PARTS_OF_ANSWERS):
            what = f"{place}.{_PARTS_OF_ANSWERS} marks parts of an answer as not learnt"
            fix = 'answers are learnt whole or not at all: remove the key, or write "weight": 0'
            self.problems.append(Problem("weight", what, fix))
        return all(said.values())

    def _pair(self) -> tuple[str | None, list[Message]]:
        asks, answers = self._asks(), self._present(_ANSWERS)
        text = self.row.get("text")
        if not asks and not answers and isinstance(text, str):
            self.read_keys.add("text")
            return "rendered text", self._rendered(text, "text")
        if not asks or not answers:
            self.problems.append(_no_format(self.row, asks, answers))
            return None, []
        ask = "instruction" if "instruction" in asks else asks[0]
        others = [key for key in asks if (ask, key) != ("instruction", "input") and key != ask]
        differing = [
            " and ".join(map(repr, (first, *(k for k in rest if self.row[k] != self.row[first]))))
            for first, *rest in ([ask, *others], answers)
            if any(self.row[key] != self.row[first] for key in rest)
        ]
        if differing:
            what = f"the keys fit several formats: {', '.join(differing)} differ"
            self.problems.append(Problem("two-formats", what, "keep the right one"))
        answer = answers[0]
        self.read_keys.update((*others, *answers, ask))
        form = _NAMED_PAIRS.get((ask, answer), f"{ask}/{answer}")
        if self._from_run and self.row[answer] == _FAILED:
            what = f"{answer} is {_FAILED!r}: the line of the batch run has no answer"
            self.problems.append(Problem("failed-line", what, "leave the row out"))
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

    def _is_preference(self, lists: Sequence[str]) -> bool:
        """`chosen` alone may be any column, where the row has another format."""
        if not isinstance(self.row.get("chosen"), (str, list, dict)):
            return False
        return "rejected" in self.row or not (lists or self._present(_ANSWERS))

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
            what = "'chosen' is a text and the row has no question"
            fix = "add its 'prompt', or write 'chosen' as a list of messages"
            self.problems.append(Problem("unknown-format", f"unknown format: {what}", fix))
        conversation = chosen
        for key in keys:
            self.read_keys.add(key)
            before = self._messages(key, self.row[key]) if key in lists else self._question(key)
            if key not in lists:
                before = [*self._history(), *before]
            whole = _asked_and_chosen(
                before, conversation if conversation is not chosen else chosen
            )
            if whole is None:
                what = f"{key!r} and 'chosen' hold different conversations"
                self.problems.append(Problem("two-formats", what, "keep the right one"))
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
                pair = _question_and_answer(turn)
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
            text = _joined_parts(value)
            if isinstance(text, Problem):
                self.problems.append(text._replace(what=f"{key} {text.what}"))
                continue
            if text == "":
                continue
            self.problems += check_text(key, text, drop="key")
            if messages and messages[0].role == "system":
                if messages[0].content != text:
                    what = f"{key!r} differs from the system message of the conversation"
                    self.problems.append(Problem("two-formats", what, "keep the right one"))
            else:
                messages.insert(0, Message("system", str(text)))

    def _refuse_what_is_meant(self) -> None:
        refused = [key for key in _REFUSED if _from_json(self.row.get(key))]
        if "context" not in self.read_keys and self.row.get("context"):
            refused.append("context")
        refused += [key for key in _HISTORIES if key not in self.read_keys and self.row.get(key)]
        for key in refused:
            what = f"{key!r} belongs to the conversation but is not in its messages"
            fix = "write what the model should see into the messages, or remove the key"
            self.problems.append(Problem("meaning", what, fix))
        # TRL's unpaired preferences (KTO); a table has the word.
        if str(self.row.get("label")).lower() == "false":
            what = "'label' is false: it marks an answer that must not be learnt"
            self.problems.append(Problem("meaning", what, "leave the row out"))
        weight = self.row.get("weight")
        if weight is not None and not _WEIGHT_WORDS.get(str(weight).strip().lower()):
            what = f"the row has the weight {str(weight)[:40]}"
            fix = "leave the row out, or repeat it; rows are learnt equally"
            self.problems.append(Problem("weight", what, fix))
        self.read_keys.add("weight")
        for key in ("train", "training"):
            if _WEIGHT_WORDS.get(str(self.row.get(key)).strip().lower()) is False:
                what = f"the row has {key!r}: false, so it is not to be learnt"
                self.problems.append(Problem("weight", what, "leave the row out"))

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


def _joined_parts(content: object) -> object:
    """Text given as OpenAI's list of parts; a Problem for a part that is not text."""
    if isinstance(content, dict):  # one part
        content = [content]
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind, text = _kind_and_text(part)
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            fix = "the model reads text alone: leave the row out, or write the part as text"
            return Problem("not-text", f"has a part of the kind {str(kind)[:40]!r}", fix)
        texts.append(text)
    return "\n".join(texts)


def _kind_and_text(part: object) -> tuple[object, object]:
    """What a part is, and its text; Gemini's parts have no type, but a key that shows it."""
    if not isinstance(part, dict):
        return "text", part
    if part.get("thought"):  # Gemini's: what the model thought is no part of its answer
        return "thought", None
    key = "text" if "text" in part else next(iter(part), "text")
    return part.get("type", key), part.get("text")


def _more_of_parts(content: object) -> set[str]:
    """The keys of text parts other than their text, such as `cache_control`."""
    parts = content if isinstance(content, list) else [content]
    return {str(key) for part in parts if isinstance(part, dict) for key in part} - {"type", "text"}


def _from_json(value: object) -> object:
    """A list or object that a table or an export holds as text; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _question_and_answer(turn: object) -> tuple[object, object] | None:
    """An earlier turn: a pair, or Prompt flow's `inputs` and `outputs`."""
    if isinstance(turn, (list, tuple)) and len(turn) == 2:
        return turn[0], turn[1]
    if isinstance(turn, dict):
        question = _chat_text(turn.get("inputs"), _ASKS)
        answer = _chat_text(turn.get("outputs"), _ANSWERS)
        if question is not None and answer is not None:
            return question, answer
    return None


def _chat_text(side: object, names: Sequence[str]) -> str | None:
    """The text of a turn's side: the only one, or the one under a known name."""
    if not isinstance(side, dict):
        return None
    texts = {key: value for key, value in side.items() if isinstance(value, str)}
    if len(texts) == 1:
        return next(iter(texts.values()))
    known = [texts[name] for name in names if name in texts]
    return known[0] if len(known) == 1 else None


def _no_format(row: Mapping[str, object], asks: Sequence[str], answers: Sequence[str]) -> Problem:
    if "rejected" in row:
        return _unknown("there is 'rejected' but no 'chosen'")
    if asks or answers:
        here = (asks or answers)[0]
        missing = "an answer" if asks else "a question"
        names = ", ".join(map(repr, _ANSWERS if asks else _ASKS))
        return _unknown(f"{here!r} needs {missing} in addition (one of {names})")
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return _unknown("it is a single message, not a conversation")
    keys = ", ".join(repr(key)[:40] for key in list(row)[:6]) or "it has no keys"
    return _unknown(f"it has no 'messages' and fits no other format (keys: {keys})")


def _unknown(what: str) -> Problem:
    return Problem("unknown-format", f"unknown format: {what}", _EXPECTED)
