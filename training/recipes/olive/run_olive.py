"""Runs the Olive configurations of this folder on a run of phi3, and checks what they wrote.

Reads runs/NAME; writes OUT/<step>/ and OUT/<step>.log. Standard library only: start it with any
Python, with `olive` on the PATH. Olive may exit 0 although it failed, so only its files count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LAST_LINES = 8


class FailedError(Exception):
    """A step whose files are not what they should be."""


def check_adapter(folder: Path) -> str:
    """A peft folder whose LoRA weights have left zero, where they all begin."""
    config = read_json(folder / "adapter" / "adapter_config.json")
    path = folder / "adapter" / "adapter_model.safetensors"
    content = read(path)
    size = struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
    try:
        header = json.loads(content[8 : 8 + size])
    except ValueError:
        raise FailedError(f"{path} is not a safetensors file") from None
    spans = [entry["data_offsets"] for name, entry in header.items() if "lora_B" in name]
    if not spans:
        raise FailedError(f"{path} contains no LoRA weights")
    learnt = sum(any(content[8 + size + a : 8 + size + b]) for a, b in spans)
    if learnt < len(spans) or len(content) < 8 + size + max(end for _, end in spans):
        raise FailedError(
            f"{path}: {len(spans) - learnt} of {len(spans)} LoRA weights are still zero"
        )
    return f"LoRA r={config.get('r')}, {len(spans)} weights: {path.parent}"


def check_onnx(folder: Path) -> str:
    """A folder that ONNX Runtime GenAI loads: settings, the graph they name, its weights."""
    settings = read_json(folder / "genai_config.json").get("model", {})
    decoder = settings.get("decoder", {})
    graph = folder / str(decoder.get("filename", "model.onnx"))
    weights = [path for path in folder.glob(f"{graph.name}*") if path.is_file()]
    total = sum(len(read(path)) for path in {graph, *weights})
    for name in ("tokenizer.json", "config.json"):
        read(folder / name)
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    known = settings.get("eos_token_id")
    wanted, found = (set(v) if isinstance(v, list) else {v} for v in (ends, known))
    if not wanted <= found:
        raise FailedError(
            f"genai_config.json stops at {known}; the model ends its answers with {ends}"
        )
    return f"{total / 1e6:.1f} MB: {folder}"


STEPS: dict[str, Callable[[Path], str]] = {
    "lora": check_adapter,
    "onnx-fp32": check_onnx,
    "onnx-int4": check_onnx,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 1 when one of them left no good files, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description="Run Olive on a run of phi3; check its files.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (all)")
    parser.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/phi3-tiny")
    parser.add_argument("--out", type=Path, default=Path("olive-out"), help="output folder")
    parser.add_argument("--timeout", type=int, default=7200, metavar="SECONDS", help="per step")
    args = parser.parse_args(argv)
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; steps: {', '.join(STEPS)}")
    olive = shutil.which("olive")
    if olive is None:
        parser.error(f"olive is not on the PATH; install {HERE / 'requirements.txt'} in a venv")
    run = args.run.resolve()
    if not (run / "model.json").is_file():
        parser.error(f"{run} is not a tuned run (no model.json); create one with: phi3 train")
    failed = 0
    for step in args.steps or STEPS:
        try:
            said = run_step(olive, step, run, args.out.resolve(), args.timeout)
            sys.stdout.write(f"ok      {step}: {said}\n")
        except FailedError as error:
            failed += 1
            sys.stdout.write(f"FAILED  {step}: {error}\n")
    return 1 if failed else 0


def run_step(olive: str, step: str, run: Path, out: Path, timeout: int) -> str:
    """Run one configuration in a fresh folder; what was checked, or FailedError."""
    target = out / step
    if target.exists():
        raise FailedError(
            f"{target} already exists; old files could be mistaken for new ones: remove it"
        )
    target.mkdir(parents=True)
    config, log = out / f"{step}.json", out / f"{step}.log"
    config.write_text(configuration(step, run, target), encoding="utf-8")
    command = [olive, "run", "--config", str(config), "--disable_telemetry"]
    environment = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}
    with log.open("w", encoding="utf-8") as stream:
        try:
            done = subprocess.run(  # noqa: S603 - the program found on the PATH, no shell
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment,
                timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise FailedError(f"not done after {timeout} s; see {log}") from None
    try:
        return STEPS[step](target)
    except FailedError as error:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = "\n".join(f"          {line[:200]}" for line in lines[-LAST_LINES:])
        status = f"olive exited {done.returncode}"
        raise FailedError(f"{error} ({status}); the end of its log {log}:\n{last}") from None


def configuration(step: str, run: Path, target: Path) -> str:
    """The configuration with its places filled in."""
    base = run / json.loads((run / "base.json").read_text(encoding="utf-8"))["path"]
    model = run / json.loads((run / "model.json").read_text(encoding="utf-8"))["path"]
    places = {"base": base, "model": model, "train": run / "data" / "train.jsonl", "out": target}
    text = (HERE / f"{step}.json").read_text(encoding="utf-8")
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", json.dumps(str(path))[1:-1])
    return text


def read(path: Path) -> bytes:
    """A file that must be there and not empty."""
    try:
        content = path.read_bytes()
    except OSError:
        raise FailedError(f"{path} was not written") from None
    if not content:
        raise FailedError(f"{path} is empty")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that must be there."""
    try:
        content = json.loads(read(path))
    except ValueError:
        raise FailedError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise FailedError(f"{path} is not a JSON object")
    return content


if __name__ == "__main__":
    sys.exit(main())
