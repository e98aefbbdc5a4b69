"""The chat formats that people have, detected by their keys and read as messages.

`messages` (OpenAI, TRL), ShareGPT, Alpaca, pairs of a question and an answer under many names,
preferences (`chosen`), Prompt flow's own rows, and text that a chat template has written already.
Nothing that carries meaning is dropped: it is used, or the row is refused. Every other key that is
not read is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


LIST_KEYS = ("messages", "conversations", "conversation")
_FORMS = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
# ShareGPT's names, and OpenAI's newer name for a system message.
ROLE_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "developer": "system",
}  # fmt: skip
TOOL_ROLES = frozenset(
    ("tool", "function", "function_call", "function_response", "observation", "ipython",
     "tool_call", "tool_response")
)  # fmt: skip
# OpenAI's `weight`, axolotl's `train` and `training`: whether an answer is learnt.
_WEIGHTS = ("weight", "train", "training")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
# Beside a conversation these change what the model should say, and Phi-3's template has no place.
_REFUSED = ("tools", "functions", "documents", "images", "image", "audio", "videos")
_SYSTEMS = ("system", "system_prompt", "system_message")
_ASKS = ("prompt", "question", "query", "instruction", "input_data", "user", "input")
_ANSWERS = ("completion", "answer", "response", "output", "assistant")
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
_MARKS = re.compile(r"<\|(?:user|assistant|system|im_start)\|>|\[INST\]|<start_of_turn>")
_PHI3_TURN = re.compile(r"\s*<\|(system|user|assistant)\|>\s*(.*?)\s*<\|end\|>", re.DOTALL)
_CHATML_TURN = re.compile(
    r"\s*<\|im_start\|>(system|user|assistant)\n(.*?)\s*<\|im_end\|>", re.DOTALL
)
_TEXT_ENDS = re.compile(r"\s*(?:<s>|</s>|<\|endoftext\|>)?\s*")


def read_row(row: Mapping[str, Any]) -> Row:
    """The row's format, its messages, every problem, and what was not read."""
    reader = _Reader(_without_prefixes(row))
    form, messages = reader.read()
    problems = reader.problems
    if form is not None and not problems:
        problems = check_order([message.role for message in messages])
        if problems:
            problems = [_mendable(problem) for problem in problems]
        elif not any(message.learn for message in messages if message.role == "assistant"):
            what = "every answer has the weight 0, so there is nothing to learn"
            problems = [Problem("nothing-to-learn", what, "remove the row, or a weight")]
        else:
            # What follows the last answer that is learnt teaches nothing.
            while not messages[-1].learn or messages[-1].role != "assistant":
                messages.pop()
    unused = tuple(sorted(reader.row.keys() - reader.read_keys - set(CARRIED)))
    return Row(form, tuple(messages), problems, unused + tuple(sorted(reader.unused)), reader.notes)


