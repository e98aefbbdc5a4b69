"""Predicts what evaluation, saving and serving hold, from the sizes of the model alone.

Reads and writes nothing. The evaluation step is planned as well because it is where trainings
die after hours: it has a cache and scores of the whole vocabulary that training never had.
"""

from __future__ import annotations

from ..finetune.runtime import wastes_heap
from .model import ModelShape
from .training import FLOAT32, Phase, Work, optimiser_bytes, weight_bytes

# evaluate/answers.py runs at most this many tokens at once (but at least one row).
TOKENS_PER_PASS = 4096
# ONNX Runtime's 4 bits: half a byte, a float32 scale and a 4-bit zero point for 32 weights each.
_ONNX_FOUR_BIT = 0.5 + (FLOAT32 + 0.5) / 32

# Bytes that the ONNX builder holds for each weight, in addition to files that the OS can drop:
# measured on random models of 33 and 116 M weights.
# int8 goes through float32, then a matrix at a time.
_CONVERTING = {"fp32": 1.5, "int8": 1.5, "int4": 6.5}


def save_phase(shape: ModelShape, work: Work) -> Phase:
    """Merging and writing the model, with the optimiser still there.

    Matrices are merged one by one; then the weights are written from where they are. DoRA's
    merged matrices keep the unmerged ones alive, as peft builds them.
    """
    largest = max(linear.weights for linear in shape.linears)
    copies = (work.merged or work.compute) * max(largest, shape.vocab * shape.hidden)
    copies += work.compute * shape.linear_weights if work.method == "dora" else 0
    weights = weight_bytes(shape, work)
    if work.merged:  # into weights of full precision; a CPU still holds those it learnt over
        held = 0 if work.method == "qlora" else weights
        weights = held + work.merged * shape.parameters
    parts = {
        "weights": weights,
        "optimiser": optimiser_bytes(shape, work),
        "working copies": copies,
    }
    return Phase("save", parts)


def evaluate_phase(
    shape: ModelShape, work: Work, *, at_once: int, new_tokens: int, prompt: int | None = None
) -> Phase:
    """The higher one of both halves of evaluation; base and tuned model follow one another.

    `work.tokens` is the longest conversation that is scored, `prompt` the longest one that is
    asked (None: as long). Asking: the key/value cache of `at_once` conversations, each as long as
    that prompt and its answer, and one layer of it three times while a conversation joins or
    leaves. Scoring: the vocabulary's scores of 4,096 tokens as computed, in float32, and as
    logarithms.
    """
    weights = {"weights": work.compute * shape.parameters}
    prompt = min(work.tokens if prompt is None else prompt, shape.context)
    length = min(shape.context, prompt + new_tokens)
    cache = at_once * length * shape.kv_per_token * work.compute
    asking = {
        "key/value cache": cache,
        # While one layer is computed and nothing is kept, a token needs gate, up and more.
        "working copies": 3 * cache // shape.layers
        + prompt * work.compute * (4 * shape.intermediate + 2 * shape.hidden),
    }
    positions = max(TOKENS_PER_PASS, work.tokens)
    scored = int(positions * work.learnt)
    scores = positions * shape.vocab * work.compute
    scores += scored * shape.vocab * (work.compute + FLOAT32)  # the marked ones, and logarithms
    scores += scored * shape.vocab * FLOAT32 if work.compute < FLOAT32 else 0
    scoring = {
        "vocabulary scores": scores,
        "working copies": positions * shape.hidden * work.compute,
    }
    higher = max(asking, scoring, key=lambda parts: sum(parts.values()))
    if work.device == "cpu" and wastes_heap(shape.parameters):
        higher["heap"] = sum(higher.values()) // 2  # see training.heap_bytes
    return Phase("evaluate", {**weights, **higher})


def serve_phase(shape: ModelShape, precision: str, engine: str, compute: int, tokens: int) -> Phase:
    """The endpoint with one conversation of this many tokens."""
    weights = served_weights(shape, precision, engine, compute)
    row = row_bytes(shape, engine, compute, tokens)
    return Phase("serve", {"weights": weights, "key/value cache": row})


def convert_phase(shape: ModelShape, precision: str) -> Phase:
    """Converting the tuned model for the engine `onnxruntime`."""
    return Phase("convert", {"weights": int(_CONVERTING[precision] * shape.parameters)})


def served_weights(shape: ModelShape, precision: str, engine: str, compute: int) -> int:
    """The weights as the engine holds them.

    Its 4 bits leave the embedding as it is, unless it is the output matrix as well: one matrix
    in the file, and one in memory for each use. Measured: 2.0 times the matrix in float32, 2.3
    times in 4 bits.
    """
    if engine != "onnxruntime":
        return compute * shape.parameters
    head = shape.vocab * shape.hidden
    if precision == "fp32":
        return FLOAT32 * (shape.parameters + (head if shape.tied else 0))
    if precision == "int8":  # matrices and embedding alike, and the matrices packed
        return shape.linear_weights + 2 * head
    if shape.tied:
        return int(_ONNX_FOUR_BIT * (shape.linear_weights + 2.3 * head))
    return int(_ONNX_FOUR_BIT * (shape.linear_weights + head)) + FLOAT32 * head


def row_bytes(shape: ModelShape, engine: str, compute: int, tokens: int) -> int:
    """The cache of one conversation of this many tokens."""
    size = FLOAT32 if engine == "onnxruntime" else compute
    return tokens * shape.kv_per_token * size
