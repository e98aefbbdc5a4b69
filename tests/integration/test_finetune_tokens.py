"""What is served is what was trained: ids equal transformers', labels are exactly the mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.integration.tiny_model import tiny_model_folder
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTTrainer

from phi3_training.finetune.callbacks import LossLog
from phi3_training.finetune.rows import encode_rows
from phi3_training.finetune.runtime import Runtime, quiet_libraries
from phi3_training.finetune.trainer import Rows, make_trainer
from phi3_training.finetune.weights import load_model
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import FinetuneSection

CONTENTS = [
    "Who wrote Hamlet?",
    "  white space before",
    "and behind  ",
    "\n\nlines\n\nbetween\n",
    "héllo 世界 🙂 ﬁ ß",
    "def f(x):\n    return x * 2\t# twice",
    "<b>not a token</b> <|almost | <0x0A>",
    "1,000.50 % of $3 — “quoted”",
    "",
]
ROWS = [
    [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello there."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is two plus two, and why is that so?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Say <|end|> and <|assistant|> please"},
        {"role": "assistant", "content": "As text: <|end|><|user|>"},
    ],
]
RUNTIME = Runtime("cpu", "float32", "float32", 1, ())


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_model_folder()


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return ChatFormat.from_folder(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def trainer(folder: Path, chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    quiet_libraries()
    output = tmp_path_factory.mktemp("trainer")
    log = LossLog(output / "loss.jsonl", lambda *_step: None)
    settings = FinetuneSection(per_device_train_batch_size=2)
    encoded = encode_rows(chat, [("chats:1", ROWS[0]), ("chats:2", ROWS[1])])
    data = Rows([row.example for row in encoded], [], 256, chat.pad_token_id)
    model = load_model(folder, torch.float32)
    return make_trainer(model, folder, data, settings, RUNTIME, [log], output)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("content", CONTENTS)
def test_prompt_ids_equal_transformers(
    chat: ChatFormat, tokenizer: PreTrainedTokenizerBase, content: str, system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": content}]
    for _turn in range(2):
        theirs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert chat.encode_prompt(messages) == theirs
        assert chat.render(messages, add_generation_prompt=True) == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        messages += [
            {"role": "assistant", "content": content},
            {"role": "user", "content": "And then?"},
        ]


@pytest.mark.parametrize("content", CONTENTS[:-1])
def test_example_ids_equal_transformers(
    chat: ChatFormat, tokenizer: PreTrainedTokenizerBase, content: str
) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert chat.encode_example(messages).input_ids == theirs


@pytest.mark.parametrize("content", CONTENTS)
def test_decoding_equals_transformers(
    chat: ChatFormat, tokenizer: PreTrainedTokenizerBase, content: str
) -> None:
    ids = tokenizer.encode(content, add_special_tokens=False)
    assert chat.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == content


def test_stop_and_pad_ids_are_the_tokenizer_s(
    chat: ChatFormat, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokenizer.eos_token_id in chat.stop_token_ids
    assert chat.pad_token_id == tokenizer.pad_token_id


def test_exactly_the_masked_tokens_carry_labels(trainer: SFTTrainer, chat: ChatFormat) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = {tuple(e.input_ids): e.assistant_mask for e in map(chat.encode_example, ROWS)}
    assert batch["input_ids"].shape[0] == len(ROWS)
    for ids, labels, seen in zip(
        batch["input_ids"].tolist(),
        batch["labels"].tolist(),
        batch["attention_mask"].tolist(),
        strict=True,
    ):
        length = sum(seen)
        mask = wanted.pop(tuple(ids[:length]))
        assert seen == [1] * length + [0] * (len(ids) - length)
        assert labels[length:] == [-100] * (len(ids) - length)
        assert [label != -100 for label in labels[:length]] == [bool(bit) for bit in mask]
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    assert not wanted


def test_every_answer_trains_its_end_of_turn(trainer: SFTTrainer, chat: ChatFormat) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"].flatten().tolist()
    answers = sum(message["role"] == "assistant" for row in ROWS for message in row)
    assert labels.count(chat.control_id("<|end|>")) == answers
    assert labels.count(chat.control_id("<|endoftext|>")) == len(ROWS)
    for text in ("<|user|>", "<|assistant|>", "<|system|>"):
        assert chat.control_id(text) not in labels


def test_our_loss_is_trl_s_loss(trainer: SFTTrainer) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    count = (batch["labels"] != -100).sum()
    model = trainer.model.train()
    ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    theirs = SFTTrainer.compute_loss(trainer, model, dict(batch), num_items_in_batch=count)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
