"""`phi3 up --on azure` over the rehearsed Azure with set waits, against its critical path.

Workspace, hub, project, cluster, endpoint and job take as many seconds as WAITS says. The critical
path is what their dependencies allow: workspace, then cluster beside hub and project; then the job
beside the endpoint. The job's own time is what the rehearsal ran it for. Not compared: preparing,
deploying and asking, which are this machine's own work. About three minutes.
Run: python benchmarks/azure_road.py [--scale 1] [-o json]
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from phi3_rehearsal import Rehearsal, start

# Seconds. Templates come in this order; the others are named by their resource.
TEMPLATES = {"workspace": 15, "hub": 25, "project": 15}
WAITS = {**TEMPLATES, "cluster": 45, "job": 20, "endpoint": 30}
FAULTS = {
    "cluster": "* */computes/* slow",
    "job": "* */jobs/* slow",
    "endpoint": "PUT */onlineEndpoints/road-benchmark slow",
}
RECIPE = """\
name: road
model: {name_or_path: tiny}
base: {data: chats.jsonl, vocab_size: 400, hidden_size: 32, intermediate_size: 48,
       num_hidden_layers: 2, num_attention_heads: 2, num_train_epochs: 2}
data: {train: chats.jsonl, validation_share: 0.1}
finetune: {learning_rate: 5.0e-3, num_train_epochs: 1, per_device_train_batch_size: 8,
           lora_r: 4, num_threads: 1}
evaluate: {max_rows: 5, max_new_tokens: 8, canary: [], probes: [], resamples: 100}
gate: {min_gain: [], max_regression: [], max_refusal_change: []}
azure: {endpoint: {name: road-benchmark}, train: {route: job},
        poll: {interval: 0.5, job_interval: 1}}
ask: "What does lamp number 1 cost?"
"""


def write_inputs(folder: Path) -> None:
    """A recipe and 56 chats."""
    words = ("lamp", "boat", "stove", "tent", "kettle", "drum", "rope", "axe")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What does {word} number {size} cost?"},
                {"role": "assistant", "content": f"It is {size * 3} euros"},
            ]
        }
        for size in range(1, 8)
        for word in words
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "road.yaml").write_text(RECIPE)


def up(folder: Path, rehearsal: Rehearsal) -> dict[str, float]:
    """Seconds of each stage of one `phi3 up`."""
    env = {**os.environ, **rehearsal.env, "HOME": str(folder), "PF_HOME_DIRECTORY": str(folder)}
    command = [sys.executable, "-m", "phi3_training.cli", "up", "road.yaml", "--on", "azure"]
    command += ["--runs", str(folder / "runs")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"phi3 up failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    manifests = (folder / "runs" / "road-azure").glob("*.json")
    found = {path.stem: json.loads(path.read_text()) for path in manifests}
    return {name: item["seconds"] for name, item in found.items() if item.get("seconds")}


def job_seconds(folder: Path) -> float:
    """How long the rehearsal ran the job, its set wait included."""
    (status,) = (json.loads(path.read_text()) for path in folder.glob("jobs/*/status.json"))
    begun, ended = (
        dt.datetime.fromisoformat(status[at].replace("Z", "+00:00")) for at in ("start", "end")
    )
    return (ended - begun).total_seconds()


def main() -> None:
    """Run it and print wall time, series and critical path of both stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every wait")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    waits = {name: seconds * args.scale for name, seconds in WAITS.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        rehearsal = start(folder / "azure")
        try:
            for template in TEMPLATES:
                fault = "PUT */Microsoft.Resources/deployments/* slow"
                rehearsal.fault(f"{fault} seconds={waits[template]}")
            for what, fault in FAULTS.items():
                rehearsal.fault(f"{fault} seconds={waits[what]}")
            seconds = up(folder, rehearsal)
            job = job_seconds(folder / "azure")
        finally:
            rehearsal.close()
    project = waits["hub"] + waits["project"]
    rows = {
        "provision": (
            waits["workspace"] + waits["cluster"] + project,
            waits["workspace"] + max(waits["cluster"], project),
            seconds["azure"],
        ),
        "finetune": (
            job + waits["endpoint"],
            max(job, waits["endpoint"]),
            seconds["model"],
        ),
    }
    whole = [sum(row[place] for row in rows.values()) for place in range(3)]
    rows["both"] = (whole[0], whole[1], whole[2])
    if args.output == "json":
        print(json.dumps({"waits": waits, "job": job, "stages": rows}, indent=1))
        return
    print(f"{'':12}{'in series':>12}{'critical path':>16}{'measured':>12}{'ratio':>8}")
    for stage, (series, critical, measured) in rows.items():
        ratio = measured / critical
        print(f"{stage:12}{series:>10.1f} s{critical:>14.1f} s{measured:>10.1f} s{ratio:>8.2f}")


if __name__ == "__main__":
    main()
