"""32 chats at once through `phi3 agent serve`, beside the client that asks the endpoint itself.

Both sides are phi3_tool's client with the same number of threads and the same endpoint, which
answers after a set time; rounds alternate. The server runs in .venv-agent (`make agent`).
Run: python benchmarks/agent_serve.py [--clients 32] [--milliseconds 50 200] [--rounds 3]
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import requests
from support.endpoint import endpoint
from support.place import machine

from phi3_tool.client import Phi3Client
from phi3_training.agent.environment import agent_python, command, environment
from phi3_training.processes import free_port

QUESTION = [{"role": "user", "content": "Who founded Microsoft?"}]
EACH = 10  # questions of a client in a round


@contextmanager
def served(url: str, key: str) -> Iterator[str]:
    """The agent's server in front of the endpoint; yields its chat completions' URL."""
    port = free_port()
    variables = environment({"PHI3_ENDPOINT": url, "PHI3_KEY": key}, {"PHI3_AGENT_KEY": key})
    words = command(agent_python(), ["serve", "--port", str(port)])
    with subprocess.Popen(words, env=variables, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                try:
                    requests.get(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except requests.ConnectionError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.terminate()


def rate(client: Phi3Client, clients: int) -> float:
    """Answers per second of that many threads."""

    def ask(_: int) -> None:
        for _ in range(EACH):
            client.chat(QUESTION, max_new_tokens=16)

    with ThreadPoolExecutor(clients) as people:
        started = time.perf_counter()
        list(people.map(ask, range(clients)))
        return clients * EACH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--milliseconds", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    key = secrets.token_urlsafe(16)
    print(f"{machine()}; {args.clients} chats at once")
    for wait in args.milliseconds:
        with endpoint(wait) as url, served(url, key) as agent:
            bare, through = Phi3Client(url, key), Phi3Client(agent, key)
            rate(bare, args.clients), rate(through, args.clients)  # connections, imports
            pairs = [
                (rate(bare, args.clients), rate(through, args.clients)) for _ in range(args.rounds)
            ]
        direct, served_rate = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(
            f"answers after {wait} ms: {direct:.0f} a second without the agent, "
            f"{served_rate:.0f} through it, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
