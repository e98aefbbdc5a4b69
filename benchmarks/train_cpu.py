"""LoRA on this machine's CPU: the product's fast way, its way before, and TRL, in one run.

The model has the shape of `small` (SmolLM2-135M as Phi-3): its own weights with --model FOLDER,
random ones without. All ways learn the shipped chats, 16 rows a step, alternating round by round;
tokens are those of the chats, whatever a way adds as padding. Held against the rate at which this
machine multiplies large matrices, measured in the same rounds. With --model FOLDER also the time
until the answers of the held-out chats cost less than a fixed loss.
Run: python benchmarks/train_cpu.py [--model FOLDER] [--quick]; --model tiny compares the tiny model
with the tutorials' way. Prints a table and a line of JSON; works in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from support import tiny_training
from transformers import (
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from phi3_training.finetune import trainer as product
from phi3_training.finetune.audit import IGNORED
from phi3_training.finetune.rows import encode_rows, read_rows
from phi3_training.finetune.runtime import Runtime, choose_runtime, cpu_flags, quiet_libraries
from phi3_training.finetune.trainer import CpuTrainer
from phi3_training.finetune.weights import load_model, make_tokenizer, peft_config, write_model
from phi3_training.prompt import ChatFormat, Example
from phi3_training.recipe import Recipe, load_recipe

DATA = Path(__file__).parents[1] / "training/data"
ROWS = 16  # a step
RANK = 16
RATE = 1e-3
TARGET = 1.0  # held-out loss of an answer's token; SmolLM2-135M begins at about 2.9
MAX_STEPS = 30  # until then; two epochs of the chats are 20 steps
LOOK_EVERY = 3  # steps between two looks at the held-out chats, whose time does not count
PACKED = 256  # tokens of a packed row of TRL's
TUTORIAL_ROW, TUTORIAL_BATCH, TUTORIAL_RATE = 512, 2, 1e-4

# TRL's own assistant-only loss needs a template that marks the answers.
MARKED = (
    "{%% for m in messages %%}{{ '%(begin)s' + m['role'] + '%(after)s' }}"
    "{%% if m['role'] == 'assistant' %%}{%% generation %%}{{ m['content'] + '%(end)s' }}"
    "{%% endgeneration %%}{%% else %%}{{ m['content'] + '%(end)s' }}{%% endif %%}{{ '\n' }}"
    "{%% endfor %%}"
)
CHATML = MARKED % {"begin": "<|im_start|>", "after": "\n", "end": "<|im_end|>"}
PHI3 = MARKED % {"begin": "<|", "after": "|>\n", "end": "<|end|>"}


class BeforeTrainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """The product's loss before dense.py: the model's own pass, scored where it learns."""

    def compute_loss(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any
    ) -> torch.Tensor:
        """Mean cross entropy of the learnt tokens."""
        plain = model.get_base_model()
        hidden = plain.base_model(input_ids=inputs["input_ids"], use_cache=False)[0]
        labels = inputs["labels"][:, 1:]
        learnt = labels != IGNORED
        logits = plain.get_output_embeddings()(hidden[:, :-1][learnt])
        loss = torch.nn.functional.cross_entropy(logits, labels[learnt], reduction="sum")
        items = learnt.sum() if num_items_in_batch is None else num_items_in_batch
        return torch.div(loss, items)


@dataclass
class Way:
    """One way to train; `make` gives a trainer that learns for this many steps."""

    name: str
    make: Callable[[int], Any]
    speeds: list[float] = field(default_factory=list)  # tokens of chats a second
    thrifts: list[float] = field(default_factory=list)  # the same by CPU seconds of all threads
    reached: tuple[float, float, int] | None = None  # seconds, held-out loss, steps


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Times the steps from the second on, and counts their real tokens."""

    def __init__(self, trainer: Any) -> None:
        self.seconds = self.cpu_seconds = self.tokens = 0.0
        self._began, self._cpu_began, self._count = 0.0, 0.0, 0
        self._step = trainer.training_step
        trainer.training_step = self._counted

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        self._count = 0

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step > 1:
            self.seconds += time.perf_counter() - self._began
            self.cpu_seconds += time.process_time() - self._cpu_began
            self.tokens += self._count

    def _counted(self, model: Any, inputs: Any, *more: Any) -> Any:
        mask = inputs.get("attention_mask")
        self._count += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return self._step(model, inputs, *more)


