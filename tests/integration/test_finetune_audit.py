"""The label audit on what real trainers and collators make of rows, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tests.integration.finetune_fixture import CHATS, make_base, make_recipe
from transformers import AutoTokenizer, DataCollatorForLanguageModeling
from trl import SFTConfig, SFTTrainer

from phi3_training.cli import main
from phi3_training.finetune.audit import Row, Seen, SeenPacked, audit, audit_packed, expected_labels
from phi3_training.finetune.rows import encode_rows
from phi3_training.finetune.trainer import audit_trainer
from phi3_training.finetune.weights import chat_format, load_model
from phi3_training.manifests import BaseManifest, ModelManifest
from phi3_training.prompt import ChatFormat
from phi3_training.run import Run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def chat(base: Path) -> ChatFormat:
    return chat_format(base)


@pytest.fixture(scope="module")
def rows(chat: ChatFormat) -> list[Row]:
    return encode_rows(chat, [(f"data/train.jsonl:{n}", c) for n, c in enumerate(CHATS, start=1)])


def trl_trainer(base: Path, rows: list[Row], folder: Path, **settings: Any) -> SFTTrainer:
    """TRL as tutorials call it, on rows that are right."""
    import torch

    data = Dataset.from_dict(
        {
            "input_ids": [row.example.input_ids for row in rows],
            "labels": [expected_labels(row.example) for row in rows],
        }
    )
    options: dict[str, Any] = {"max_length": 1024, "use_cpu": True, "report_to": [], **settings}
    return SFTTrainer(
        model=load_model(base, torch.float32),
        args=SFTConfig(output_dir=str(folder), **options),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base, local_files_only=True),
    )


def test_trl_with_room_is_right(
    base: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    assert audit_trainer(trl_trainer(base, rows, tmp_path), rows, chat).findings == []


def test_trl_cuts_at_its_own_limit(
    base: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    trainer = trl_trainer(base, rows, tmp_path, max_length=16)
    found = audit_trainer(trainer, rows, chat).counts()
    assert found["cut-answer"] == len(rows)


def test_trl_packing_in_one_stream_tears_conversations(
    base: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    trainer = trl_trainer(
        base, rows, tmp_path, max_length=48, packing=True, packing_strategy="wrapped"
    )
    packed = [
        SeenPacked(row["input_ids"], row["labels"], range(len(row["input_ids"])))
        for row in trainer.train_dataset
    ]
    found = audit_packed(rows, packed, chat).counts()
    assert set(found) >= {"cut-answer", "packed-sight"}
    assert sum(found.values()) >= len(rows)


def test_transformers_collator_masks_the_end_with_the_padding(
    base: Path, rows: list[Row], chat: ChatFormat
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, padding_side="right")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    seen = []
    for row in rows:
        batch = collator([{"input_ids": row.example.input_ids}])
        seen.append(Seen(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    found = audit(rows, seen, chat).counts()
    assert found == {"everything-trained": len(rows), "pad-is-end": len(rows)}


def test_the_command_stops_and_allow_is_recorded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_recipe(tmp_path, base)
    words = ["train", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]
    short = "data.max_length=18"
    assert main([*words, short]) == 1
    said = capsys.readouterr().err
    # Known from the tokenizer, before the base is loaded, and by the person's own file.
    assert "data.max_length is 18" in said
    assert "raise data.max_length, or set data.too_long=skip or cut" in said
    run = Run(tmp_path / "runs" / "small")
    assert run.read(BaseManifest) is None
    assert not (run.path / "finetune" / "loss.jsonl").exists()
    assert main([*words, short, "--allow", "cut-answer"]) == 0
    manifest = run.read(ModelManifest)
    assert manifest is not None
    assert manifest.audit is not None
    assert manifest.audit.allow == ["cut-answer"]
    assert manifest.audit.allowed_findings["cut-answer"] > 0
    capsys.readouterr()
    # What follows needs no --allow: the model is trained.
    assert main([*words, short]) == 0
    assert "already done" in capsys.readouterr().err


def test_too_long_rows_are_cut_where_the_recipe_says_so(base: Path, tmp_path: Path) -> None:
    make_recipe(tmp_path, base)
    words = ["train", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]
    assert main([*words, "data.max_length=18", "data.too_long=cut"]) == 0
    manifest = Run(tmp_path / "runs" / "small").read(ModelManifest)
    assert manifest is not None
    assert any("rows of more than 18 tokens (data.too_long)" in it for it in manifest.choices)
    assert manifest.audit is not None
    assert manifest.audit.allow == []


def test_an_unknown_rule_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--allow", "everything"])
    assert caught.value.code == 2
    assert "nothing-trained" in capsys.readouterr().err


def test_the_audit_is_in_every_manifest(base: Path, tmp_path: Path) -> None:
    make_recipe(tmp_path, base)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]) == 0
    noted = json.loads((tmp_path / "runs" / "small" / "model.json").read_text())["audit"]
    share = noted["trained_share"]
    assert noted["rows"] == len(CHATS)
    assert 0 < share["least"] <= share["median"] <= share["most"] < 1
