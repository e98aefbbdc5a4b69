"""What each rule of the label audit means, and what mends a breach. Names: recipe.AuditRule."""

from __future__ import annotations

from typing import NamedTuple, get_args

from ..recipe import AuditRule


class Rule(NamedTuple):
    """What would go wrong, and the way out."""

    what: str
    mend: str


_TEMPLATE = "Use the model's original chat_template.jinja and tokenizer.json."
_LABELS = (
    "Give the trainer the labels of the chat format unchanged (no collator that makes its own)."
)

RULES: dict[str, Rule] = {
    "nothing-trained": Rule(
        "not one token would be learnt: the whole row is masked.",
        f"See that each conversation has an answer by the assistant. {_LABELS}",
    ),
    "everything-trained": Rule(
        "the questions would be learnt like the answers: nothing is masked.",
        f"{_LABELS} {_TEMPLATE}",
    ),
    "cut-answer": Rule(
        "the row is longer than allowed and would be cut, so that an answer or its end is lost "
        "and the model learns to stop nowhere.",
        "Raise data.max_length as far as the model's context allows (for base.data: "
        "base.max_position_embeddings), or shorten the conversation.",
    ),
    "no-end": Rule(
        "the token that ends an answer (Phi-3's <|end|>) would not be learnt, so that the tuned "
        "model never stops.",
        f"{_TEMPLATE} {_LABELS}",
    ),
    "pad-is-end": Rule(
        "the padding token is also an end of text, and masking the padding masked the end.",
        "Mask by position, not by token id, or give the tokenizer a pad token of its own "
        "(tokenizer_config.json: pad_token).",
    ),
    "answer-untrained": Rule(
        "a part of an answer would not be learnt.",
        "Search answers by token position, not by text: "
        "tokenizers write a text otherwise in other surroundings. "
        f"{_LABELS}",
    ),
    "question-trained": Rule(
        "tokens that the assistant does not say would be learnt.",
        _LABELS,
    ),
    "shifted-labels": Rule(
        "labels stand at the wrong place, so that a wrong token would be learnt.",
        f"The model shifts labels itself. {_LABELS}",
    ),
    "other-tokens": Rule(
        "the tokens are not those of the same conversation when served (a beginning of text, a "
        "line feed or a template more or less).",
        _TEMPLATE,
    ),
    "empty-system": Rule(
        "the row has an empty system turn, which a served prompt without system text has not.",
        f"Drop empty system messages. {_TEMPLATE}",
    ),
    "added-system": Rule(
        "the row has a system turn that the data did not have: the chat template wrote it.",
        f"Write the system message into the data, or take it out of the template. {_TEMPLATE}",
    ),
    "packed-mask": Rule(
        "packing changed how many tokens are learnt: the mask was lost on the way.",
        "Use finetune.packing, which keeps it, or set finetune.packing=false.",
    ),
    "packed-sight": Rule(
        "conversations packed into one row would see each other: positions do not begin anew.",
        "Use finetune.packing, which separates them, or set finetune.packing=false.",
    ),
}

assert tuple(RULES) == get_args(AuditRule)  # noqa: S101 - two lists of the same names
