"""Memory plan against measured peaks: `python benchmarks/memory_plan.py` (about seven minutes).

Trains, saves and evaluates random Phi-3 models, each case in a separate process, through the
product's own trainer and evaluation, and prints predicted and measured growth. Writes nothing
that stays. The error stands for what the models add, and for the whole process with its libraries.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
MIB = 2**20
STEPS = 3
LEARNT = 0.5  # share of each row that is learnt

MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    },
    "mid": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8,
    },
    "wide": {
        "vocab_size": 8192, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 2, "num_attention_heads": 32,
    },
    "small": {  # SmolLM2-135M's shape
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
ROWS = {"tiny": (32, 256), "mid": (4, 256), "wide": (2, 256), "small": (16, 64)}  # batch, tokens


@dataclass(frozen=True)
class Case:
    """What one process does."""

    model: str
    phase: str  # train or evaluate
    method: str = "lora"
    checkpointing: bool = False
    attention: str = "sdpa"
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """As it stands in the table."""
        title = f"{self.model} {'evaluate' if self.phase == 'evaluate' else self.method}"
        title += " + checkpointing" if self.checkpointing else ""
        title += ", eager" if self.attention == "eager" else ""
        return title + (", rounded base" if self.dtype == "auto" else "")


CASES = (
    *(Case(model, "train", method, checkpointing)
      for model in ("tiny", "mid") for method in ("full", "lora")
      for checkpointing in (False, True)),
    Case("mid", "train", "dora"),
    Case("mid", "train", "lora", attention="eager"),
    Case("wide", "train", "lora"),
    *(Case("small", "train", "lora", dtype=dtype) for dtype in ("float32", "auto")),
    *(Case(model, "evaluate") for model in ("tiny", "mid", "small")),
)  # fmt: skip


def main() -> int:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return 0
    results = [run_case(case) for case in CASES if args.only in case.title]
    if args.output == "json":
        print(json.dumps(results, indent=2))
        return 0
    show(results)
    return 0


def show(results: list[dict[str, Any]]) -> None:
    """The table: growth over the loaded libraries, and the errors of that and of the whole."""
    print(f"{'':<28}{'phase':<10}{'predicted':>11}{'measured':>11}{'error':>8}{'whole':>8}")
    for line in results:
        for phase, (predicted, measured) in line["phases"].items():
            whole = (predicted + line["overhead"]) / (measured + line["libraries"]) - 1
            cells = [f"{value / MIB:.0f} MiB" for value in (predicted, measured)]
            errors = [f"{100 * x:+.0f} %" for x in (predicted / measured - 1, whole)]
            print(
                f"{line['title']:<28}{phase:<10}{cells[0]:>11}{cells[1]:>11}"
                f"{errors[0]:>8}{errors[1]:>8}"
            )
    floor = max(line["libraries"] for line in results)
    taken = results[0]["overhead"]
    print(
        f"Libraries alone: {taken / MIB:.0f} MiB predicted, {floor / MIB:.0f} MiB measured. "
        f"Measured on {results[0]['how']}."
    )


def run_case(case: Case) -> dict[str, Any]:
    """One case in a fresh process."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(PROJECT / "tools"), str(PROJECT / "training"), os.environ.get("PYTHONPATH", "")]
        )
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    if done.returncode:
        sys.exit(f"{case.title} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# What follows runs in the process of one case.


def measure(case: Case) -> dict[str, Any]:
    """Predicted and measured bytes of each phase of a case."""
    import torch

    from phi3_training.memory.advise import Need
    from phi3_training.memory.model import this_device
    from phi3_training.memory.training import Phase

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        warm = make_model(MODELS["tiny"] | {"num_hidden_layers": 1}, folder / "warm")
        model = make_model(MODELS[case.model], folder / "model")
        work = evaluate if case.phase == "evaluate" else train
        work(case, warm, folder / "warm.out", 2, 32)  # imports, and what libraries set up once
        libraries = Peak.now()
        measured = work(case, model, folder / "out", *ROWS[case.model])
    predicted = predict(case)
    how = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU, one thread"
    return {
        "title": case.title,
        "how": how,
        "libraries": libraries,
        "overhead": Need(Phase("none", {}), this_device()).overhead,
        "phases": {name: (predicted[name], peak) for name, peak in measured.items()},
    }


def recipe_of(case: Case, batch: int, tokens: int) -> Any:
    """The case as a recipe."""
    from phi3_training.recipe import Recipe

    return Recipe.model_validate(
        {
            "name": "memory",
            "model": {
                "name_or_path": "given",
                "attn_implementation": case.attention,
                "dtype": case.dtype,
            },
            "data": {"train": ["none"], "max_length": tokens},
            "finetune": {
                "method": case.method,
                "num_train_epochs": 1,
                "per_device_train_batch_size": batch,
                "gradient_checkpointing": case.checkpointing,
                "num_threads": 1,
                "save_seconds": None,
            },
            "evaluate": {"per_device_eval_batch_size": 16, "max_new_tokens": 16},
        }
    )


def predict(case: Case) -> dict[str, int]:
    """The product's prediction, told what share of the rows is learnt."""
    from phi3_training.memory import RowSizes, this_device
    from phi3_training.memory.inference import evaluate_phase, save_phase
    from phi3_training.memory.model import shape_from
    from phi3_training.memory.training import step_phase, work_of

    batch, tokens = ROWS[case.model]
    recipe = recipe_of(case, batch, tokens)
    shape = shape_from(MODELS[case.model], "the benchmark")
    learnt = int(tokens * LEARNT)
    rows = RowSizes(tokens, learnt, LEARNT, tokens, tokens, "made here", rows=batch * STEPS)
    work = work_of(recipe, shape, this_device(), rows)
    settings = recipe.evaluate
    asked = evaluate_phase(
        shape,
        work,
        at_once=settings.per_device_eval_batch_size,
        new_tokens=settings.max_new_tokens,
    )
    return {
        "train": step_phase(shape, work).total,
        "save": save_phase(shape, work).total,
        "evaluate": asked.total,
    }


def make_model(sizes: dict[str, int], folder: Path) -> Path:
    """A folder with a random Phi-3 and a tokenizer learnt from the shipped chats."""
    from transformers import Phi3Config, Phi3ForCausalLM

    from phi3_training.finetune.weights import make_tokenizer

    chats = (PROJECT / "training/data/base_chats.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for chat in chats for message in json.loads(chat)["messages"]]
    make_tokenizer(texts, folder, vocab_size=1024, model_max_length=2048)
    plain: dict[str, Any] = {"tie_word_embeddings": False, **sizes}
    config = Phi3Config(**plain, max_position_embeddings=2048, bos_token_id=1, eos_token_id=0,
                        pad_token_id=0, original_max_position_embeddings=2048)  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def train(case: Case, model_folder: Path, out: Path, batch: int, tokens: int) -> dict[str, int]:
    """Three steps and the merge, as `phi3 train` does them; growth of both."""
    import random

    from phi3_training.finetune.callbacks import LossLog
    from phi3_training.finetune.runtime import choose_runtime, quiet_libraries
    from phi3_training.finetune.trainer import Rows, make_trainer
    from phi3_training.finetune.weights import (
        chat_format,
        count_weights,
        load_for_training,
        merge,
        with_adapter,
        write_adapter,
    )
    from phi3_training.prompt import Example

    quiet_libraries()
    recipe = recipe_of(case, batch, tokens)
    runtime = choose_runtime(recipe, count_weights(model_folder), "phi3")
    chat = chat_format(model_folder)
    draw = random.Random(0)  # noqa: S311 - tokens to train on, guards nothing
    cut = int(tokens * (1 - LEARNT))
    rows = [
        Example([draw.randrange(300, 900) for _ in range(tokens)], [0] * cut + [1] * (tokens - cut))
        for _ in range(batch * STEPS)
    ]
    out.mkdir()
    with Peak() as training:
        model = load_for_training(model_folder, recipe, runtime)
        log = LossLog(out / "loss.jsonl", lambda _done, _total, _text: None)
        data = Rows(rows, [], tokens, chat.pad_token_id)
        trainer = make_trainer(model, model_folder, data, recipe.finetune, runtime, [log], out)
        trainer.train()
        trained = trainer.accelerator.unwrap_model(trainer.model)
    if len(log.losses) != STEPS:
        sys.exit(f"{len(log.losses)} steps were trained, {STEPS} expected")
    with Peak(start=training.start) as saving:
        if runtime.frozen != runtime.dtype:
            write_adapter(trained, out / "adapter", {})
            full = with_adapter(model_folder, out / "adapter", runtime.torch_dtype)
        else:
            full = trained
        merge(full, chat, out / "model", model_folder, runtime.torch_dtype)
    return {"train": training.growth, "save": saving.growth}


def evaluate(case: Case, model_folder: Path, _out: Path, batch: int, tokens: int) -> dict[str, int]:
    """Asking and scoring, as `phi3 evaluate` does for one of its two models."""
    from phi3_training.evaluate.answers import answer_losses, ask_all
    from phi3_training.finetune.runtime import choose_runtime, quiet_libraries
    from phi3_training.finetune.weights import chat_format, count_weights, load_model

    quiet_libraries()
    recipe = recipe_of(case, batch, tokens)
    settings = recipe.evaluate
    runtime = choose_runtime(recipe, count_weights(model_folder))
    chat = chat_format(model_folder)
    half = tokens // 2 - 8
    word = "x q "  # rare letters stay a token each
    text = word * (half // len(chat.encode_prompt([{"role": "user", "content": word}])) + 1)
    while len(chat.encode_prompt([{"role": "user", "content": text}])) < half:
        text += word
    rows = max(24, 5000 // tokens)  # enough to fill a scoring pass of 4,096 tokens
    asked = [[{"role": "user", "content": f"{n} {text * 2}"}] for n in range(24)]
    said = [
        [{"role": "user", "content": f"{n} {text}"}, {"role": "assistant", "content": text}]
        for n in range(rows)
    ]
    with Peak() as peak:
        model = load_model(model_folder, runtime.torch_dtype).to(runtime.device).eval()
        at_once = settings.per_device_eval_batch_size
        new = settings.max_new_tokens
        ask_all(model, model_folder, chat, asked, max_new_tokens=new, at_once=at_once)
        answer_losses(model, chat, said)
    return {"evaluate": peak.growth}


class Peak:
    """How far memory grew inside the block, over what was there at its start."""

    def __init__(self, start: int | None = None) -> None:
        self._given = start

    def __enter__(self) -> Peak:
        now = self.now()
        self.start = now if self._given is None else self._given
        reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = read_peak() - self.start

    @staticmethod
    def now() -> int:
        """Bytes in use, what lies about unused given back first."""
        gc.collect()
        if on_gpu():
            import torch

            torch.cuda.empty_cache()
            return int(torch.cuda.memory_allocated())
        with_trim()
        import psutil

        return int(psutil.Process().memory_info().rss)


def on_gpu() -> bool:
    """Whether the peak is a GPU's."""
    import torch

    return bool(torch.cuda.is_available())


def reset_peak() -> None:
    """Forget the peak so far (Linux); elsewhere the process's whole peak counts."""
    if on_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak() -> int:
    """Highest use since `reset_peak`."""
    if on_gpu():
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def with_trim() -> None:
    """Give unused heap back to the system where the C library can (glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


if __name__ == "__main__":
    sys.exit(main())
