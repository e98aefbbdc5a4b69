"""What the label audit would stop is refused, skipped or cut before a base model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phi3_training import cli
from phi3_training.data import prepare
from phi3_training.errors import DataError, StageError
from phi3_training.finetune.rows import (
    TokenRules,
    audited,
    chat_of,
    encode_rows,
    read_located,
    trainable,
)
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import DataSection
from phi3_training.run import Run

LIMIT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    texts = ["What is number?", "It is a long number."]
    make_tokenizer(texts, path, vocab_size=400, model_max_length=512)
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return chat_of(folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run")


def write(path: Path, rows: int, long: Sequence[int] = (), bad: Sequence[int] = ()) -> Path:
    """Rows of some 20 tokens, those of these numbers (from 1) beyond LIMIT or without answer."""
    lines: list[Any] = []
    for number in range(1, rows + 1):
        answer = "" if number in bad else f"It is {number}." + " long" * 40 * (number in long)
        lines.append({"prompt": f"What is number {number}?", "completion": answer})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prepared(source: Path, run: Run, chat: ChatFormat, **keys: Any) -> Any:
    data = DataSection(train=[source], max_length=LIMIT, **keys)
    return prepare(data, run, rules=TokenRules(chat, data))


def test_a_row_beyond_max_length_is_refused_with_its_line(
    tmp_path: Path, run: Run, chat: ChatFormat
) -> None:
    source = write(tmp_path / "a.jsonl", 40, long=[7])

    with pytest.raises(DataError) as caught:
        prepared(source, run, chat)

    (fault,) = caught.value.faults
    size = len(encode_rows(chat, [("", talk(7))])[0].example.input_ids)
    assert (fault.path, fault.line, fault.kind) == (source, 7, "too-long")  # type: ignore[attr-defined]
    assert f"it has {size} tokens, data.max_length is {LIMIT}" in str(fault)
    assert "data.too_long=skip or cut" in str(fault)
    # The same rows as the audit of the training, which comes after the base was loaded.
    with pytest.raises(StageError, match=r"cut-answer \(1 of 40 rows\)"):
        audited(chat, encode_rows(chat, [("", talk(n, [7])) for n in range(1, 41)]), LIMIT)


def talk(number: int, long: Sequence[int] = (7,)) -> list[dict[str, str]]:
    answer = f"It is {number}." + " long" * 40 * (number in long)
    return [
        {"role": "user", "content": f"What is number {number}?"},
        {"role": "assistant", "content": answer},
    ]


def test_skipped_rows_are_left_out_counted_and_listed(
    tmp_path: Path, run: Run, chat: ChatFormat
) -> None:
    source = write(tmp_path / "a.jsonl", 40, long=[7], bad=[9])

    manifest = prepared(source, run, chat, bad_rows="skip", too_long="skip")

    assert manifest.removed == {"data.bad_rows": 1, "data.too_long": 1}
    assert sum(part.rows for part in manifest.outputs.values()) == 38
    written = "".join(path.read_text() for path in (run.path / "data").glob("*.jsonl"))
    assert "number 7?" not in written
    assert "number 9?" not in written
    report = (run.path / "data-report.txt").read_text()
    assert f"skipped: {source}:7: it has" in report
    assert f"skipped: {source}:9: completion is empty" in report
    assert any("1 row (data.too_long), listed in data-report.txt" in c for c in manifest.choices)


@pytest.mark.parametrize(("bad", "passes"), [(2, True), (3, False)])
def test_the_ceiling_of_skipped_rows(
    tmp_path: Path, run: Run, chat: ChatFormat, bad: int, passes: bool
) -> None:
    source = write(tmp_path / "a.jsonl", 40, bad=range(1, bad + 1))  # 5 % of 40 rows are 2

    if passes:
        assert prepared(source, run, chat, bad_rows="skip").removed == {"data.bad_rows": 2}
        return
    with pytest.raises(DataError, match=r"3 of 40 rows \(7.5%\) would be skipped.* 5.0%"):
        prepared(source, run, chat, bad_rows="skip")
    assert prepared(source, run, chat, bad_rows="skip", max_skipped=0.1).removed


def test_cut_rows_stay_and_are_trained_on_up_to_the_limit(
    tmp_path: Path, run: Run, chat: ChatFormat
) -> None:
    source = write(tmp_path / "a.jsonl", 40, long=[7])
    data = DataSection(train=[source], validation=[write(tmp_path / "h.jsonl", 1)],
                       max_length=LIMIT, too_long="cut", duplicates="remove")  # fmt: skip

    manifest = prepare(data, run, rules=TokenRules(chat, data))

    assert manifest.warnings["cut to data.max_length"] == 1
    assert f"cut: {source}:7: it has" in (run.path / "data-report.txt").read_text()
    located = list(read_located(run.path / "data" / "train.jsonl", run.path))
    rows, told = trainable(chat, located, LIMIT, data)
    assert told == [f"cut: 1 rows of more than {LIMIT} tokens (data.too_long)"]
    kept, _ = audited(chat, rows, LIMIT, ["cut-answer", "nothing-trained"])
    assert max(len(row.example.input_ids) for row in kept) == LIMIT


def test_training_skips_what_only_it_can_see(chat: ChatFormat) -> None:
    located = [(f"data/train.jsonl:{n}", talk(n, [7])) for n in range(1, 41)]
    data = DataSection(train=[Path("a")], max_length=LIMIT, too_long="skip")

    rows, told = trainable(chat, located, LIMIT, data)

    assert [row.place for row in rows] == [place for place, _ in located if place[-2:] != ":7"]
    assert told == [f"skipped: 1 rows of more than {LIMIT} tokens (data.too_long)"]
    strict = data.model_copy(update={"max_skipped": 0.01})
    with pytest.raises(StageError, match=r"1 of 40 rows.*data/train.jsonl:7"):
        trainable(chat, located, LIMIT, strict)


def test_copies_that_the_training_makes_count(tmp_path: Path, run: Run, chat: ChatFormat) -> None:
    source = write(tmp_path / "a.jsonl", 10)
    size = max(len(row.example.input_ids) for row in encode_rows(
        chat, [("", talk(n, ())) for n in range(1, 11)]))  # fmt: skip
    data = DataSection(train=[source], max_length=size, rewordings=6)

    with pytest.raises(DataError, match=r"tokens \(reworded, \d\), data.max_length is"):
        prepare(data, run, rules=TokenRules(chat, data))
    plain = data.model_copy(update={"rewordings": 0})
    assert prepare(plain, run, rules=TokenRules(chat, plain)).removed == {}


def test_allowed_rules_are_no_faults_and_templates_are_asked(
    tmp_path: Path, run: Run, chat: ChatFormat, folder: Path
) -> None:
    source = write(tmp_path / "a.jsonl", 40, long=[7])
    data = DataSection(train=[source], max_length=LIMIT)
    assert prepare(data, run, rules=TokenRules(chat, data, allow=["cut-answer"])).removed == {}

    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((folder / name).read_text())
    # As Phi-3 first came: no place for a system turn.
    (other / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    )
    talks = [{"messages": [{"role": "system", "content": "Be brief."}, *talk(1, ())]}]
    talks += [{"messages": talk(n, ())} for n in (2, 3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in talks))

    with pytest.raises(DataError, match=r"a.jsonl:1: .*no place for a system prompt"):
        prepare(data, run, rules=TokenRules(chat_of(other), data))


def test_check_of_a_recipe_says_what_prepare_would(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", 40, long=[7])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nmodel: {{name_or_path: {folder}}}\n"
        f"data: {{train: a.jsonl, max_length: {LIMIT}}}\n"
    )

    assert cli.main(["data", "check", str(recipe)]) == 1
    assert f"{source}:7: it has" in capsys.readouterr().out
    assert cli.main(["data", "check", str(recipe), "data.too_long=skip"]) == 0
    shown = capsys.readouterr().out
    assert f"1 row will be skipped:\n  {source}:7: it has" in shown
    assert cli.main(["data", "check", str(recipe), "data.too_long=cut", "-o", "json"]) == 0
    assert [row["line"] for row in json.loads(capsys.readouterr().out)["cut"]] == [7]
    assert cli.main(["data", "check", str(source), "--model", str(folder)]) == 0


def test_a_file_that_breaks_off_is_never_skipped(
    tmp_path: Path, run: Run, chat: ChatFormat
) -> None:
    source = tmp_path / "a.json"
    rows = [{"prompt": f"What is number {n}?", "completion": f"{n}."} for n in range(40)]
    source.write_text(json.dumps(rows).removesuffix("]") + ", {broken")

    with pytest.raises(DataError, match="broken JSON"):
        prepared(source, run, chat, bad_rows="skip")
