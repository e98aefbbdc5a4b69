"""Serving speed: our engine against Hugging Face, ONNX Runtime GenAI, llama.cpp and the memory bus.

Random weights in the shapes of `small` (SmolLM2-135M in Phi-3's architecture) and of a 0.5 B Phi-3,
or a folder of yours. Users ask again as soon as they are answered; every answer has its full
length. All sides work in this process with token ids, alternating. Share of the roofline: bytes of
weights that a token needs, times tokens per second, over the read bandwidth measured in this run.
Run: python benchmarks/serving.py [--quick] [--shapes small,half] [--model FOLDER]
[--precisions int4,int8] [--gguf FILE [--llama-server PATH]] [--requests 10000] [-o json]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from support.place import machine

from phi3_training.finetune.runtime import quiet_libraries
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.processes import free_port
from phi3_training.serve.engines import onnxruntime
from phi3_training.serve.engines.base import Sampling
from phi3_training.serve.engines.batch import REJOIN_SECONDS, Batcher, Job, Sampler
from phi3_training.serve.export import Precision, export_onnx

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "half": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 4096, "vocab_size": 32064,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000,
    },
}  # fmt: skip
CONTEXT = 2048
PROMPTS = {"short": 24, "long": 400}
# Of many lengths, so that answers do not all end at once.
ANSWERS = (24, 40, 32, 56, 48)
_OURS = "ours"


@dataclass(frozen=True)
class Row:
    """What one side did for some users. First tokens in milliseconds, CPU per token too."""

    model: str
    side: str
    prompt: str
    users: int
    tokens_per_second: float
    first_p50: float
    first_p95: float
    cpu_ms: float
    roofline: float | None = None


@dataclass
class Load:
    """How long and what one measurement asks; `seconds` ends it, each user asks at least once."""

    prompt: str
    users: int
    seconds: float

    def ids(self, number: int) -> list[int]:
        """A prompt unlike the others."""
        random = np.random.default_rng(number)
        length = PROMPTS[self.prompt] + number % 7
        return [int(i) for i in random.integers(5, 900, length)]


@dataclass
class Seen:
    """First tokens in seconds, tokens in all, wall and CPU seconds."""

    firsts: list[float]
    tokens: int
    wall: float
    cpu: float

    def row(self, model: str, side: str, load: Load, roofline: float | None = None) -> Row:
        """The figures of a table row; `roofline`: tokens per second that the memory allows."""
        speed = self.tokens / self.wall
        firsts = sorted(1000 * first for first in self.firsts)
        return Row(
            model,
            side,
            load.prompt,
            load.users,
            speed,
            statistics.median(firsts),
            firsts[int(len(firsts) * 0.95)],
            1000 * self.cpu / self.tokens,
            speed / roofline if roofline and load.users == 1 else None,
        )


def cpu_seconds(pid: int | None = None) -> float:
    """User and system time of a process."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


# What the machine gives


def read_bandwidth(seconds: float) -> float:
    """Bytes per second that all cores read together, the best of several times."""
    cores = os.cpu_count() or 1
    parts = [np.ones(2**25, np.float32) for _ in range(cores)]  # 128 MiB each
    best = 0.0
    end = time.perf_counter() + seconds
    with ThreadPoolExecutor(cores) as pool:
        while not best or time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(lambda part: float(part.dot(part)), parts))
            best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - began))
    return best


def sgemm_rate(seconds: float, size: int = 1536) -> float:
    """Floating point operations per second of a float32 matrix product, the best of several."""
    matrix = np.ones((size, size), np.float32)
    best = 0.0
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        began = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def bytes_per_token(onnx_dir: Path) -> int:
    """Bytes of the matrices that every token is multiplied by."""
    graph = onnx.load(onnx_dir / "model.onnx", load_external_data=False).graph
    sizes = {i.name: _size(i) for i in graph.initializer}
    products = [node for node in graph.node if node.op_type.startswith("MatMul")]
    return sum(sizes.get(name, 0) for node in products for name in set(node.input))


def _size(tensor: onnx.TensorProto) -> int:
    item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims) * item)


# Models


