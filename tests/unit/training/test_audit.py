"""The label audit: each known bug of upstream trainers is caught, under its rule, by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from tests.unit.training import upstream_bugs as bugs

from phi3_training.errors import StageError
from phi3_training.finetune.audit import RULES, Row, SeenPacked, SystemTurn, audit, audit_packed
from phi3_training.finetune.rows import audited, encode_rows
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import AuditRule

TEXTS = ["Who founded Microsoft?", "Bill Gates and Paul Allen founded Microsoft in 1975."] * 5
# Templates of other families, for the system turn: the name says what they do with it.
TEMPLATES = {
    "own default": (
        "{%- if messages[0]['role'] != 'system' %}{{- '<|system|>\\nBe kind.<|end|>\\n' }}"
        "{%- endif %}{%- for m in messages %}"
        "{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{%- endfor %}"
        "{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
    ),
    "inside the user turn": (
        "{%- set said = namespace(text='') %}{%- for m in messages %}"
        "{%- if m['role'] == 'system' %}{%- set said.text = m['content'] + '\\n' %}"
        "{%- elif m['role'] == 'user' %}"
        "{{- '<|user|>\\n' + said.text + m['content'] + '<|end|>\\n' }}"
        "{%- else %}{{- '<|assistant|>\\n' + m['content'] + '<|end|>\\n' }}{%- endif %}"
        "{%- endfor %}{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tokenizer(TEXTS, path, vocab_size=600, model_max_length=512)
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return ChatFormat.from_folder(folder)


@pytest.fixture(scope="module")
def rows(chat: ChatFormat) -> list[Row]:
    return encode_rows(chat, [(f"data/train.jsonl:{n}", talk(n)) for n in (1, 2, 3)])


def talk(number: int, *, system: str | None = None) -> list[dict[str, str]]:
    said = [
        {"role": "user", "content": f"Who founded Microsoft {number}?"},
        {"role": "assistant", "content": f"Bill Gates, {number}."},
        {"role": "user", "content": "And when?"},
        {"role": "assistant", "content": f"In 1975 and {number}."},
    ]
    return said if system is None else [{"role": "system", "content": system}, *said]


CASES = [
    (bugs.right, set()),
    (bugs.cut_silently, {"cut-answer"}),
    (bugs.cut_on_the_left, {"cut-answer"}),
    (bugs.end_dropped, {"cut-answer"}),
    (bugs.pad_is_eos, {"pad-is-end"}),
    (bugs.end_masked, {"pad-is-end", "no-end"}),
    (bugs.all_masked, {"nothing-trained"}),
    (bugs.all_unmasked, {"everything-trained"}),
    (bugs.searched_as_text, {"nothing-trained"}),
    (bugs.only_last_answer, {"answer-untrained", "no-end"}),
    (bugs.question_too, {"question-trained"}),
    (bugs.shifted, {"shifted-labels", "question-trained", "pad-is-end", "no-end"}),
    (bugs.empty_system, {"empty-system", "other-tokens"}),
    (bugs.default_system, {"added-system", "other-tokens"}),
    (bugs.begin_added, {"other-tokens"}),
]


@pytest.mark.parametrize(("bug", "rules"), CASES, ids=[bug.__name__ for bug, _ in CASES])
def test_every_bug_is_caught(
    bug: bugs.Bug, rules: set[str], rows: list[Row], chat: ChatFormat
) -> None:
    report = audit(rows, [bug(row, chat) for row in rows], chat)
    assert set(report.counts()) == rules
    assert all(count == len(rows) for count in report.counts().values())


def test_one_bad_row_of_many_is_named(rows: list[Row], chat: ChatFormat) -> None:
    seen = [bugs.right(row, chat) for row in rows]
    seen[1] = bugs.all_masked(rows[1], chat)
    with pytest.raises(StageError) as caught:
        audit(rows, seen, chat).refuse(())
    text = str(caught.value)
    assert "nothing-trained (1 of 3 rows)" in text
    assert "data/train.jsonl:2 ('Who founded Microsoft 2?')" in text
    assert "data/train.jsonl:1" not in text
    assert "--allow nothing-trained" in text


def test_a_refusal_has_a_paragraph_and_a_fix_for_each_rule(
    rows: list[Row], chat: ChatFormat
) -> None:
    report = audit(rows, [bugs.empty_system(row, chat) for row in rows], chat)
    with pytest.raises(StageError) as caught:
        report.refuse({"other-tokens"})
    text = str(caught.value)
    assert text.count("Fix:") == 1
    assert RULES["empty-system"].fix in text
    assert "other-tokens" not in text


def test_allowed_rules_pass_and_are_counted(rows: list[Row], chat: ChatFormat) -> None:
    report = audit(rows, [bugs.empty_system(row, chat) for row in rows], chat)
    allow = {"other-tokens", "empty-system"}
    report.refuse(allow)
    noted = report.manifest(allow)
    assert noted.allowed_findings == {"other-tokens": 3, "empty-system": 3}
    assert noted.allow == sorted(allow)
    assert "3 × empty-system" in report.choices()[0]


def test_shares_of_trained_tokens(rows: list[Row], chat: ChatFormat) -> None:
    masked = audit(rows, [bugs.all_masked(row, chat) for row in rows], chat)
    whole = audit(rows, [bugs.all_unmasked(row, chat) for row in rows], chat)
    right = audit(rows, [bugs.right(row, chat) for row in rows], chat)
    mask = rows[0].example.assistant_mask
    assert masked.manifest(()).trained_share.most == 0
    assert whole.manifest(()).trained_share.least == 1
    assert right.shares[0] == pytest.approx(sum(mask) / len(mask))


def test_a_system_turn_of_the_data_is_no_fault(chat: ChatFormat) -> None:
    rows = encode_rows(chat, [("a:1", talk(1, system="Be brief.")), ("a:2", talk(2, system=" "))])
    assert audit(rows, [bugs.right(row, chat) for row in rows], chat).findings == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_add_a_system_turn_are_distinguished_from_those_that_do_not(
    folder: Path, tmp_path: Path, name: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    other = ChatFormat.from_folder(tmp_path)
    rows = encode_rows(other, [("a:1", talk(1))])
    found = audit(rows, [bugs.right(row, other) for row in rows], other)
    assert set(found.counts()) == ({"added-system"} if name == "own default" else set())
    assert (SystemTurn.of(other) is None) == (name != "own default")


def test_a_mask_that_the_format_itself_gets_wrong(rows: list[Row], chat: ChatFormat) -> None:
    ids = rows[0].example.input_ids
    for mask, rule in ((0, "nothing-trained"), (1, "everything-trained")):
        wrong = [Row("a:1", talk(1), type(rows[0].example)(ids, [mask] * len(ids)))]
        found = audit(wrong, [bugs.right(row, chat) for row in wrong], chat)
        assert set(found.counts()) == {rule}
    open_end = [int(bool(m) and i not in chat.stop_token_ids)
                for i, m in zip(ids, rows[0].example.assistant_mask, strict=True)]  # fmt: skip
    wrong = [Row("a:1", talk(1), type(rows[0].example)(ids, open_end))]
    found = audit(wrong, [bugs.right(row, chat) for row in wrong], chat)
    assert set(found.counts()) == {"no-end"}


def test_rows_too_long_stop_the_training(rows: list[Row], chat: ChatFormat) -> None:
    with pytest.raises(StageError, match=r"cut-answer \(3 of 3 rows\)"):
        audited(chat, rows, 12)


def test_rows_too_long_are_cut_where_that_is_allowed(rows: list[Row], chat: ChatFormat) -> None:
    size = len(rows[0].example.input_ids)
    kept, report = audited(chat, rows, size - 4, ["cut-answer"])
    assert [len(row.example.input_ids) for row in kept] == [size - 4] * 3
    assert report.counts() == {"cut-answer": 3}
    # What was cut knowingly is no new fault when the trainer's rows are looked at.
    again = audit(kept, [bugs.right(row, chat) for row in kept], chat)
    assert again.findings == []


def test_rows_that_teach_nothing_are_left_out_where_that_is_allowed(
    rows: list[Row], chat: ChatFormat
) -> None:
    with pytest.raises(StageError, match="nothing to train on"):
        audited(chat, rows, 2, ["cut-answer", "nothing-trained"])


def test_packed_rows(rows: list[Row], chat: ChatFormat) -> None:
    def rules(packed: list[SeenPacked]) -> set[str]:
        return set(audit_packed(rows, packed, chat).counts())

    assert rules([bugs.packed_right(rows[:2]), bugs.packed_right(rows[2:])]) == set()
    assert rules([bugs.packed_without_mask(rows)]) == {"everything-trained", "packed-mask"}
    assert rules([bugs.packed_without_borders(rows)]) == {"packed-sight"}
    assert "cut-answer" in rules(bugs.packed_and_torn(rows))
    assert rules([bugs.packed_right(rows[:2])]) == {"cut-answer", "packed-mask"}


def test_packing_against_mask_reports_both_counts(rows: list[Row], chat: ChatFormat) -> None:
    before = sum(sum(row.example.assistant_mask) for row in rows)
    after = sum(len(row.example.input_ids) for row in rows)
    report = audit_packed(rows, [bugs.packed_without_mask(rows)], chat)
    with pytest.raises(StageError, match=f"{before} tokens to learn before .* {after} after"):
        report.refuse(())


def test_the_same_conversation_twice_is_two_rows(rows: list[Row], chat: ChatFormat) -> None:
    twice = [rows[0], rows[0]]
    assert audit_packed(twice, [bugs.packed_right(twice)], chat).findings == []
    assert audit_packed(twice, [bugs.packed_right(twice[:1])], chat).findings


def test_rules_have_texts_for_exactly_the_names_of_the_recipe() -> None:
    assert tuple(RULES) == get_args(AuditRule)
    assert json.dumps(RULES)  # plain texts
    assert all(rule.what.endswith(".") and rule.fix.endswith(".") for rule in RULES.values())
