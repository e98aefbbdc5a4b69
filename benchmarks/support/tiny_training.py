"""Our fine-tuning against the tutorials' own way, on the same tiny base and the same chats.

The baseline does what the tutorials' training script does, written here: all weights learn, chats
are strung together and cut into rows of max_length wherever that falls, the last one is padded,
questions count in the loss like answers, attention is eager. Both see the same conversations
(casual copies and old chats too) equally often. Ours is the shipped recipe; the baseline has the
learning rate with which it answered the held-out questions best. Under three minutes on two cores.
Run: python benchmarks/train_cpu.py --model tiny. Prints a table; works in a temporary folder.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from phi3_training.data import prepare
from phi3_training.evaluate.answers import ask_all
from phi3_training.finetune import finetune, prepare_base
from phi3_training.finetune.rewordings import with_casual_copies
from phi3_training.finetune.rows import read_located, read_rows
from phi3_training.finetune.runtime import quiet_libraries, torch_threads
from phi3_training.manifests import ModelManifest
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run

RECIPE = Path(__file__).parents[2] / "training/recipes/phi3-tiny.yaml"
EPOCHS = 10
# Of 2e-4, 5e-4, 1e-3, 2e-3, 4e-3 and 8e-3 the one with the most right held-out answers. Those up to
# 1e-3 keep up to three quarters of the old answers and learn none of the new.
BASELINE_LEARNING_RATE = 8e-3
BASELINE_BATCH = 4


@dataclass(frozen=True)
class Result:
    """What one way cost and gave."""

    seconds: float
    tokens: int  # of the conversations, times epochs
    answer_tokens: int
    right: dict[str, float]


def train_ours(recipe: Recipe, run: Run) -> tuple[float, ModelManifest, Path]:
    """The product's own stage, from loading the base to the written model."""
    started = time.perf_counter()
    manifest = finetune(recipe, run)
    return time.perf_counter() - started, manifest, run.path / manifest.path


def train_baseline(recipe: Recipe, run: Run) -> tuple[float, Path]:
    """The tutorials' way, from loading the base to the written model."""
    base, target = run.path / "base", run.path / "baseline"
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in conversations(run)]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    settings = SFTConfig(
        output_dir=str(target),
        learning_rate=BASELINE_LEARNING_RATE,
        num_train_epochs=recipe.finetune.num_train_epochs,
        per_device_train_batch_size=BASELINE_BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=0.2,
        seed=recipe.finetune.seed,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        max_length=recipe.data.max_length,
        packing=True,
        packing_strategy="wrapped",
        pad_to_multiple_of=recipe.data.max_length,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(target)
    return time.perf_counter() - started, target


def conversations(run: Run) -> list[list[dict[str, str]]]:
    """What both ways learn: the new chats, their casual copies and the old chats."""
    new = list(read_located(run.path / "data" / "train.jsonl", run.path))
    return [row for _, row in with_casual_copies(new)] + read_rows([run.path / "data/replay.jsonl"])


def exact_match(folder: Path, run: Run) -> dict[str, float]:
    """The share of answers that are right to the letter: held-out, trained and old questions."""
    chat = ChatFormat.from_folder(run.path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for part in ("validation", "train", "replay"):
        rows = read_rows([run.path / "data" / f"{part}.jsonl"])
        rows = rows[:: max(1, len(rows) // 60)]
        said = ask_all(
            model,
            run.path / "base",
            chat,
            [row[:-1] for row in rows],
            max_new_tokens=48,
            at_once=32,
        )
        pairs = zip(said, rows, strict=True)
        right = sum(s is not None and s.text.strip() == row[-1]["content"] for s, row in pairs)
        found[part] = right / len(rows)
    return found


def compare(folder: Path, epochs: int) -> tuple[Result, Result]:
    """Make chats and base once, then train both ways one after the other."""
    recipe = load_recipe(RECIPE, [f"finetune.num_train_epochs={epochs}"])
    run = Run.open(folder / "run")
    run.write(prepare(recipe.data, run))
    run.write(prepare_base(recipe, run))
    with torch_threads(1):
        seconds, manifest, model = train_ours(recipe, run)
        tokens, answers = (manifest.tokens or 0) * epochs, (manifest.learnt_tokens or 0) * epochs
        ours = Result(seconds, tokens, answers, exact_match(model, run))
        seconds, model = train_baseline(recipe, run)
        theirs = Result(seconds, tokens, answers, exact_match(model, run))
    return ours, theirs


def main() -> None:
    """Compare, print the table and one line of JSON."""
    quiet_libraries()
    epochs = EPOCHS
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = compare(Path(folder), epochs)
    rows = [
        ("seconds, base to written model", ours.seconds, theirs.seconds),
        ("tokens of chats / s", ours.tokens / ours.seconds, theirs.tokens / theirs.seconds),
        (
            "answer tokens learnt / s",
            ours.answer_tokens / ours.seconds,
            theirs.answer_tokens / theirs.seconds,
        ),
    ]
    rows += [
        (f"exact match %, {part}", 100 * ours.right[part], 100 * theirs.right[part])
        for part in ours.right
    ]
    print(f"{epochs} epochs, one thread, {ours.tokens // epochs} tokens an epoch")
    print(f"{'':32}{'ours':>10}{'baseline':>10}{'ratio':>8}")
    for label, mine, other in rows:
        ratio = f"{mine / other:.2f}" if other else "-"
        print(f"{label:32}{mine:>10.1f}{other:>10.1f}{ratio:>8}")
    print(f"the whole run took {time.perf_counter() - began:.0f} s")
    print(json.dumps({"rows": rows, "epochs": epochs}))