def carried(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """What goes along with a row (CARRIED), unless its format gives the key a meaning."""
    extra = {key: row[key] for key in CARRIED if row.get(key) is not None}
    if not any(key in row for key in LIST_KEYS):
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


def _accept(value: Any) -> list[Problem]:
    texts: list[Any] = value if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        what = "'accept' is not a list of texts"
        fix = 'write "accept": ["a text that a correct answer contains"]'
        return [Problem("wrong-type", what, fix)]
    return [problem for text in texts for problem in check_characters("accept", text)]


def _mendable(problem: Problem) -> Problem:
    return problem._replace(fix=f"{problem.fix}, or repair the file: phi3 data fix FILE -o NEW")


def _without_prefixes(row: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt flow's batch outputs name their columns `inputs.X` and `outputs.X`; so do we not."""
    if isinstance(row.get("inputs"), dict) and isinstance(row.get("outputs"), dict):
        rest = {key: value for key, value in row.items() if key not in ("inputs", "outputs")}
        return {**rest, **row["inputs"], **row["outputs"]}
    if not any(str(key).startswith(("inputs.", "outputs.")) for key in row):
        return dict(row)
    return {
        str(key).removeprefix("inputs.").removeprefix("outputs."): value
        for key, value in row.items()
    }


class _Reader:
    """Reads one row; collects problems, and notes which keys it has read."""

    def __init__(self, row: dict[str, Any]) -> None:
        # `Question` and `question` are one key to whoever exports a table.
        lower = {key.lower(): key for key in row if key.lower() in _KNOWN and key not in _KNOWN}
        self.row = {**row, **{low: row[key] for low, key in lower.items() if low not in row}}
        for low, key in lower.items():
            if low not in row:
                del self.row[key]
        self.problems: list[Problem] = []
        self.read_keys: set[str] = set()
        self.unused: set[str] = set()
        self.notes: tuple[str, ...] = ()

    def read(self) -> tuple[str | None, list[Message]]:
        """The format and its messages."""
        lists = [key for key in LIST_KEYS if key in self.row]
        form: str | None
        if lists:
            form, messages = self._lists(lists)
        elif "chosen" in self.row and "rejected" in self.row:
            form, messages = "preference", self._preferred()
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
        first = keys[0]
        asks, answers = self._present(_ASKS), self._present(_ANSWERS)
        if answers and asks and isinstance(self.row[asks[0]], str):
            read["/".join((asks[0], answers[0]))] = [
                Message("user", str(self.row[asks[0]])),
                Message("assistant", str(self.row[answers[0]])),
            ]
            self.read_keys.update((asks[0], answers[0]))
        spoken = [
            [(m.role, m.content) for m in messages if m.role != "system"]
            for messages in read.values()
        ]
        if any(other != spoken[0] for other in spoken[1:]):
            names = " and ".join(read)
            what = f"the row holds two conversations that differ, under {names}"
            self.problems.append(Problem("two-formats", what, "keep the one that is meant"))
        return _FORMS[first], read[first]

    def _messages(self, key: str, turns: Any) -> list[Message]:
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

    def _message(self, place: str, name: str, turn: Any) -> Message | None:
        if not isinstance(turn, dict):
            expected = 'an object with "role" and "content"'
            self.problems.append(wrong_type(place, turn, expected))
            return None
        role_key = next((key for key in _ROLE_KEYS if key in turn), None)
        text_key = next((key for key in _TEXT_KEYS if key in turn), None)
        role = self._role(place, turn, role_key)
        called = [key for key in TOOL_KEYS if turn.get(key)]
        said = turn.get(role_key) if role_key else None
        if called or (isinstance(said, str) and said in TOOL_ROLES):
            what = f"{place} uses tools ({', '.join(map(repr, called)) or repr(said)})"
            fix = "leave the row out, by hand or with: phi3 data fix FILE -o NEW"
            self.problems.append(Problem("tools", what, fix))
            return None
        if text_key is None:
            what = f"{place} has no {_TEXT_KEYS[role_key == 'from']!r}"
            self.problems.append(Problem("missing-content", what, "add the text of the message"))
            return None
        text = _joined_parts(turn[text_key])
        if isinstance(text, Problem):
            self.problems.append(text._replace(what=f"{place}.{text_key} {text.what}"))
            return None
        drop = "system message" if role == "system" else "conversation"
        self.problems += check_text(f"{place}.{text_key}", text, drop=drop)
        learn = self._learn(place, turn, role)
        known = {role_key, text_key, *(_WEIGHTS if role == "assistant" else ())}
        self.unused.update(
            f"{name}.{key}" for key, value in turn.items() if key not in known and value is not None
        )
        return Message(role or "", str(text), learn)

    def _role(self, place: str, turn: Mapping[str, Any], key: str | None) -> str | None:
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

    def _learn(self, place: str, turn: Mapping[str, Any], role: str | None) -> bool:
        learn = True
        for key in _WEIGHTS:
            value = turn.get(key)
            if role != "assistant" or value is None:
                continue
            if value in (0, 1):  # also true, false, 0.0 and 1.0
                learn = learn and bool(value)
            else:
                what = f"{place}.{key} is {str(value)[:40]}"
                fix = "write 1 (learn this answer) or 0 (context only); shares are not supported"
                self.problems.append(Problem("weight", what, fix))
        return learn

    def _pair(self) -> tuple[str | None, list[Message]]:
        asks, answers = self._present(_ASKS), self._present(_ANSWERS)
        if not asks and not answers and isinstance(self.row.get("text"), str):
            self.read_keys.add("text")
            return "rendered text", self._rendered(self.row["text"], "text")
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
            self.problems.append(Problem("two-formats", what, "keep the one that is meant"))
        answer = answers[0]
        self.read_keys.update((*others, *answers, ask))
        form = _NAMED_PAIRS.get((ask, answer), f"{ask}/{answer}")
        if isinstance(self.row[ask], list) or isinstance(self.row[answer], list):
            return form, self._conversational(ask, answer)
        texts = self.row[ask], self.row[answer]
        if all(isinstance(text, str) for text in texts) and _MARKS.search(texts[0]):
            return "rendered text", self._rendered("".join(texts), ask, ends=False)
        self.problems += [*check_text(ask, texts[0]), *check_text(answer, texts[1])]
        question = str(texts[0])
        for key in ("input", "context"):
            if key in self.row and key != ask and (key == "context" or ask == "instruction"):
                self.read_keys.add(key)
                if self.row[key] not in (None, ""):
                    self.problems += check_text(key, self.row[key], drop="key")
                    question = f"{question}\n\n{self.row[key]}"
        turns = [Message("user", question), Message("assistant", str(texts[1]))]
        return form, [*self._history(), *turns]

    def _present(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key in self.row and self.row[key] is not None]

    def _conversational(self, ask: str, answer: str) -> list[Message]:
        """TRL's form: prompt and completion are lists of messages, or one of them is."""
        messages: list[Message] = []
        for key, role in ((ask, "user"), (answer, "assistant")):
            value = self.row[key]
            if isinstance(value, list):
                messages += self._messages(key, value)
            else:
                self.problems += check_text(key, value)
                messages.append(Message(role, str(value)))
        return messages

    def _preferred(self) -> list[Message]:
        """Of a preference row what was chosen; with an explicit prompt it comes first."""
        self.read_keys.update(("chosen", "rejected"))
        self.notes = ("preference rows: 'chosen' is learnt, 'rejected' is not used",)
        chosen: list[Message]
        if isinstance(self.row["chosen"], list):
            chosen = self._messages("chosen", self.row["chosen"])
        else:
            self.problems += check_text("chosen", self.row["chosen"])
            chosen = [Message("assistant", str(self.row["chosen"]))]
        asks = self._present(_ASKS)
        if not asks:
            return chosen
        self.read_keys.add(asks[0])
        prompt = self.row[asks[0]]
        if isinstance(prompt, list):
            before = self._messages(asks[0], prompt)
        else:
            self.problems += check_text(asks[0], prompt)
            before = [Message("user", str(prompt))]
        said = [(m.role, m.content) for m in chosen[: len(before)]]
        repeats = said == [(m.role, m.content) for m in before]
        return chosen if repeats else [*before, *chosen]

    def _history(self) -> list[Message]:
        """Earlier turns: Alpaca's pairs, or Prompt flow's inputs and outputs."""
        messages: list[Message] = []
        for key in self._present(_HISTORIES):
            self.read_keys.add(key)
            turns = self.row[key]
            if not isinstance(turns, list):
                self.problems.append(wrong_type(key, turns, "a list of turns"))
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
            if self.row[key] == "":
                continue
            self.problems += check_text(key, self.row[key], drop="key")
            text = str(self.row[key])
            if messages and messages[0].role == "system":
                if messages[0].content != text:
                    what = f"{key!r} differs from the system message of the conversation"
                    self.problems.append(Problem("two-formats", what, "keep the one that is meant"))
            else:
                messages.insert(0, Message("system", text))

    def _refuse_what_is_meant(self) -> None:
        refused = [key for key in _REFUSED if self.row.get(key)]
        if "context" not in self.read_keys and self.row.get("context"):
            refused.append("context")
        refused += [key for key in _HISTORIES if key not in self.read_keys and self.row.get(key)]
        for key in refused:
            what = f"{key!r} belongs to the conversation, and is not part of its messages"
            fix = "write what the model should see into the messages, or remove the key"
            self.problems.append(Problem("meaning", what, fix))
        if self.row.get("label") is False:
            what = "'label' is false: it marks an answer that must not be learnt"
            self.problems.append(Problem("meaning", what, "leave the row out"))
        weight = self.row.get("weight", 1)
        if weight != 1:
            what = f"the row has the weight {str(weight)[:40]}"
            fix = "leave the row out, or repeat it; rows are learnt equally"
            self.problems.append(Problem("weight", what, fix))
        if "weight" in self.row:
            self.read_keys.add("weight")

    def _rendered(self, text: str, key: str, *, ends: bool = True) -> list[Message]:
        """Text that Phi-3's template or ChatML has written, taken apart; others are refused."""
        for pattern, end in ((_PHI3_TURN, "<|end|>"), (_CHATML_TURN, "<|im_end|>")):
            whole = text if ends or text.rstrip().endswith((end, "<|endoftext|>")) else text + end
            messages, place = [], _TEXT_ENDS.match(whole).end()  # type: ignore[union-attr]
            while turn := pattern.match(whole, place):
                messages.append(Message(turn.group(1), turn.group(2)))
                place = turn.end()
            rest = whole[place:].strip().removeprefix("<|assistant|>").strip()
            if messages and rest in ("", "<|endoftext|>", "</s>"):
                texts = [(f"{key} ({message.role})", message.content) for message in messages]
                self.problems += [p for where, said in texts for p in check_text(where, said)]
                return messages
        if _MARKS.search(text):
            what = f"{key!r} was written by a chat template that is not Phi-3's or ChatML"
            fix = "write the conversation as 'messages' and let the model's template render it"
        else:
            what = f"{key!r} is plain text: it does not say what is asked and what is answered"
            fix = _EXPECTED
        self.problems.append(Problem("rendered-text", what, fix))
        return []


#: Columns of a table that hold JSON where they start with a bracket.
JSON_CELLS = frozenset((*LIST_KEYS, *_HISTORIES, "inputs.chat_history", "chosen", "rejected"))
_KNOWN = frozenset(
    (*LIST_KEYS, *_ASKS, *_ANSWERS, *_SYSTEMS, *_HISTORIES, *_REFUSED, "chosen", "rejected",
     "context", "text", "label", "weight")
)  # fmt: skip


def _joined_parts(content: Any) -> Any:
    """Text given as OpenAI's list of parts; a Problem for a part that is not text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            fix = "the model reads text alone: leave the row out, or write the part as text"
            return Problem("not-text", f"has a part of the kind {str(kind)[:40]!r}", fix)
        texts.append(text)
    return "\n".join(texts)


def _question_and_answer(turn: Any) -> tuple[Any, Any] | None:
    if isinstance(turn, (list, tuple)) and len(turn) == 2:
        return turn[0], turn[1]
    if isinstance(turn, dict):
        sides = turn.get("inputs"), turn.get("outputs")
        if all(isinstance(side, dict) for side in sides):
            texts = [
                [value for value in side.values() if isinstance(value, str)]  # type: ignore[union-attr]
                for side in sides
            ]
            if all(len(side) == 1 for side in texts):
                return texts[0][0], texts[1][0]
    return None


def _no_format(row: Mapping[str, Any], asks: Sequence[str], answers: Sequence[str]) -> Problem:
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
