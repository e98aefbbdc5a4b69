"""Fine-tunes with several processes: one for each GPU, on one machine or more.

Starts them through accelerate and shows their progress; each is this module as a program. Reads and
writes run/finetune/launch.json (the recipe), launch-result.json and launch.log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from .. import processes
from ..errors import Phi3TrainingError, StageError
from ..manifests import ModelManifest
from ..processes import free_port
from ..progress import Progress
from ..recipe import FinetuneSection, Recipe
from ..run import Run, write_atomically
from .runtime import device, is_main_process

# Ends a training process whose parent is gone: after `kill -9` nothing else does.

GONE = 3  # exit status of a process that ended for this reason
_EVERY = 0.5  # seconds


def end_with(pid: int, born: float) -> None:
    """End this process as soon as `pid` (the `phi3` that began all) or its own parent is gone.

    Two of them would write one run otherwise: the next `phi3 train` finds the run's lock free.
    """
    parent = os.getppid()

    def check() -> None:
        if processes.find(pid, born) is None or os.getppid() != parent:
            os._exit(GONE)  # at once: threads of torch may wait for processes that ended as well

    def watch() -> None:
        while True:
            check()
            time.sleep(_EVERY)

    check()
    threading.Thread(target=watch, name="phi3-orphan", daemon=True).start()


WORKER = "phi3_training.finetune.launch"  # this module, run as a program
_END = 10  # seconds for the processes to exit after they were asked to


def finetune(recipe: Recipe, run: Run, progress: Progress) -> ModelManifest:
    """Start the processes and wait for them; the manifest of the main one.

    Raises StageError with what stopped them.
    """
    where = device()
    if where not in ("cuda", "cpu"):
        raise StageError(
            f"Several processes train on CUDA GPUs or on the CPU; this machine has: {where}. "
            "Set finetune.num_processes=1."
        )
    import torch

    machines, count = recipe.finetune.num_machines, torch.cuda.device_count()
    here = recipe.finetune.num_processes // machines
    if where == "cuda" and here > count:
        raise StageError(
            f"finetune.num_processes asks for {here} GPUs on this machine; it has {count}. "
            f"Set finetune.num_processes={count * machines}."
        )
    plan = run.file("finetune", "launch.json")
    result = run.path / "finetune" / "launch-result.json"
    log = run.path / "finetune" / "launch.log"
    result.unlink(missing_ok=True)
    body = {
        "recipe": recipe.model_dump(mode="json"),
        "run": str(run.path),
        "result": str(result),
        "launcher": [os.getpid(), processes.start_time(os.getpid())],
    }
    write_atomically(plan, json.dumps(body))
    # Each process computes with one thread, unless somebody says otherwise: they share the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    words = command(recipe.finetune, where, plan)
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            for line in process.stdout or ():  # what the main process says of its progress
                try:
                    done, total, text = json.loads(line)
                except ValueError:  # something that a library printed
                    continue
                progress(int(done), int(total), str(text))
            status = process.wait()
        finally:
            if process.poll() is None:  # we were interrupted: take them with us
                process.terminate()
                try:
                    process.wait(_END)
                except subprocess.TimeoutExpired:
                    process.kill()
    answer = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    if "error" in answer:
        raise StageError(str(answer["error"]))
    if status == 0 and recipe.finetune.machine_rank > 0:
        return ModelManifest(
            path="finetune",
            summary=f"machine {recipe.finetune.machine_rank} is done; the model is on machine 0",
        )
    if status != 0 or "manifest" not in answer:
        raise StageError(
            f"The {recipe.finetune.num_processes} training processes ended with status {status}. "
            f"Their log: {log}\n" + "\n".join(log.read_text("utf-8").splitlines()[-5:])
        )
    return ModelManifest.model_validate(answer["manifest"])


def command(settings: FinetuneSection, where: str, plan: Path) -> list[str]:
    """The command line that starts all processes of this machine.

    accelerate starts several processes on a CPU only through MPI, so torchrun, which it uses for
    GPUs itself, is called directly there; the processes meet through accelerate either way.
    """
    address = settings.main_process_ip or "127.0.0.1"
    port = str(settings.main_process_port or free_port())
    machines, rank = str(settings.num_machines), str(settings.machine_rank)
    if where == "cuda":
        tool = ["accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no"]
        tool += ["--dynamo_backend", "no", "--num_processes", str(settings.num_processes)]
        tool += ["--num_machines", machines, "--machine_rank", rank]
        tool += ["--main_process_ip", address, "--main_process_port", port]
    else:
        here = settings.num_processes // settings.num_machines
        tool = ["torch.distributed.run", "--nproc-per-node", str(here), "--nnodes", machines]
        tool += ["--node-rank", rank, "--master-addr", address, "--master-port", port]
    return [sys.executable, "-m", *tool, "--module", WORKER, str(plan)]


def train_as_worker(plan: Path) -> int:
    """Train as one of the processes of a plan; exit status 1 when something stopped it.

    The main process writes its progress to standard output, and the result file.
    """
    content = json.loads(plan.read_text(encoding="utf-8"))
    end_with(*content["launcher"])
    from . import sft  # takes seconds, in which the launcher may end

    def progress(done: int, total: int, text: str) -> None:
        if is_main_process():
            sys.stdout.write(json.dumps([done, total, text]) + "\n")
            sys.stdout.flush()

    recipe = Recipe.model_validate(content["recipe"])
    result = Path(content["result"])
    try:
        manifest = sft.finetune(recipe, Run.open(Path(content["run"])), progress)
    except Phi3TrainingError as error:
        if is_main_process():
            write_atomically(result, json.dumps({"error": str(error)}))
        return 1
    if manifest is not None:
        write_atomically(result, json.dumps({"manifest": manifest.as_json()}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(train_as_worker(Path(sys.argv[1])))
