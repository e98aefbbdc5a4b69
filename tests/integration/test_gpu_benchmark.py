"""benchmarks/gpu.py without a GPU: every part runs, and what fails takes nothing with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a minute of computing: `make test-all`

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu import TINY, goals, peak_flops, shown, step_flop  # noqa: E402
from support.parts import Part, run_parts  # noqa: E402

TRAININGS = {"lora, packed", "qlora, packed", "tutorials, all weights", "tutorials, LoRA"}


def test_dry_run_does_every_part(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--lines", str(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert done.returncode == 0, done.stdout
    assert not [line for line in found if "error" in line]
    ways = {line["way"] for line in found if "way" in line}
    if any(line["part"] == "qlora" and "skipped" in line for line in found):
        ways.add("qlora, packed")  # bitsandbytes is an extra
    assert ways == TRAININGS
    trained = [line for line in found if "trained_per_second" in line]
    assert all(0 < x["trained_per_second"] <= x["tokens_per_second"] for x in trained)
    packed = next(line for line in trained if line["way"] == "lora, packed")
    assert packed["trained_per_second"] / packed["tokens_per_second"] == pytest.approx(
        0.75, abs=0.03
    )
    assert packed["planned_gib"] > 0
    assert packed["mfu"] is packed["peak_gib"] is None  # a CPU has neither
    parts = [line["part"] for line in found]
    assert {"decode, 1 user", "decode, 4 users", "tiny, tuned"} <= set(parts)
    assert "goal 3 x" in done.stdout


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--lines", str(tmp_path / "lines.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "--dry-run" in done.stderr


def test_part_that_fails_or_hangs_keeps_its_lines(tmp_path: Path) -> None:
    script = tmp_path / "parts.py"
    script.write_text(
        f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from support.parts import hand_over
name = sys.argv[-1]
print("noise of a library")
hand_over({{"part": name, "figure": 1}})
if name == "fails":
    raise ValueError("no memory left")
if name == "hangs":
    time.sleep(600)
"""
    )
    shown_lines: list[dict[str, object]] = []
    parts = [Part("fails", 60.0), Part("hangs", 2.0), Part("works", 60.0)]
    found = run_parts(parts, [sys.executable, str(script)], {}, lines=tmp_path / "lines.jsonl",
                      show=shown_lines.append, seconds=100.0)  # fmt: skip
    assert [line for line in found if "figure" in line] == [
        {"part": part.name, "figure": 1} for part in parts
    ]
    errors = {line["part"]: line["error"] for line in found if "error" in line}
    assert errors == {
        "fails": "exit 1: ValueError: no memory left",
        "hangs": "ended at its limit of 2 s",
    }
    written = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert written == found == shown_lines
    late = run_parts(parts[:1], ["none"], {}, lines=tmp_path / "x", show=print, seconds=1.0)
    assert late == [{"part": "fails", "skipped": "the 1 seconds were up"}]


def test_flop_by_hand() -> None:
    """Two layers of h 64, i 128 and 512 words; one conversation of 10 tokens, and two of 5."""
    layer = 64 * 192 + 64 * 64 + 64 * 256 + 128 * 64
    weights = 2 * layer + 512 * 64
    assert step_flop(TINY, [10], 4) == 4 * weights * 10 + 6 * 2 * 64 * 100
    assert step_flop(TINY, [5, 5], 6) == 6 * weights * 10 + 6 * 2 * 64 * 50


def test_peak_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 3g.40gb") is None
    assert peak_flops("Some other device") is None


def test_table_and_goals() -> None:
    ours = {
        "part": "lora", "way": "lora, packed", "batch": 4, "sequence": 2048, "mfu": 0.41,
        "tokens_per_second": 27000.0, "trained_per_second": 20000.0, "peak_gib": 50.0,
        "planned_gib": 52.0, "plan_error": 0.04, "device": "NVIDIA H100 80GB HBM3",
    }  # fmt: skip
    theirs = {**ours, "way": "tutorials, LoRA", "tokens_per_second": 6000.0, "plan_error": None}
    lost = {"part": "lora", "way": "lora, packed", "batch": 2, "sequence": 4096,
            "out_of_memory": True}  # fmt: skip
    assert shown(ours).split()[2:] == [
        "4",
        "x",
        "2048",
        "27,000",
        "20,000",
        "41%",
        "50.0",
        "52.0",
        "+4%",
    ]
    assert shown(lost).endswith("out of memory")
    said = "\n".join(goals([ours, theirs, lost]))
    assert "27,000 tokens/s; goal 26,000" in said
    assert "4.5 x tutorials, LoRA; goal 3 x" in said
    assert "at most +4% off" in said
