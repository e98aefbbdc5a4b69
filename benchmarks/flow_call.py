"""One call of the tool: the tutorials' (baseline), open_model_llm, ours, and a bare pooled session.

Each runs in a separate process against the same stub endpoint, plain and over TLS, at 0 and
50 ms, first called directly, then (the two flows) through Prompt flow's executor. At last, whole
cold `pf flow test` commands, alternating. CPU is this side's process time, the reliable figure on
a busy machine. Run: python benchmarks/flow_call.py [--seconds 2] [--cold 3] [-o json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from support.endpoint import endpoint
from support.place import CONNECTION, KEY, TUTORIAL_FLOW, Place, machine, place

ROOT = Path(__file__).parents[1]
OUR_FLOW = ROOT / "flows" / "phi3_chat"
QUESTION = "Who founded Microsoft?"
BASELINE = {"our flow": "tutorial flow"}  # compared with each other, all else with "tutorial"
WARM_UP = 5


@dataclass(frozen=True)
class Cost:
    """Milliseconds per call."""

    cpu: float
    wall: float
    calls: int


def tutorial(url: str) -> Callable[[], str]:
    """The baseline's tool function, as a flow's node calls it."""
    sys.path.insert(0, str(TUTORIAL_FLOW))
    from ask_endpoint import ask_endpoint

    connection = _connection(url)
    return lambda: ask_endpoint(connection=connection, input_data=QUESTION)


def ours(url: str) -> Callable[[], str]:
    """Our tool function."""
    from phi3_tool.chat import phi3_chat

    connection = _connection(url)
    return lambda: phi3_chat(connection=connection, input_data=QUESTION, chat_history=[])


def open_model_llm(url: str) -> Callable[[], str]:
    """The tool for open models that promptflow-tools ships."""
    from promptflow.tools.open_model_llm import API, ModelFamily, OpenModelLLM

    tool = OpenModelLLM()
    return lambda: tool.call(
        prompt=f"user:\n{QUESTION}",
        api=API.CHAT,
        endpoint_name="localConnection/phi3",
        temperature=0.0,
        max_new_tokens=256,
        endpoint_url=url,
        endpoint_api_key=KEY,
        model_family=ModelFamily.LLAMA,
    )


def session(url: str) -> Callable[[], str]:
    """What requests itself costs with a kept connection: the floor of a client built on it."""
    import requests

    pooled = requests.Session()
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {
        "input_data": {
            "input_string": [{"role": "user", "content": QUESTION}],
            "parameters": {"temperature": 0.0, "max_new_tokens": 256},
        }
    }

    def call() -> str:
        answer = pooled.post(url, json=body, headers=headers, timeout=60)
        answer.raise_for_status()
        return str(answer.json()["output"])

    return call


def through_flow(folder: Path, node: str) -> Callable[[str], Callable[[], str]]:
    """A flow, run in this process by Prompt flow, as its servers do for each request."""

    def prepare(url: str) -> Callable[[], str]:
        os.environ.setdefault("PF_LOGGING_LEVEL", "ERROR")
        from promptflow.client import load_flow
        from promptflow.entities import FlowContext

        flow = load_flow(folder)
        flow.context = FlowContext(connections={node: {"connection": _connection(url)}})
        return lambda: str(flow(input_data=QUESTION, chat_history=[])["answer"])

    return prepare


PREPARE: dict[str, Callable[[str], Callable[[], str]]] = {
    "tutorial": tutorial,
    "open_model_llm": open_model_llm,
    "ours": ours,
    "session": session,
    "tutorial flow": through_flow(TUTORIAL_FLOW, "ask_endpoint"),
    "our flow": through_flow(OUR_FLOW, "integrate_with_promptflow"),
}


def measure(call: Callable[[], str], seconds: float) -> Cost:
    """Call for some seconds, after a few calls that do not count."""
    for _ in range(WARM_UP):
        if "Gates" not in call():
            raise RuntimeError("the stub's answer did not arrive")
    calls = 0
    cpu, wall = time.process_time(), time.monotonic()
    while time.monotonic() - wall < seconds:
        call()
        calls += 1
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return Cost(1000 * cpu / calls, 1000 * wall / calls, calls)


def in_own_process(where: Place, name: str, url: str, seconds: float) -> Cost:
    """Measure one contender in a fresh process."""
    command = [sys.executable, __file__, "--worker", name, url, "--seconds", str(seconds)]
    done = subprocess.run(
        command, env=where.env, cwd=where.folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def cold_tests(where: Place, times: int) -> dict[str, list[Cost]]:
    """Whole `pf flow test` commands over TLS, both flows alternating."""
    flows = dict(zip(("tutorial flow", "our flow"), where.copy_flows(), strict=True))
    found: dict[str, list[Cost]] = {name: [] for name in flows}
    pf = Path(sys.executable).with_name("pf")
    with endpoint(0, where.certificate) as url:
        where.connect(url)
        for turn in range(times + 1):
            for name, folder in flows.items():
                command = [str(pf), "flow", "test", "--flow", str(folder)]
                cost = _command(
                    [*command, "--inputs", f"input_data={QUESTION}"], where.env, where.folder
                )
                if turn:  # the first one writes caches
                    found[name].append(cost)
    return found


def _command(command: list[str], env: dict[str, str], cwd: Path) -> Cost:
    before, started = os.times(), time.monotonic()
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    after, wall = os.times(), time.monotonic() - started
    if done.returncode or "Gates" not in done.stdout:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-800:]}{done.stderr[-800:]}")
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return Cost(1000 * cpu, 1000 * wall, 1)


def _connection(url: str) -> object:
    from promptflow.connections import CustomConnection

    return CustomConnection(name=CONNECTION, configs={"endpoint": url}, secrets={"key": KEY})


def _table(title: str, costs: dict[str, Cost]) -> list[dict[str, object]]:
    print(f"\n{title}\n{'':16}{'CPU ms':>9}{'ratio':>8}{'wall ms':>10}{'ratio':>8}{'calls':>8}")
    rows = []
    for name, cost in costs.items():
        base = costs[BASELINE.get(name, name if name in BASELINE.values() else "tutorial")]
        cpu, wall = cost.cpu / base.cpu, cost.wall / base.wall
        print(f"{name:16}{cost.cpu:>9.2f}{cpu:>8.3f}{cost.wall:>10.2f}{wall:>8.3f}{cost.calls:>8}")
        rows.append(
            {"case": title, "name": name, **asdict(cost), "cpu_ratio": cpu, "wall_ratio": wall}
        )
    return rows


def compare(where: Place, seconds: float, cold: int) -> list[dict[str, object]]:
    """Everything, one table after the other; ratios are to the tutorials' way."""
    rows = []
    for scheme, certificate in (("http", None), ("https", where.certificate)):
        for latency in (0, 50):
            with endpoint(latency, certificate) as url:
                costs = {name: in_own_process(where, name, url, seconds) for name in PREPARE}
            rows += _table(f"{scheme}, {latency} ms endpoint, per call", costs)
    if cold:
        taken = cold_tests(where, cold)
        medians = {
            name: Cost(
                statistics.median(cost.cpu for cost in costs),
                statistics.median(cost.wall for cost in costs),
                len(costs),
            )
            for name, costs in taken.items()
        }
        rows += _table(f"pf flow test, whole command, median of {cold}", medians)
    return rows


def main() -> None:
    """Compare, print the tables; with `-o json` also one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="for each figure (default 2)")
    parser.add_argument("--cold", type=int, default=3, help="cold commands each (default 3)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "URL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, url = args.worker
        print(json.dumps(asdict(measure(PREPARE[name](url), args.seconds))))
        return
    print(machine())
    with place() as where:
        rows = compare(where, args.seconds, args.cold)
    if args.output == "json":
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
