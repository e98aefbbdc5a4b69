"""The ways that are compared: which model answers, and which passages it is shown.

Builds prompts with the functions that the flow and `phi3 chat --rag` use; asks no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from phi3_tool.grounding import grounded, grounded_question
from phi3_tool.index import DocumentIndex, Embedder, Hit, hits_of

ArmName = Literal["base", "rag", "tuned", "both", "ceiling"]


class Arm(NamedTuple):
    """One way to answer; `passages`: what the model is shown."""

    label: str
    tuned: bool
    passages: Literal["none", "found", "right"]


ARMS: Mapping[ArmName, Arm] = {
    "base": Arm("base model", False, "none"),
    "rag": Arm("RAG", False, "found"),
    "tuned": Arm("tuned", True, "none"),
    "both": Arm("both", True, "found"),
    # What `both` would reach with an index that always finds: the rest is reading.
    "ceiling": Arm("right passage given", True, "right"),
}


class Prompt(NamedTuple):
    """The user message, and its passages; an empty text is answered without asking a model."""

    text: str
    hits: Sequence[Hit] = ()


class Prompts:
    """Makes the prompts of questions from one index; each question is looked up once."""

    def __init__(self, index: DocumentIndex, embedder: Embedder | None, top_k: int) -> None:
        self._index, self._embedder, self._top_k = index, embedder, top_k
        self._by_question: dict[str, Prompt] = {}

    def of(self, arm: Arm, question: str, right: Sequence[Hit] = ()) -> Prompt:
        """The prompt of an arm; `right` are the passages that hold the answer."""
        if arm.passages == "none":
            return Prompt(question)
        if arm.passages == "right":
            return (
                Prompt(grounded_question(question, right[:1]), right[:1]) if right else Prompt("")
            )
        if question not in self._by_question:
            hits = self._index.search(question, top_k=self._top_k, embedder=self._embedder)
            prompt = grounded(question, [hit.as_lookup() for hit in hits])
            self._by_question[question] = Prompt(prompt["text"], hits_of(prompt["passages"]))
        return self._by_question[question]