def random_model(shape: str, folder: Path) -> Path:
    """A model folder with random weights."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    settings = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": CONTEXT}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**settings, **ids, **SHAPES[shape]))
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(["A tokenizer of any kind."], folder, vocab_size=600, model_max_length=CONTEXT)
    return folder


# Sides: each makes a function that takes a load and returns what was seen

Side = Callable[[Load], Seen]


@contextmanager
def ours(onnx_dir: Path, rejoin_seconds: float = REJOIN_SECONDS) -> Iterator[Side]:
    """The engine `onnxruntime` with its batcher: what the endpoint runs."""
    model = onnxruntime.step_model(onnx_dir)
    batcher = Batcher(model, slots=32, rejoin_seconds=rejoin_seconds)
    try:
        yield lambda load: asyncio.run(_ask_ours(batcher, load))
    finally:
        batcher.close()


async def _ask_ours(batcher: Batcher, load: Load) -> Seen:
    firsts: list[float] = []
    counts = [0] * load.users
    began, cpu = time.perf_counter(), cpu_seconds()

    async def user(number: int) -> None:
        turn = number
        while turn == number or time.perf_counter() < began + load.seconds:
            sampler = Sampler(Sampling(temperature=0.0))
            job = Job(load.ids(turn), ANSWERS[turn % len(ANSWERS)], sampler, frozenset())
            asked = time.perf_counter()
            batcher.submit(job)
            await job.next()
            firsts.append(time.perf_counter() - asked)
            counts[number] += 1
            while await job.next() is not None:
                counts[number] += 1
            turn += load.users

    await asyncio.gather(*(user(number) for number in range(load.users)))
    return Seen(firsts, sum(counts), time.perf_counter() - began, cpu_seconds() - cpu)


@contextmanager
def genai(onnx_dir: Path) -> Iterator[Side]:
    """ONNX Runtime GenAI's own Generator: users in a batch that starts and ends together."""
    import onnxruntime_genai as og

    model = og.Model(str(onnx_dir))
    answer = ANSWERS[0]

    def batch(load: Load, number: int) -> tuple[float, int]:
        params = og.GeneratorParams(model)
        length = PROMPTS[load.prompt]
        params.set_search_options(
            batch_size=load.users, max_length=length + answer, min_length=length + answer,
            do_sample=False,
        )  # fmt: skip
        ids = [load.ids(number + user)[:length] for user in range(load.users)]
        began = time.perf_counter()
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        generator.generate_next_token()
        first, made = time.perf_counter() - began, 1
        while made < answer and not generator.is_done():
            generator.generate_next_token()
            made += 1
        return first, made * load.users

    yield lambda load: _in_batches(batch, load)


@contextmanager
def hugging_face(model_dir: Path) -> Iterator[Side]:
    """transformers' generate in float32, users in a batch that starts and ends together."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    answer = ANSWERS[0]

    def batch(load: Load, number: int) -> tuple[float, int]:
        length = PROMPTS[load.prompt]
        ids = torch.tensor([load.ids(number + user)[:length] for user in range(load.users)])
        times: list[float] = []

        def note(*_: object) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(load.users, dtype=torch.bool)

        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer,
            min_new_tokens=answer, do_sample=False, stopping_criteria=[note],
        )  # fmt: skip
        return times[0] - began, answer * load.users

    yield lambda load: _in_batches(batch, load)


def _in_batches(batch: Callable[[Load, int], tuple[float, int]], load: Load) -> Seen:
    firsts, tokens, number = [], 0, 0
    began, cpu = time.perf_counter(), cpu_seconds()
    while not firsts or time.perf_counter() < began + load.seconds:
        first, made = batch(load, number)
        firsts += [first] * load.users
        tokens += made
        number += load.users
    return Seen(firsts, tokens, time.perf_counter() - began, cpu_seconds() - cpu)


@contextmanager
def llama_cpp(gguf: Path, server: str | None, slots: int) -> Iterator[Side]:
    """llama.cpp's server over HTTP on the same machine: `server`, or the one in `xllamacpp`."""
    port, cores = free_port(), os.cpu_count() or 1
    if server:
        command = [
            server, "-m", str(gguf), "--port", str(port), "-np", str(slots), "-t", str(cores),
            "-c", str(slots * 1024),
        ]  # fmt: skip
    else:
        code = (
            "import sys, time, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; "
            "p.port = int(sys.argv[2]); p.n_parallel = int(sys.argv[3]); "
            "p.n_ctx = 1024 * p.n_parallel; p.cpuparams.n_threads = int(sys.argv[4]); "
            "s = x.Server(p); time.sleep(3600)"
        )
        command = [sys.executable, "-c", code, str(gguf), str(port), str(slots), str(cores)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield lambda load: asyncio.run(_ask_llama(port, process.pid, load))
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"llama.cpp's server did not answer within {seconds:.0f} s")


