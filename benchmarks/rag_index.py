"""Indexes made-up documents with the real embedder: the time beside the embedder's own.

Prints the ratio of the whole to the embedder alone (both from the same run, so that other programs
disturb them alike), the memory's growth, the time of an unchanged second run, and a search. Writes
to a temporary folder, removed at the end. The embedder is downloaded once (22 MB).
Run: python benchmarks/rag_index.py [--passages 10000]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi3_tool.embedders import OnnxEmbedder
from phi3_tool.index import DocumentIndex
from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, EmbedderUnavailableError, minilm, sync

CHATS = Path(__file__).parents[1] / "training" / "data" / "general_chats.jsonl"
SECTIONS = 20  # of a document, each about one passage
SENTENCES = 7  # of a section: about 120 words, as a paragraph of XQuAD has


class Timed(OnnxEmbedder):
    """Adds up the seconds that embedding takes."""

    seconds = 0.0

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        started = time.perf_counter()
        vectors = super().embed(texts)
        self.seconds += time.perf_counter() - started
        return vectors


def write_documents(folder: Path, passages: int, seed: int = 7) -> None:
    """Markdown files of sentences from the shipped chats, in an order that does not repeat."""
    chance = random.Random(seed)  # noqa: S311 - text, not secrets
    sentences = [
        message["content"]
        for line in CHATS.read_text("utf-8").splitlines()
        for message in json.loads(line)["messages"]
    ]
    for number in range(-(-passages // SECTIONS)):
        sections = [
            f"## Section {number}.{part}\n\n" + " ".join(chance.sample(sentences, SENTENCES))
            for part in range(min(SECTIONS, passages - number * SECTIONS))
        ]
        (folder / f"{number:04}.md").write_text("\n\n".join([f"# File {number}", *sections]))


def main() -> None:
    """Index, index again, search; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=10_000)
    wanted = parser.parse_args().passages
    try:
        embedder = Timed(minilm(no_progress))
    except EmbedderUnavailableError as error:
        print(f"not measured: {error}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name) / "documents", Path(name) / "index.sqlite"
        folder.mkdir()
        write_documents(folder, wanted)
        embedder.embed(["warm"])
        embedder.seconds = 0.0
        chosen = Chosen(embedder, {"kind": "onnx", "folder": name}, "")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = sync(file, [folder], chosen, no_progress)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        own = embedder.seconds
        print(f"{done.passages} passages of {done.documents} documents: {done.seconds:.1f} s")
        print(f"the embedder alone: {own:.1f} s ({1000 * own / done.passages:.1f} ms a passage)")
        print(f"ratio: {done.seconds / own:.3f}")
        print(f"memory grew by {grown} MB; the index has {file.stat().st_size / 1e6:.0f} MB")
        again = sync(file, [folder], chosen, no_progress)
        print(f"again, unchanged: {again.seconds:.2f} s, {again.embedded} embedded")
        index = DocumentIndex(file)
        took = []
        for number in range(50):
            started = time.perf_counter()
            index.search(f"What is said about section {number}?", embedder=embedder)
            took.append(time.perf_counter() - started)
        print(f"a question, median: {1000 * statistics.median(took):.1f} ms")


if __name__ == "__main__":
    main()
