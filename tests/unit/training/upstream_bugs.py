"""Label bugs of widely used trainers, each as a function: a right row in, what was trained out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from phi3_training.finetune.audit import IGNORED, Row, Seen, SeenPacked, expected_labels
from phi3_training.prompt import ChatFormat

Bug = Callable[[Row, ChatFormat], Seen]


def right(row: Row, _chat: ChatFormat) -> Seen:
    """No bug."""
    return Seen(row.example.input_ids, expected_labels(row.example))


def cut_silently(row: Row, _chat: ChatFormat) -> Seen:
    """Rows longer than a limit lose their ends (trl#3927; a limit that a renamed key never set)."""
    limit = len(row.example.input_ids) - 4
    return Seen(row.example.input_ids[:limit], expected_labels(row.example)[:limit])


def cut_on_the_left(row: Row, _chat: ChatFormat) -> Seen:
    """Truncation from the left eats the question."""
    return Seen(row.example.input_ids[3:], expected_labels(row.example)[3:])


def pad_is_eos(row: Row, chat: ChatFormat) -> Seen:
    """A collator masks padding by its id, which is the end of text's (LLaMA-Factory PR 7413)."""
    ids = row.example.input_ids
    labels = expected_labels(row.example)
    pairs = zip(ids, labels, strict=True)
    return Seen(ids, [IGNORED if i == chat.pad_token_id else label for i, label in pairs])


def end_masked(row: Row, chat: ChatFormat) -> Seen:
    """The answers' ends are not among what is learnt (chat templates that close turns outside)."""
    labels = [IGNORED if i in chat.stop_token_ids else i for i in expected_labels(row.example)]
    return Seen(row.example.input_ids, labels)


def all_masked(row: Row, _chat: ChatFormat) -> Seen:
    """The assistant mask is all zero: no generation block in the template (transformers#34494)."""
    return Seen(row.example.input_ids, [IGNORED] * len(row.example.input_ids))


def all_unmasked(row: Row, _chat: ChatFormat) -> Seen:
    """The assistant mask is all one (Megatron-Bridge PR 3927)."""
    return Seen(row.example.input_ids, row.example.input_ids)


def searched_as_text(row: Row, chat: ChatFormat) -> Seen:
    """Answers are found by the tokens of "<|assistant|>" and a line feed (unsloth#1501).

    Phi-3's tokenizer swallows the line feed behind the control token, so nothing is found.
    """
    ids = row.example.input_ids
    opening = chat.control_id("<|assistant|>")
    line_feed = chat.encode_prompt([{"role": "user", "content": "a\na"}])[-4:-3]
    assert chat.decode(line_feed) == "\n"
    marker = [opening, *line_feed]
    labels = [IGNORED] * len(ids)
    for at in range(len(ids) - len(marker)):
        if ids[at : at + len(marker)] == marker:
            labels[at + len(marker) :] = ids[at + len(marker) :]
    return Seen(ids, labels)


def only_last_answer(row: Row, _chat: ChatFormat) -> Seen:
    """Of several answers the last one alone is learnt, with nobody having asked for it."""
    mask = row.example.assistant_mask
    last = len(mask) - 1 - mask[::-1].index(0)
    labels = [
        IGNORED if i < last else label for i, label in enumerate(expected_labels(row.example))
    ]
    return Seen(row.example.input_ids, labels)


def question_too(row: Row, _chat: ChatFormat) -> Seen:
    """A part of the question is learnt."""
    ids, labels = row.example.input_ids, expected_labels(row.example)
    return Seen(ids, [*ids[:3], *labels[3:]])


def shifted(row: Row, _chat: ChatFormat) -> Seen:
    """Labels shifted by hand, which the model then shifts again."""
    return Seen(row.example.input_ids, [*expected_labels(row.example)[1:], IGNORED])


def empty_system(row: Row, chat: ChatFormat) -> Seen:
    """A template writes a system turn with nothing in it."""
    turn = [chat.control_id("<|system|>"), chat.control_id("<|end|>")]
    return _in_front(turn, row)


def default_system(row: Row, chat: ChatFormat) -> Seen:
    """A template writes a system prompt that the data does not have."""
    said = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "x"}]
    ids = chat.encode_prompt(said)
    return _in_front(ids[: ids.index(chat.control_id("<|user|>"))], row)


def begin_added(row: Row, chat: ChatFormat) -> Seen:
    """A beginning of text that the served prompt has not (trl PR 5526, mlx-examples#780)."""
    return _in_front([chat.control_id("<s>")], row)


def end_dropped(row: Row, _chat: ChatFormat) -> Seen:
    """The template's last tokens are left out (gpt4all#2271)."""
    return Seen(row.example.input_ids[:-2], expected_labels(row.example)[:-2])


def _in_front(ids: Sequence[int | None], row: Row) -> Seen:
    known = [i for i in ids if i is not None]
    labels = [IGNORED] * len(known)
    return Seen([*known, *row.example.input_ids], [*labels, *expected_labels(row.example)])


def packed_right(rows: Sequence[Row]) -> SeenPacked:
    """Packed as it should be."""
    ids = [i for row in rows for i in row.example.input_ids]
    labels = [i for row in rows for i in expected_labels(row.example)]
    return SeenPacked(ids, labels, [i for row in rows for i in range(len(row.example.input_ids))])


def packed_without_mask(rows: Sequence[Row]) -> SeenPacked:
    """Packing switches the assistant-only loss off (trl#3728)."""
    right = packed_right(rows)
    return SeenPacked(right.input_ids, right.input_ids, right.positions)


def packed_without_borders(rows: Sequence[Row]) -> SeenPacked:
    """Packed conversations see each other: positions run through."""
    right = packed_right(rows)
    return SeenPacked(right.input_ids, right.labels, range(len(right.input_ids)))


def packed_and_torn(rows: Sequence[Row]) -> list[SeenPacked]:
    """One long text is cut every so many tokens, through the middle of answers."""
    right = packed_right(rows)
    middle = len(right.input_ids) // 2 + 3
    return [
        SeenPacked(right.input_ids[part], right.labels[part], range(len(right.input_ids[part])))
        for part in (slice(0, middle), slice(middle, None))
    ]
