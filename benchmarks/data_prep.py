"""Prepares a synthetic set of chats as the tutorials do and as `phi3 data prepare` does.

Writes only to a temporary folder, removed at the end, and prints both sides of each repeat, the
ratio and the most memory. Run: python benchmarks/data_prep.py [--megabytes 1000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

MB = 1_000_000
WARNED_ROWS = 500  # one row in so many holds a made-up e-mail address, one is nearly another
FOREIGN_ROWS = 12  # one row in so many has letters beyond ASCII, written as escapes
Work = Callable[[Path, Path], dict[str, Any]]


def write_chats(path: Path, size: int, seed: int = 7) -> int:
    """Rows in the shape of ultrachat_200k: prompt, prompt_id and some turns, 5 to 6 KB each."""
    writer = ChatWriter(seed)
    rows, written, last = 0, 0, {}
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            near = rows % WARNED_ROWS == 17 and last
            row = _nearly(last, rows) if near else writer.row(rows)
            written += stream.write(json.dumps(row) + "\n")
            rows, last = rows + 1, row
    return rows


class ChatWriter:
    """Makes up conversations: sentences of made-up words, paragraphs, lists and quotes."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - text, not secrets
        letters = "eeeetttaaaooinshrdlucmfwypvbgk"
        plain = ["".join(self._chance.choices(letters, k=2 + n % 8)) for n in range(8000)]
        marked = [f"{word}{mark}" for mark in (".", ",", ".\n\n") for word in plain[:400]]
        quoted = [f'"{word}"' for word in plain[:100]] + [f"{word}'s" for word in plain[:100]]
        listed = [f"\n{n}. {word}" for n, word in enumerate(plain[:60], start=1)]
        self._words = [*plain, *marked, *quoted, *listed]
        foreign = ["caf\u00e9", "na\u00efve", "it\u2019s", "\u2014", "\u65e5\u672c", "\u00fcber"]
        self._foreign = [*self._words, *(foreign * 30)]

    def row(self, number: int) -> dict[str, Any]:
        """One conversation of two to five questions and answers."""
        words = self._foreign if number % FOREIGN_ROWS == 0 else self._words

        def passage(least: int, most: int) -> str:
            return " ".join(self._chance.choices(words, k=self._chance.randint(least, most)))

        prompt = f"{passage(10, 100)} {number}?"
        messages = [{"content": prompt, "role": "user"}]
        for turn in range(self._chance.randint(2, 5)):
            if turn:
                messages.append({"content": passage(7, 50) + "?", "role": "user"})
            messages.append({"content": passage(100, 340), "role": "assistant"})
        if number % WARNED_ROWS == 0:
            messages[1]["content"] += f" Write to user{number}@mail.invented-shop.net."
        prompt_id = hashlib.sha256(prompt.encode()).hexdigest()
        return {"prompt": prompt, "prompt_id": prompt_id, "messages": messages}


def _nearly(row: dict[str, Any], number: int) -> dict[str, Any]:
    messages = [dict(message) for message in row["messages"]]
    messages[-1]["content"] += f" And so on, {number}."
    return {**row, "messages": messages}


class Watch:
    """Seconds by the clock, and of the processor: the latter hang little on what else runs."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), self._processor()

    def read(self) -> dict[str, float]:
        """Both, since the start."""
        clock, processor = self._started
        return {"seconds": time.perf_counter() - clock, "cpu": self._processor() - processor}

    @staticmethod
    def _processor() -> float:
        """Of this process and its ended children."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)


def baseline(source: Path, folder: Path) -> dict[str, Any]:
    """What the tutorials' script does: load, split without a seed, json.dump record by record."""
    import datasets

    datasets.disable_progress_bars()
    watch = Watch()
    whole = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder / "cache")
    )
    for name, part in whole.train_test_split(test_size=0.2).items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for record in part:
                json.dump(record, stream)
                stream.write("\n")
    return {**watch.read(), "rows": len(whole)}


def ours(source: Path, folder: Path) -> dict[str, Any]:
    """`phi3 data prepare` with every check on."""
    from phi3_training.data import prepare
    from phi3_training.recipe import DataSection
    from phi3_training.run import Run

    watch = Watch()
    manifest = prepare(DataSection(train=[source]), Run.open(folder / "run"))
    return {
        **watch.read(),
        "rows": sum(part.rows for part in manifest.outputs.values()),
        "warnings": manifest.warnings,
    }


def _child(work: Work, source: Path, folder: Path, out: Any) -> None:
    out.send(work(source, folder))
    out.close()


def measured(work: Work, source: Path) -> dict[str, Any]:
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


SIDES = (("tutorials' way (baseline)", baseline), ("phi3 data prepare", ours))


def repeat(source: Path, rows: int, sides: tuple[tuple[str, Work], ...]) -> list[dict[str, Any]]:
    """Measure each side once, one after the other, and print what was seen."""
    size = source.stat().st_size
    found = []
    for name, work in sides:
        one = measured(work, source)
        if one["rows"] != rows:
            raise SystemExit(f"{name}: rows were lost")
        print(
            f"{name:26} {one['seconds']:7.2f} s {rows / one['seconds']:8.0f} rows/s "
            f"{size / MB / one['seconds']:5.0f} MB/s   processor {one['cpu']:6.2f} s   "
            f"peak {one['peak_mb']:4.0f} MB"
        )
        found.append(one)
    return found


def main() -> int:
    """Measure both sides back to back, so often, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="size of the set (100)")
    parser.add_argument("--repeats", type=int, default=3, help="measure so often (3)")
    parser.add_argument("--ours-only", action="store_true", help="leave the baseline out")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="phi3-bench-") as folder:
        source = Path(folder) / "chats.jsonl"
        rows = write_chats(source, args.megabytes * MB)
        size = source.stat().st_size / MB
        load = os.getloadavg()[0]
        print(f"{rows} conversations, {size:.0f} MB; {os.cpu_count()} cores, load {load:.1f}")
        sides = SIDES[1:] if args.ours_only else SIDES
        found = [repeat(source, rows, sides) for _ in range(args.repeats)]
    print(f"found on the way: {found[0][-1]['warnings']}")
    print(f"peak memory of phi3 data prepare: {max(one[-1]['peak_mb'] for one in found):.0f} MB")
    if not args.ours_only:
        _print_ratios(
            "rows per second", [slow["seconds"] / fast["seconds"] for slow, fast in found]
        )
        _print_ratios("processor time", [slow["cpu"] / fast["cpu"] for slow, fast in found])
    return 0


def _print_ratios(what: str, ratios: list[float]) -> None:
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"ratio by {what}: {median(ratios):.2f} (median of {each})")


if __name__ == "__main__":
    sys.exit(main())
