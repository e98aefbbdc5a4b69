"""A run folder with prepared chats and a small base, and fine-tunings of it in processes that die.

Writes into the folders it is given. Processes are forked from a server that has torch loaded, so
that each costs a fraction of a second.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import forked

from phi3_training.data import prepare
from phi3_training.finetune import finetune, prepare_base
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run

TRAIN = """
import sys
from pathlib import Path
from phi3_training.finetune import finetune
from phi3_training.recipe import load_recipe
from phi3_training.run import Run

run = Run(Path(sys.argv[1]))
run.write(finetune(load_recipe(run.path.parent / "recipe.yaml", sys.argv[2:]), run))
"""

# Sends itself SIGKILL before it opens a file of that name for the so-and-so-many-th time.
DYING = """
import os, signal, sys
end, left = {end!r}, {times}
def look(event, args):
    global left
    if event == "open" and str(args[0]).endswith(end):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(look)
"""

SMALL = """\
name: small
model: {name_or_path: tiny}
base: {data: chats.jsonl, vocab_size: 400, hidden_size: 32, intermediate_size: 48,
       num_hidden_layers: 2, num_attention_heads: 2, num_train_epochs: 1}
data: {train: chats.jsonl, validation_share: 0.1}
finetune: {learning_rate: 5.0e-3, num_train_epochs: 8, per_device_train_batch_size: 8,
           lora_r: 4, lora_dropout: 0.1, save_steps: 5, num_threads: 1}
"""


def make_small_run(folder: Path) -> Path:
    """A run folder with `dataset` and `base` done, and recipe.yaml beside it."""
    words = ("lamp", "boat", "stove", "tent", "kettle", "drum", "rope", "axe")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What does {word} number {size} cost?"},
                {"role": "assistant", "content": f"It is {size * 3} euros" + " today" * size},
            ]
        }
        for size, word in ((size, word) for size in range(1, 8) for word in words)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "recipe.yaml").write_text(SMALL)
    run = Run.open(folder / "run")
    recipe = load_recipe(folder / "recipe.yaml")
    run.write(prepare(recipe.data, run))
    run.write(prepare_base(recipe, run))
    return run.path


def small_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe beside a run folder that `make_small_run` made."""
    return load_recipe(run.parent / "recipe.yaml", overrides)


def copy_of(run: Path, name: str) -> Path:
    """The same run under another name, beside it."""
    return Path(shutil.copytree(run, run.with_name(name)))


def train(run: Path, overrides: Sequence[str] = ()) -> None:
    """Fine-tune in this process and write the manifest."""
    Run(run).write(finetune(small_recipe(run, overrides), Run(run)))


def start(run: Path, overrides: Sequence[str] = ()) -> forked.Forked:
    """Fine-tune in a process of its own."""
    command = ["-c", TRAIN, str(run), *overrides]
    with run.with_name(f"{run.name}.log").open("a") as log:
        return forked.start(command, stdout=log, stderr=log)


def train_apart(run: Path, overrides: Sequence[str] = ()) -> None:
    """Fine-tune in a process of its own, to the end."""
    assert start(run, overrides).wait(120) == 0, run.with_name(f"{run.name}.log").read_text()


def kill_when(
    run: Path, overrides: Sequence[str], reached: Callable[[], bool], limit: float = 240
) -> None:
    """Fine-tune in a process of its own and send it SIGKILL as soon as `reached` says so."""
    process = start(run, overrides)
    end = time.monotonic() + limit
    while not reached():
        assert process.poll() is None, "training ended before it was to be killed"
        assert time.monotonic() < end, "training did not get there in time"
        time.sleep(0.002)  # a step takes ten times as long
    process.kill()
    assert process.wait(30) == -signal.SIGKILL


def kill_before_opening(run: Path, end: str, times: int = 1) -> None:
    """Fine-tune in a process of its own that SIGKILL ends before a file is opened again."""
    with run.with_name(f"{run.name}.log").open("a") as log:
        code = DYING.format(end=end, times=times) + TRAIN
        process = forked.start(["-c", code, str(run)], stdout=log, stderr=log)
    assert process.wait(240) == -signal.SIGKILL, run.with_name(f"{run.name}.log").read_text()


def steps(run: Path) -> int:
    """How many whole lines the loss log has: cheaper than to read them, for who looks often."""
    path = run / "finetune" / "loss.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of the loss log; a line that was cut is left out."""
    path = run / "finetune" / "loss.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(entry["step"], entry["loss"]) for entry in entries]
