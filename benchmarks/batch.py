"""Thousands of lines through the chat flow: `pf run create` (baseline) and `phi3 batch`.

Both ask the same stub endpoint (a separate process, 50 ms an answer) the same questions, one
after the other, as whole commands from start to written file; answers are compared line by line.
`pf run` has its own number of workers unless PF_WORKER_COUNT is set. About a minute on two cores.
Run: python benchmarks/batch.py [--lines 2000] [--latency 50] [-o json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from support.endpoint import endpoint
from support.place import KEY, Place, place


def timed(command: list[str], env: Mapping[str, str], where: Place) -> float:
    """Seconds of one whole command; its output where it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, env=env, cwd=where.folder, capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}{done.stderr}")
    return took


def rows_of(path: Path) -> list[dict[str, object]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def baseline(where: Place, flow: Path, data: Path) -> tuple[float, list[dict[str, object]]]:
    """Prompt flow's own batch run, with its connection from the store."""
    command = [str(Path(sys.executable).with_name("pf")), "run", "create", "--flow", str(flow)]
    command += ["--data", str(data), "--name", "baseline", "--column-mapping"]
    command += ["input_data=${data.input_data}"]
    env = {**where.env, **{k: v for k, v in os.environ.items() if k == "PF_WORKER_COUNT"}}
    seconds = timed(command, env, where)
    return seconds, rows_of(where.folder / ".promptflow/.runs/baseline/flow_outputs/output.jsonl")


def ours(where: Place, data: Path, url: str) -> tuple[float, list[dict[str, object]]]:
    """`phi3 batch`, with endpoint and key from the environment."""
    out = where.folder / "answers.jsonl"
    command = [str(Path(sys.executable).with_name("phi3")), "batch", str(data), "--out", str(out)]
    seconds = timed(command, {**where.env, "PHI3_ENDPOINT": url, "PHI3_KEY": KEY}, where)
    return seconds, rows_of(out)


def main() -> None:
    """Run both, check that they say the same, print the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=50, help="ms of the endpoint")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with place() as where, endpoint(args.latency) as url:
        where.connect(url)
        flow = where.copy_flows()[1]
        data = where.folder / "questions.jsonl"
        data.write_text(
            "".join(json.dumps({"input_data": f"Question {n}?"}) + "\n" for n in range(args.lines)),
            encoding="utf-8",
        )
        mine, answers = ours(where, data, url)
        theirs, expected = baseline(where, flow, data)
    same = answers == expected and len(answers) == args.lines
    print(
        f"{args.lines} lines, an endpoint of {args.latency:g} ms, {os.cpu_count()} cores,"
        f" load {load:.1f} before"
    )
    print(f"{'':12}{'seconds':>10}{'lines/s':>10}")
    for name, seconds in (("pf run", theirs), ("phi3 batch", mine)):
        print(f"{name:12}{seconds:>10.1f}{args.lines / seconds:>10.0f}")
    print(f"ratio {theirs / mine:.1f}, rows {'the same' if same else 'DIFFERENT'}")
    if args.output == "json":
        row = {"lines": args.lines, "latency_ms": args.latency, "pf_run": theirs, "batch": mine}
        print(json.dumps({**row, "ratio": theirs / mine, "same": same}))
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
