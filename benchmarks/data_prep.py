"""Prepares a synthetic set of chats as the tutorials do and as `phi3 data prepare` does.

Writes only to a temporary folder, removed at the end. Run: python benchmarks/data_prep.py [--gb 1]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

MB = 1_000_000
WARNED_ROWS = 500  # one row in so many holds a made-up e-mail address, one is nearly another


def write_chats(path: Path, size: int, seed: int = 7) -> int:
    """Rows in the shape of ultrachat_200k: prompt, prompt_id and some turns, 5 to 6 KB each."""
    chance = random.Random(seed)  # noqa: S311 - text, not secrets
    words = _words(chance)
    text = " ".join(chance.choices(words, k=400_000))
    rows, written, last = 0, 0, {}
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            near = rows % WARNED_ROWS == 17 and last
            row = _nearly(last, rows) if near else _row(chance, text, rows)
            written += stream.write(json.dumps(row) + "\n")
            rows, last = rows + 1, row
    return rows


def _words(chance: random.Random) -> list[str]:
    letters = "eeeetttaaaooinshrdlucmfwypvbgk"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(8000)]
    return [*words, *(f"{word}." for word in words[:800]), *(f"{word},\n" for word in words[:400])]


def _row(chance: random.Random, text: str, number: int) -> dict[str, Any]:
    def passage(least: int, most: int) -> str:
        start = chance.randrange(len(text) - most)
        return text[start : start + chance.randint(least, most)].strip()

    prompt = f"{passage(60, 600)} {number}?"
    messages = [{"content": prompt, "role": "user"}]
    for turn in range(chance.randint(2, 5)):
        if turn:
            messages.append({"content": passage(40, 300) + "?", "role": "user"})
        messages.append({"content": passage(600, 2000), "role": "assistant"})
    if number % WARNED_ROWS == 0:
        messages[1]["content"] += f" Write to user{number}@mail.invented-shop.net."
    prompt_id = hashlib.sha256(prompt.encode()).hexdigest()
    return {"prompt": prompt, "prompt_id": prompt_id, "messages": messages}


def _nearly(row: dict[str, Any], number: int) -> dict[str, Any]:
    messages = [dict(message) for message in row["messages"]]
    messages[-1]["content"] += f" And so on, {number}."
    return {**row, "messages": messages}


def baseline(source: Path, folder: Path) -> dict[str, Any]:
    """What the tutorials' script does: load, split without a seed, json.dump record by record."""
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    whole = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder / "cache")
    )
    for name, part in whole.train_test_split(test_size=0.2).items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for record in part:
                json.dump(record, stream)
                stream.write("\n")
    return {"seconds": time.perf_counter() - started, "rows": len(whole)}


def ours(source: Path, folder: Path) -> dict[str, Any]:
    """`phi3 data prepare` with every check on."""
    from phi3_training.data import prepare
    from phi3_training.recipe import DataSection
    from phi3_training.run import Run

    started = time.perf_counter()
    manifest = prepare(DataSection(train=[source]), Run.open(folder / "run"))
    return {
        "seconds": time.perf_counter() - started,
        "rows": sum(part["rows"] for part in manifest["outputs"].values()),
        "warnings": manifest["warnings"],
        "tokens": manifest["tokens"],
    }


def _child(
    work: Callable[[Path, Path], dict[str, Any]], source: Path, folder: Path, out: Any
) -> None:
    out.send(work(source, folder))
    out.close()


def measured(work: Callable[[Path, Path], dict[str, Any]], source: Path) -> dict[str, Any]:
    """Do the work in a new process; adds the most memory that it and its children held at once."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(work, source, Path(folder), there))
        process.start()
        there.close()
        peak = _Peak(process.pid)
        peak.start()
        try:
            found: dict[str, Any] = here.recv()
        except EOFError:
            raise SystemExit(f"{work.__name__} failed") from None
        finally:
            process.join()
            peak.stop()
    return {**found, "peak_mb": peak.most / MB}


class _Peak(threading.Thread):
    """Watches the memory of a process and its children: private pages, and shared ones once."""

    def __init__(self, pid: int | None) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self.most = 0

    def run(self) -> None:
        while not self._done.wait(0.05):
            self.most = max(self.most, self._now())

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _now(self) -> int:
        total = 0
        try:
            for one in [self._process, *self._process.children(recursive=True)]:
                memory = one.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
        except psutil.Error:
            return 0
        return total


def main() -> int:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.1, help="size of the set (0.1)")
    parser.add_argument("--rounds", type=int, default=1, help="measure so often, take the medians")
    parser.add_argument("--ours-only", action="store_true", help="leave the baseline out")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="phi3-bench-") as folder:
        source = Path(folder) / "chats.jsonl"
        rows = write_chats(source, int(args.gb * 1000 * MB))
        size = source.stat().st_size
        print(f"{rows} conversations, {size / MB:.0f} MB, {os.cpu_count()} cores")
        sides = [("phi3 data prepare", ours)]
        if not args.ours_only:
            sides.insert(0, ("tutorials' way (baseline)", baseline))
        speeds = {}
        for name, work in sides:
            found = [measured(work, source) for _ in range(args.rounds)]
            seconds = sorted(one["seconds"] for one in found)[args.rounds // 2]
            peak = max(one["peak_mb"] for one in found)
            if any(one["rows"] != rows for one in found):
                raise SystemExit(f"{name}: rows were lost")
            speeds[name] = rows / seconds
            print(
                f"{name:28} {seconds:7.2f} s {rows / seconds:9.0f} rows/s "
                f"{size / MB / seconds:6.0f} MB/s   peak {peak:5.0f} MB"
            )
            for key in ("warnings", "tokens"):
                if key in found[0]:
                    print(f"{'':28} {key}: {found[0][key]}")
        if len(speeds) == 2:
            slow, fast = speeds.values()
            print(f"ratio: {fast / slow:.1f} times the rows per second of the baseline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
