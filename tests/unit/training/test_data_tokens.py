"""Lengths in tokens, and `data show --tokens`: the exact training text, what is learnt marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training import cli
from phi3_training.data import check, prepare, show
from phi3_training.data.check import TokenViewer
from phi3_training.data.findings import SAMPLE
from phi3_training.errors import DataError, UsageError
from phi3_training.finetune.rows import TokenRules, chat_of
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.manifests import BaseManifest
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import DataSection
from phi3_training.run import Run

TEXTS = ["You are kind.", "What is a tent?", "A small house of cloth.", "Thanks!", "Bye now."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tokenizer(TEXTS, path, vocab_size=400, model_max_length=512)
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, TEXTS, strict=True)]
    path = tmp_path / "a.jsonl"
    rows = [{"messages": messages}, {"prompt": "Say <|end|> é?", "completion": "No."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_learnt_stretches_are_the_answers_with_their_ends(folder: Path, chats: Path) -> None:
    view = TokenViewer(folder).view(show(chats, 1)[0])

    assert [s.text.strip() for s in view.stretches if s.trained] == [
        "A small house of cloth.<|end|>",
        "Bye now.<|end|><|endoftext|>",
    ]
    assert [s.trained for s in view.stretches] == [False, True, False, True]


def test_stretches_together_are_all_tokens_as_the_trainer_gets_them(
    folder: Path, chats: Path
) -> None:
    chat = ChatFormat.from_folder(folder)
    for conversation in show(chats, 2):
        view = TokenViewer(folder).view(conversation)
        example = chat.encode_example([m.to_dict() for m in conversation.messages])
        assert (view.ids, view.mask) == (example.input_ids, example.assistant_mask)
        text = "".join(s.text for s in view.stretches)
        for message in conversation.messages:
            assert message.content in text


def test_folder_without_a_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        TokenViewer(tmp_path)


def test_command_shows_learnt_tokens_as_json_and_as_text(
    folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "show", str(chats), "-n", "1", "--tokens", "--model", str(folder)]

    assert cli.main([*words, "-o", "json"]) == 0
    (view,) = json.loads(capsys.readouterr().out)
    assert view["trained"] == sum(view["assistant_mask"]) > 0
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert f"a.jsonl:1: {view['trained']} of {view['tokens']} tokens are trained on" in text
    # No colour where the output is a file: the marks tell.
    assert "trained tokens are in ⟦ ⟧" in text
    assert "<|assistant|>⟦ A small house of cloth.<|end|>⟧" in text.replace("\n", "")


def test_command_takes_the_model_of_the_last_run(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "show", str(chats), "--tokens", "--runs", str(tmp_path / "runs")]
    assert cli.main(words) == 2
    assert "--model FOLDER" in capsys.readouterr().err

    run = Run.open(tmp_path / "runs" / "a")
    run.write(BaseManifest(path=str(folder)))
    assert cli.main(words) == 0
    assert "tokens are trained on" in capsys.readouterr().out


def test_learnt_text_is_coloured_on_a_terminal(folder: Path, chats: Path) -> None:
    import io

    from rich.console import Console

    from phi3_training.commands.data import coloured

    stream = io.StringIO()
    view = TokenViewer(folder).view(show(chats, 1)[0])
    Console(file=stream, force_terminal=True, soft_wrap=True).print(
        coloured(view.stretches, marked=False)
    )

    assert "\x1b[32m A small house of cloth.<|end|>\x1b[0m" in stream.getvalue()


def test_lengths_are_counted_with_a_tokenizer(folder: Path, chats: Path) -> None:
    viewer = TokenViewer(folder)
    counts = [len(viewer.view(conversation).ids) for conversation in show(chats, 9)]
    tokens = check([chats], folder).tokens

    assert tokens is not None
    assert (tokens.total, tokens.longest) == (sum(counts), max(counts))
    assert tokens.how == f"counted with the tokenizer of {folder}"


def test_lengths_are_estimated_without_a_tokenizer(chats: Path) -> None:
    report = check([chats])

    assert report.tokens is not None
    assert report.tokens.how.startswith("estimated")
    assert report.lines()[1].startswith("tokens: median ")


def test_many_rows_are_counted_by_a_sample(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    rows = [
        {"prompt": f"What is a tent {i}?", "completion": "A house."} for i in range(SAMPLE + 500)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = check([path], folder).tokens

    assert tokens is not None
    assert tokens.rows == SAMPLE + 500
    assert tokens.how.startswith(f"estimated from {SAMPLE} rows")
    one = len(TokenViewer(folder).view(show(path, 1)[0]).ids)
    assert abs(tokens.mean - one) < 5


def test_lengths_are_in_the_manifest(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"Tent {i}?", "completion": "Yes."} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run.open(tmp_path / "run")

    tokens = prepare(DataSection(train=[path]), run, tokenizer=folder).tokens
    assert tokens is not None
    assert tokens.rows == 9
    assert tokens.how.startswith("counted")


def test_check_command_writes_every_fault_to_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, report = tmp_path / "a.jsonl", tmp_path / "report.txt"
    path.write_text("17\n" * 30)

    assert cli.main(["data", "check", str(path), "--report", str(report)]) == 1
    assert "(every row: --report FILE, or -o json)" in capsys.readouterr().out
    lines = report.read_text().splitlines()
    assert len(lines) == 30
    assert lines[29].startswith(f"fault: {path}:30: the line is a number")


# The template that Phi-3-mini was published with in April 2024 has no place for a system turn.
OLD_PHI3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>\n' }}"
    "{% endif %}{% endfor %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + OLD_PHI3
)


@pytest.mark.parametrize("template", [OLD_PHI3, REFUSES_SYSTEM])
def test_a_system_turn_that_the_template_drops_is_a_fault_with_its_line(
    tmp_path: Path, chats: Path, template: str
) -> None:
    model = tmp_path / "old"
    make_tokenizer(TEXTS, model, vocab_size=400, model_max_length=512)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")

    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "Is it far?", "completion": "No, it is near."}\n')
    data = DataSection(train=[chats], validation=[held_out])
    run, rules = Run.open(tmp_path / "run"), TokenRules(chat_of(model), data)
    with pytest.raises(DataError) as caught:
        prepare(data, run, tokenizer=model, rules=rules)

    (fault,) = caught.value.faults
    assert "a.jsonl:1: the model's chat template or tokenizer refuses it" in str(fault)
    assert "system" in str(fault).lower()