async def _ask_llama(port: int, pid: int, load: Load) -> Seen:
    firsts: list[float] = []
    counts = [0] * load.users
    began, cpu = time.perf_counter(), cpu_seconds(pid)

    def ask(number: int, turn: int) -> None:
        body = {
            "prompt": load.ids(turn), "n_predict": ANSWERS[turn % len(ANSWERS)], "stream": True,
            "ignore_eos": True, "temperature": 0, "cache_prompt": False,
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        asked = time.perf_counter()
        connection.request("POST", "/completion", json.dumps(body))
        response = connection.getresponse()
        response.readline()
        firsts.append(time.perf_counter() - asked)
        response.read()
        counts[number] += ANSWERS[turn % len(ANSWERS)]

    async def user(number: int) -> None:
        turn = number
        while turn == number or time.perf_counter() < began + load.seconds:
            await asyncio.to_thread(ask, number, turn)
            turn += load.users

    await asyncio.gather(*(user(number) for number in range(load.users)))
    return Seen(firsts, sum(counts), time.perf_counter() - began, cpu_seconds(pid) - cpu)


# The comparison


def compare(args: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, float]]:
    """All models and sides, with the machine's own rates."""
    bandwidth, sgemm = read_bandwidth(args.seconds), sgemm_rate(args.seconds)
    say(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, sgemm {sgemm / 1e9:.0f} GFLOP/s, all cores")
    rows: list[Row] = []
    names = [None] if args.model else args.shapes
    for shape in names:
        label = shape or args.model.name
        model_dir = args.model or random_model(shape, folder / shape)
        converted: dict[Precision, Path] = {}
        for precision in args.precisions:
            path = folder / f"{label}-{precision}"
            took = export_onnx(model_dir, path, precision)["seconds"]
            size = bytes_per_token(path)
            say(f"{label} {precision}: converted in {took:.0f} s, {size / 1e6:.0f} MB a token")
            converted[precision] = path
        rows += _measure(args, label, model_dir, converted, bandwidth)
    return rows, {"read_gb_s": bandwidth / 1e9, "sgemm_gflop_s": sgemm / 1e9}


def _measure(
    args: argparse.Namespace,
    label: str,
    model_dir: Path,
    converted: dict[Precision, Path],
    bandwidth: float,
) -> list[Row]:
    from contextlib import ExitStack

    rows: list[Row] = []
    with ExitStack() as stack:
        sides: dict[str, tuple[Side, float | None]] = {}
        for precision, path in converted.items():
            roofline = bandwidth / bytes_per_token(path)
            sides[f"{_OURS} {precision}"] = stack.enter_context(ours(path)), roofline
            hasty = stack.enter_context(ours(path, rejoin_seconds=0))
            sides[f"no wait {precision}"] = hasty, roofline
        if "int4" in converted:
            path = converted["int4"]
            roofline = bandwidth / bytes_per_token(path)
            sides["genai int4"] = stack.enter_context(genai(path)), roofline
        sides["hugging face"] = stack.enter_context(hugging_face(model_dir)), None
        if args.gguf:
            side = stack.enter_context(llama_cpp(args.gguf, args.llama_server, 16))
            sides["llama.cpp"] = side, None
        for prompt in args.prompts:
            for users in args.users:
                load = Load(prompt, users, args.seconds)
                for name, (side, roofline) in sides.items():
                    if not name.startswith(_OURS) and (prompt, users) not in args.others:
                        continue
                    rows.append(side(load).row(label, name, load, roofline))
                    say(line(rows[-1], rows))
    return rows


def line(row: Row, rows: Sequence[Row]) -> str:
    """A row of the table, with its ratios to one user of the same side."""
    one = next(r for r in rows if (r.model, r.side, r.prompt) == (row.model, row.side, row.prompt))
    share = f"{row.roofline:.0%}" if row.roofline else ""
    return (
        f"| {row.model} | {row.side} | {row.prompt} | {row.users} | {row.tokens_per_second:.0f} "
        f"| {row.tokens_per_second / one.tokens_per_second:.1f} | {row.first_p50:.0f} "
        f"| {row.first_p95:.0f} | {row.first_p50 / one.first_p50:.1f} | {row.cpu_ms:.1f} "
        f"| {share} |"
    )


HEAD = (
    "| model | side | prompt | users | tokens/s | × one | first token p50 ms | p95 | p50 × one "
    "| CPU ms/token | of roofline |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def ratios(rows: Sequence[Row]) -> list[str]:
    """Ours against every other side that had the same load."""
    found = []
    by = {(r.model, r.prompt, r.users, r.side): r for r in rows}
    for row in rows:
        for side in ("genai int4", "hugging face", "llama.cpp"):
            other = by.get((row.model, row.prompt, row.users, side))
            if row.side.startswith(_OURS) and other:
                speed = row.tokens_per_second / other.tokens_per_second
                found.append(
                    f"{row.model}, {row.prompt}, {row.users} users: {row.side} / {side}: "
                    f"{speed:.2f} × the tokens/s, first token {row.first_p50 / other.first_p50:.2f}"
                )
    return found


def memory_flat(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Resident megabytes after each tenth of `--requests`, 16 users at once."""
    model_dir = args.model or random_model(args.shapes[0], folder / "flat")
    precision = args.precisions[0]
    export_onnx(model_dir, folder / "flat-onnx", precision)
    sizes: list[float] = []
    batcher = Batcher(onnxruntime.step_model(folder / "flat-onnx"), slots=16)

    async def ask(number: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            ids = Load("short", 1, 0).ids(number)[: 4 + number % 20]
            sampler = Sampler(Sampling(temperature=0.0))
            job = Job(ids, 2 + number % 5, sampler, frozenset())
            batcher.submit(job)
            while await job.next() is not None:
                pass

    async def main() -> None:
        gate = asyncio.Semaphore(16)
        step = max(1, args.requests // 10)
        for start in range(0, args.requests, step):
            numbers = range(start, min(start + step, args.requests))
            await asyncio.gather(*(ask(number, gate) for number in numbers))
            sizes.append(psutil.Process().memory_info().rss / 2**20)
            say(f"{numbers.stop:>7} requests: {sizes[-1]:.1f} MiB")

    asyncio.run(main())
    batcher.close()
    say(f"from the first tenth to the last: {sizes[-1] - sizes[0]:+.1f} MiB")
    return {"rss_mib": sizes}


def say(text: str) -> None:
    """Progress and table; standard error where standard output is JSON alone."""
    print(text, flush=True, file=sys.stderr if _QUIET else sys.stdout)


_QUIET = False


def main() -> None:
    """Measure, print the table and one line of JSON."""
    global _QUIET
    args = _arguments()
    _QUIET = args.output == "json"
    began = time.perf_counter()
    quiet_libraries()
    say(machine())
    result: dict[str, Any]
    with tempfile.TemporaryDirectory(prefix="phi3-serving-") as name:
        if args.requests:
            result = dict(memory_flat(args, Path(name)))
        else:
            if not args.gguf:
                say("llama.cpp is left out: it needs --gguf FILE, and xllamacpp or --llama-server")
            say(HEAD)
            rows, rates = compare(args, Path(name))
            for text in ratios(rows):
                say(text)
            result = {**rates, "rows": [asdict(row) for row in rows]}
    say(
        f"the whole run took {time.perf_counter() - began:.0f} s; load now {os.getloadavg()[0]:.1f}"
    )
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape, in a minute at most")
    parser.add_argument("--shapes", type=words, default=["small", "half"])
    parser.add_argument("--model", type=Path, help="a model folder in place of random weights")
    parser.add_argument("--precisions", type=words, default=["int4", "int8"])
    parser.add_argument("--users", type=lambda t: [int(n) for n in words(t)])
    parser.add_argument("--seconds", type=float, help="for each measurement (4)")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--llama-server", help="its server; otherwise that of xllamacpp")
    parser.add_argument("--requests", type=int, help="only show resident memory over so many")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    if args.quick:
        args.shapes = ["tiny"]
    args.users = args.users or ([1, 4] if args.quick else [1, 2, 4, 8, 16])
    args.seconds = args.seconds or (0.2 if args.quick else 4.0)
    args.prompts = ["short"] if args.quick else ["short", "long"]
    # The others are slow; some loads show where they stand.
    args.others = {("short", 1), ("short", args.users[-1]), ("short", 8), ("long", 1)}
    return args


if __name__ == "__main__":
    main()
