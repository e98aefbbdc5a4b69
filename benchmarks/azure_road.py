"""`phi3 up --on azure` over the rehearsed Azure with set waits, against its critical path.

Workspace, hub, project, cluster, endpoint and job take as many seconds as WAITS says. The critical
path is what their dependencies allow: workspace and cluster, beside hub and project; then the job,
beside the endpoint. The job's time is from its submission to its end. Not compared: preparing,
deploying and asking, which are this machine's own work. About four minutes.
Run: python benchmarks/azure_road.py [--scale 1] [-o json]
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from phi3_rehearsal import Rehearsal, start

# Seconds. Nearer to Azure's than the tests', and still shorter: a job's machine alone takes minutes
# to come up. With --scale 0.4 this machine's own seconds are most of what is seen.
WAITS = {"workspace": 30, "hub": 40, "project": 20, "cluster": 60, "job": 60, "endpoint": 60}
# The first that fits happens: a template is named after what it makes, workspace-hub, …
FAULTS = {
    "hub": "PUT */Microsoft.Resources/deployments/*-hub-* slow",
    "project": "PUT */Microsoft.Resources/deployments/*-project-* slow",
    "workspace": "PUT */Microsoft.Resources/deployments/* slow",
    "cluster": "* */computes/* slow",
    "job": "* */jobs/* slow",
    "endpoint": "PUT */onlineEndpoints/road-benchmark slow",
}
RECIPE = Path(__file__).resolve().parents[1] / "tests/e2e/small_azure"  # with its chats
# The looks as often as by default; everything else is the recipe's.
KEYS = ("azure.endpoint.name=road-benchmark", "azure.poll.interval=5", "azure.poll.job_interval=10")


def up(folder: Path, rehearsal: Rehearsal) -> dict[str, float]:
    """Seconds of each stage of one `phi3 up`."""
    env = {**os.environ, **rehearsal.env, "HOME": str(folder), "PF_HOME_DIRECTORY": str(folder)}
    command = [sys.executable, "-m", "phi3_training.cli", "up", "small.yaml", "--on", "azure"]
    command += [*KEYS, "--runs", str(folder / "runs")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"phi3 up failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    manifests = (folder / "runs" / "small-azure").glob("*.json")
    found = {path.stem: json.loads(path.read_text()) for path in manifests}
    return {name: item["seconds"] for name, item in found.items() if item.get("seconds")}


def job_seconds(rehearsal: Rehearsal) -> float:
    """From the answer to the job's submission to its end, as Azure counts it."""
    (path,) = rehearsal.folder.glob("jobs/*/status.json")
    ended = dt.datetime.fromisoformat(json.loads(path.read_text())["end"].replace("Z", "+00:00"))
    (put,) = (
        float(call["time"])
        for call in rehearsal.calls()
        if call["method"] == "PUT" and call["path"].endswith(f"/jobs/{path.parent.name}")
    )
    return ended.timestamp() - put


def main() -> None:
    """Run it and print wall time, series and critical path of both stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every wait")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    waits = {name: seconds * args.scale for name, seconds in WAITS.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(RECIPE, folder, dirs_exist_ok=True)
        rehearsal = start(folder / "azure")
        try:
            for what, fault in FAULTS.items():
                rehearsal.fault(f"{fault} seconds={waits[what]}")
            seconds = up(folder, rehearsal)
            job = job_seconds(rehearsal)
        finally:
            rehearsal.close()
    own, foundry = waits["workspace"] + waits["cluster"], waits["hub"] + waits["project"]
    rows = {
        "provision": (
            own + foundry,
            max(own, foundry),
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