class UntilLoss(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Looks at the held-out chats until they cost less than TARGET; looking stops the clock."""

    def __init__(self, held_out: dict[str, torch.Tensor]) -> None:
        self.seconds, self.loss, self.steps = 0.0, float("nan"), 0
        self._held_out, self._began = held_out, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, _args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._began
        if state.global_step % LOOK_EVERY == 0:
            self.loss, self.steps = held_out_loss(model, self._held_out), state.global_step
            control.should_training_stop = self.loss < TARGET


@torch.no_grad()
def held_out_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Mean cross entropy of the answers' tokens, by the model's own pass."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels = batch["labels"][:, 1:]
    learnt = labels != IGNORED
    hidden = plain.base_model(input_ids=batch["input_ids"], use_cache=False)[0]
    scores = plain.get_output_embeddings()(hidden[:, :-1][learnt]).float()
    return float(torch.nn.functional.cross_entropy(scores, labels[learnt]))


def random_model(folder: Path, chats: Sequence[Sequence[dict[str, str]]]) -> Path:
    """A folder with random weights of the shape of `small` and a tokenizer of the chats."""
    make_tokenizer(
        [message["content"] for chat in chats for message in chat],
        folder,
        vocab_size=8000,
        model_max_length=2048,
    )
    chat = ChatFormat.from_folder(folder)
    config = Phi3Config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        original_max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=chat.pad_token_id,
        pad_token_id=chat.pad_token_id,
    )
    torch.manual_seed(0)
    write_model(Phi3ForCausalLM(config), chat, folder, tokenizer_from=folder)
    return folder


def ways(folder: Path, recipe: Recipe, chats: Any, examples: list[Example], out: Path) -> list[Way]:
    """All ways that are compared, the product's first."""
    pad = ChatFormat.from_folder(folder).pad_token_id
    rows = product.Rows(examples, [], PACKED, pad)
    runtime = choose_runtime(recipe, 135_000_000, "phi3")
    exact = replace(runtime, frozen=runtime.dtype)

    def ours(runtime: Runtime, kind: type[Any] = CpuTrainer) -> Callable[[int], Any]:
        def make(steps: int) -> Any:
            model = load_model(folder, runtime.torch_frozen)
            settings = recipe.finetune
            made = product.make_trainer(model, folder, rows, settings, runtime, [], out)
            made.__class__ = kind
            made.args.max_steps = steps
            return made

        return make

    def trl(steps: int, *, best: bool, packing: bool = False, bf16: bool = False) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.float32
        attention = "sdpa" if best else "eager"
        model = load_model(folder, dtype, attention)
        common: dict[str, Any] = {
            "output_dir": str(out),
            "max_steps": steps,
            "lr_scheduler_type": "cosine",
            "seed": 42,
            "use_cpu": True,
            "bf16": bf16,
            "activation_checkpointing": False,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
        }
        if not best:
            texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            settings = SFTConfig(
                **common,
                learning_rate=TUTORIAL_RATE,
                per_device_train_batch_size=TUTORIAL_BATCH,
                max_length=TUTORIAL_ROW,
                packing=True,
                packing_strategy="wrapped",
            )
            data = Dataset.from_dict({"text": texts})
            return SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
        tokenizer.chat_template = CHATML if "im_start" in tokenizer.chat_template else PHI3
        size = sum(len(e.input_ids) for e in examples) / len(examples)
        packed: dict[str, Any] = {
            "packing": True,
            "packing_strategy": "bfd",
            "max_length": PACKED,
            "per_device_train_batch_size": max(1, round(ROWS * size / PACKED)),
        }
        plain: dict[str, Any] = {
            "train_sampling_strategy": "group_by_length",
            "max_length": None,
            "per_device_train_batch_size": ROWS,
        }
        settings = SFTConfig(
            **common,
            **(packed if packing else plain),
            learning_rate=RATE,
            assistant_only_loss=True,
        )
        return SFTTrainer(
            get_peft_model(model, peft_config(recipe.finetune)),
            settings,
            train_dataset=Dataset.from_dict({"messages": list(chats)}),
            processing_class=tokenizer,
        )

    fast = [Way(f"product, {runtime.frozen} base", ours(runtime))]
    if runtime.frozen != "float32":
        fast.append(Way("product, float32 base", ours(exact)))
    return [
        *fast,
        Way("product before, float32", ours(exact, BeforeTrainer)),
        Way("TRL, 16 padded rows, float32", lambda n: trl(n, best=True)),
        Way("TRL, 16 padded rows, bf16", lambda n: trl(n, best=True, bf16=True)),
        Way("TRL, packing bfd, float32", lambda n: trl(n, best=True, packing=True)),
        Way("TRL, packing bfd, bf16", lambda n: trl(n, best=True, packing=True, bf16=True)),
        Way("tutorials: full, eager, wrapped", lambda n: trl(n, best=False)),
    ]


def multiply_rate(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating point operations a second in products of 2048 × 2048 matrices, the best of them."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def operations(config: Any, learnt: float) -> float:
    """Floating point operations that one token needs, of which the share `learnt` is scored.

    Two for each weight on the way forth and two for the gradient of its input (not for the first
    matrix), six for each adapter weight; attention's own products are left out.
    """
    size = config.hidden_size // config.num_attention_heads
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * size
    h, i, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    shapes = [(h, qkv), (h, h), (h, 2 * i), (i, h)]
    weights = layers * sum(a * b for a, b in shapes)
    adapter = layers * RANK * sum(a + b for a, b in shapes)
    scored = 4 * learnt * h * config.vocab_size
    return float(4 * weights - 2 * h * qkv + 6 * adapter + scored)


def measure(compared: list[Way], rounds: int, steps: int) -> dict[torch.dtype, float]:
    """Speeds of all ways, round by round; the best rates of multiplication seen between."""
    rates: dict[torch.dtype, float] = {}
    for number in range(rounds):
        for dtype in (torch.float32, torch.bfloat16):
            rates[dtype] = max(rates.get(dtype, 0.0), multiply_rate(dtype))
        for way in compared:
            trainer = way.make(steps + 1)
            trainer.remove_callback(PrinterCallback)
            clock = Clock(trainer)
            trainer.add_callback(clock)
            trainer.train()
            way.speeds.append(clock.tokens / clock.seconds)
            way.thrifts.append(clock.tokens / clock.cpu_seconds)
            print(
                f"round {number + 1}: {way.name:34}{way.speeds[-1]:8.0f} tokens/s, "
                f"{way.thrifts[-1]:.0f} a CPU second",
                flush=True,
            )
    return rates


def main() -> None:
    """Compare; print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model folder, or tiny; random weights without")
    parser.add_argument("--quick", action="store_true", help="one round, at most 90 seconds")
    options = parser.parse_args()
    quiet_libraries()
    if options.model == "tiny":
        tiny_training.main()
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        compare(Path(temporary), options.model, quick=options.quick)
    print(f"the whole run took {time.perf_counter() - began:.0f} s")


def compare(work: Path, model: str | None, *, quick: bool) -> None:
    """The comparison in the folder `work`."""
    chats = read_rows([DATA / "outdoor_chats.jsonl"])
    held_out = read_rows([DATA / "outdoor_chats_heldout.jsonl"])[::2]
    folder = Path(model) if model else random_model(work / "model", chats)
    chat = ChatFormat.from_folder(folder)
    examples = [row.example for row in encode_rows(chat, [("", c) for c in chats])]
    recipe = work / "recipe.yaml"
    recipe.write_text(
        f"name: bench\nmodel: {{name_or_path: {folder}}}\n"
        f"data: {{train: {DATA}/outdoor_chats.jsonl, "
        f"validation: {DATA}/outdoor_chats_heldout.jsonl}}\n"
        f"finetune: {{lora_r: {RANK}, lora_alpha: {2 * RANK}, learning_rate: {RATE}, "
        f"per_device_train_batch_size: {ROWS}}}\n"
    )
    compared = ways(folder, load_recipe(recipe, []), chats, examples, work / "out")
    rates = measure(compared, rounds=1 if quick else 3, steps=1 if quick else 2)
    if model and not quick:
        tuned = [w for w in compared if w.name.startswith(("product", "tutorials"))]
        best = max((w for w in compared if w.name.startswith("TRL")), key=_speed)
        batch = padded([row.example for row in encode_rows(chat, [("", c) for c in held_out])])
        for way in [*tuned, best]:
            trainer = way.make(MAX_STEPS)
            trainer.remove_callback(PrinterCallback)
            watch = UntilLoss(batch)
            trainer.add_callback(watch)
            trainer.train()
            way.reached = (watch.seconds, watch.loss, watch.steps)
            print(f"{way.name}: {watch.seconds:.1f} s, loss {watch.loss:.3f}", flush=True)
    learnt = sum(sum(e.assistant_mask) for e in examples) / sum(len(e.input_ids) for e in examples)
    config = Phi3Config.from_pretrained(folder)
    report(compared, rates, operations(config, learnt))


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""
    width = max(len(e.input_ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for number, example in enumerate(examples):
        tokens = torch.tensor(example.input_ids)
        mask = torch.tensor(example.assistant_mask, dtype=torch.bool)
        ids[number, : len(tokens)] = tokens
        labels[number, : len(tokens)] = tokens.masked_fill(~mask, IGNORED)
    return {"input_ids": ids, "labels": labels}


def _speed(way: Way) -> float:
    return statistics.median(way.speeds)


def report(compared: list[Way], rates: dict[torch.dtype, float], needed: float) -> None:
    """The table, its ratios, and all of it as JSON."""
    before = next(w for w in compared if w.name.startswith("product before"))
    best = max((w for w in compared if w.name.startswith("TRL")), key=_speed)
    features = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    print(
        f"\n{torch.get_num_threads()} threads, {' '.join(features)}; "
        f"load {os.getloadavg()[0]:.1f}; products of matrices: "
        f"float32 {rates[torch.float32] / 1e9:.0f}, bfloat16 {rates[torch.bfloat16] / 1e9:.0f} "
        f"GFLOP/s; a token needs {needed / 1e9:.3f} GFLOP"
    )
    heads = ("tokens/s", "/CPU s", "× before", "× TRL", "% of products", "to loss")
    print(f"{'':34}" + "".join(f"{head:>{len(head) + 3}}" for head in heads))
    lines = []
    for way in compared:
        kind = torch.bfloat16 if "bf" in way.name.replace("bfd", "") else torch.float32
        speed, share = _speed(way), 100 * _speed(way) * needed / rates[kind]
        seconds = "" if way.reached is None else f"{way.reached[0]:.1f} s ({way.reached[1]:.2f})"
        thrift = statistics.median(way.thrifts)
        print(
            f"{way.name:34}{speed:>11.0f}{thrift:>9.0f}{speed / _speed(before):>11.2f}"
            f"{speed / _speed(best):>8.2f}{share:>16.0f}{seconds:>20}"
        )
        lines.append(
            {"way": way.name, "tokens_per_second": speed, "share": share, "thrift": thrift}
        )
        lines[-1] |= {"speeds": way.speeds, "to_loss": way.reached}
    print(f"held-out loss wanted: {TARGET}; TRL at its best: {best.name}")
    found = {str(dtype): rate for dtype, rate in rates.items()}
    print(json.dumps({"ways": lines, "rates": found, "per_token": needed, "features": features}))


if __name__ == "__main__":
    main()
