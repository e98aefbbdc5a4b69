"""What the compared models are asked: fixed prompts, and the run's held-out conversations.

Reads run/data/validation.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..finetune.rows import read_rows
from ..parity.golden import golden
from ..prompt import ChatFormat
from ..run import Run
from .behaviour import Prompt

MAX_NEW_TOKENS = 32
HELD_OUT_ROWS = 64
_QUESTIONS = (
    "Who founded Microsoft?",
    "What is the capital of France?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "Name three colours.",
    "What is 17 plus 25?",
    "Explain photosynthesis in one sentence.",
    "Translate 'good morning' into German.",
    "What should I pack for a hike in the rain?",
    "Thanks, that was helpful!",
    "Give me a Python function that adds two numbers.",
    "When did the Second World War end?",
    "Which tent is best for two people?",
    "Tell me a joke.",
    "Why is the sky blue?",
    "Summarise: The cat sat on the mat and slept.",
)


@dataclass(frozen=True)
class HeldOut:
    """A held-out conversation: its prompt and the answer that is expected."""

    prompt: Prompt
    expected: str


def fixed_prompts(chat: ChatFormat) -> list[Prompt]:
    """The same for every run: everyday questions and the golden conversations."""
    asked = [(text, [{"role": "user", "content": text}]) for text in _QUESTIONS]
    cases = [(case.name, list(case.messages)) for case in golden(chat, ["<|end|>"])]
    prompts = (Prompt(name, chat.encode_prompt(messages)) for name, messages in [*asked, *cases])
    return [prompt for prompt in prompts if _fits(prompt, chat)]


def held_out(run: Run, chat: ChatFormat) -> list[HeldOut]:
    """At most 64 of the run's held-out rows, spread over all of them."""
    path = run.path / "data" / "validation.jsonl"
    rows = read_rows([path]) if path.is_file() else []
    chosen = rows[:: -(-len(rows) // HELD_OUT_ROWS)] if rows else []
    found = []
    for messages in chosen:
        question = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        prompt = Prompt(question, chat.encode_prompt(messages[:-1]))
        found.append(HeldOut(prompt, messages[-1]["content"]))
    return [row for row in found if _fits(row.prompt, chat)]


def _fits(prompt: Prompt, chat: ChatFormat) -> bool:
    return len(prompt.ids) + MAX_NEW_TOKENS <= chat.context_length
