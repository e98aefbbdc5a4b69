"""training/recipes/olive/run_olive.py: Olive's files count, its exit status does not."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

OLIVE = Path(__file__).resolve().parents[3] / "training" / "recipes" / "olive"

# Stands in for Olive: exits 0 whatever happens, and writes what the test asks for.
FAKE = """\
#!{python}
import json, os, pathlib, shutil, sys
assert os.environ["OLIVE_DISABLE_TELEMETRY"] == "1"
config = json.loads(pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
print("No output model produced.")
made = pathlib.Path({made!r})
if made.is_dir():
    shutil.copytree(made, config["output_dir"], dirs_exist_ok=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / 'a "run"'
    folder.mkdir(parents=True)
    for stage, path in (("base", "base"), ("model", "model")):
        (folder / f"{stage}.json").write_text(json.dumps({"path": path}))
    return folder


def olive(tmp_path: Path, run: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    """Run the script with the fake Olive first on the PATH."""
    program = tmp_path / "bin" / "olive"
    program.parent.mkdir(exist_ok=True)
    program.write_text(FAKE.format(python=sys.executable, made=str(tmp_path / "made")))
    program.chmod(0o755)
    command = [sys.executable, str(OLIVE / "run_olive.py"), "--run", str(run), *steps]
    return subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"},
        timeout=60,
        check=False,
    )


def write_adapter(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 4}')
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"x.lora_B.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + weights
    (folder / "adapter_model.safetensors").write_bytes(content)


def write_onnx(folder: Path, stops: list[int]) -> None:
    folder.mkdir(parents=True)
    model = {"eos_token_id": stops, "decoder": {"filename": "model.onnx"}}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json", "config.json"):
        (folder / name).write_text("x")


def test_exit_0_without_files_is_a_failure(tmp_path: Path, run: Path) -> None:
    done = olive(tmp_path, run)
    assert done.returncode == 1
    assert done.stdout.count("FAILED") == 3
    assert "olive exited 0" in done.stdout
    assert "No output model produced." in done.stdout


def test_good_files_pass(tmp_path: Path, run: Path) -> None:
    write_adapter(tmp_path / "made" / "adapter", struct.pack("<ff", 0.5, 1.0))
    assert olive(tmp_path, run, "lora").stdout.startswith("ok      lora: LoRA r=4, 1 weights")
    assert olive(tmp_path, run, "lora").returncode == 1, "old files are not taken for new"


@pytest.mark.parametrize("weights", [bytes(8), b"\1", b""])
def test_weights_that_learnt_nothing_or_are_cut_fail(
    tmp_path: Path, run: Path, weights: bytes
) -> None:
    write_adapter(tmp_path / "made" / "adapter", weights)
    done = olive(tmp_path, run, "lora")
    assert (done.returncode, "FAILED  lora" in done.stdout) == (1, True)


def test_a_graph_that_forgets_a_stop_token_fails(tmp_path: Path, run: Path) -> None:
    write_onnx(tmp_path / "made", [5])
    done = olive(tmp_path, run, "onnx-int4")
    assert done.returncode == 1
    assert "stops at [5]" in done.stdout


def test_a_whole_onnx_folder_passes(tmp_path: Path, run: Path) -> None:
    write_onnx(tmp_path / "made", [5, 7, 9])
    done = olive(tmp_path, run, "onnx-fp32")
    assert done.returncode == 0, done.stdout
    (tmp_path / "made" / "model.onnx.data").write_text("")
    done = olive(tmp_path, run, "onnx-int4")
    assert "model.onnx.data is empty" in done.stdout


def test_wrong_arguments_exit_2(tmp_path: Path, run: Path) -> None:
    assert olive(tmp_path, run, "sing").returncode == 2
    assert olive(tmp_path, tmp_path).returncode == 2


@pytest.mark.parametrize("step", ["lora", "onnx-fp32", "onnx-int4"])
def test_configurations_are_json_with_known_places(step: str) -> None:
    text = (OLIVE / f"{step}.json").read_text()
    config = json.loads(text)
    assert config["output_dir"] == "{out}"
    assert config["input_model"]["model_path"] in ("{base}", "{model}")
