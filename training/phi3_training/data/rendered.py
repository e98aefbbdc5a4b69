"""Text that a chat template has written already, taken apart into its messages again.

Phi-3's template, ChatML and the transcripts of Anthropic's preference data; text of others is
refused with the name of its template.
"""

from __future__ import annotations

import re

from .conversation import ROLES, Message
from .faults import Problem

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
        return _spoken(text)
    marks = sorted((text.find(mark), name) for mark, name in _TEMPLATES.items() if mark in text)
    if not marks:
        what = f"{key!r} is plain text: it does not say what is asked and what is answered"
        return Problem("rendered-text", what, "write the conversation as 'messages'")
    template = marks[0][1]
    turns = _TURNS.get(template)
    if turns is None:
        why = f"was written by another chat template ({template})"
    else:
        messages = _turns(text, *turns, ends=ends)
        if not isinstance(messages, str):
            return messages
        why = f"cannot be taken apart by {template}'s template: {messages}"
    fix = "write the conversation as 'messages' and let the model's template render it"
    return Problem("rendered-text", f"{key!r} {why}", fix)


def _spoken(transcript: str) -> list[Message]:
    """The turns of a transcript; the last one is left out where the answer would begin."""
    _, *parts = _SPOKEN.split(transcript)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    turns = [Message(_SPEAKERS[who], said.strip()) for who, said in pairs]
    return turns if turns[-1].content else turns[:-1]


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
