"""Predicts what one training step holds, term by term, from the sizes of the model alone.

Reads and writes nothing. Every formula says what it counts; docs/memory.md explains them, and
benchmarks/memory_plan.py compares them with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..finetune.runtime import (
    BYTES,
    SCORED_AT_ONCE,
    TOKENS_AT_ONCE,
    Precision,
    choose_precision,
    wastes_heap,
)
from ..recipe import Recipe
from .model import Device, Kind, ModelShape
from .rows import RowSizes

Method = Literal["full", "lora", "dora", "qlora"]
Parts = Mapping[str, int]

FLOAT32 = 4  # bytes of a number
HALF = 2
# AdamW keeps two moments for each weight that learns.
_MOMENTS = 2
# 4-bit normal floats: half a byte, one 8-bit constant for each 64 weights, and one float32 for
# each 256 of those (double quantisation).
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
# TRL's loss scores at most this many tokens by this many vocabulary entries at a time.
_TILE_TOKENS, _TILE_WORDS = 4096, 32768


@dataclass(frozen=True)
class Phase:
    """What one phase holds at its peak: bytes by what they are for."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """What is trained, and how: the recipe's settings that decide about memory."""

    method: Method
    device: Kind
    compute: int  # bytes of a number in matrices' products
    batch: int
    accumulation: int
    tokens: int  # of the longest row
    checkpointing: bool = False
    attention: str = "sdpa"
    lora_r: int = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    packing: bool = False
    own_loss: bool = False
    processes: int = 1
    float16: bool = False  # computed in float16, whose small gradients must be scaled
    dense: bool = False  # by finetune/dense.py: no padding, gradients by hand
    merged: int = 0  # bytes of a number of weights loaded again to merge into; 0: none are
    learnt: float = 1.0  # share of the batch's tokens that are learnt; 1 is the most

    @property
    def full(self) -> bool:
        """Whether all weights learn, without an adapter."""
        return self.method == "full"

    @property
    def learning_bytes(self) -> int:
        """Of a weight that learns: float32 (autocast computes in less), QLoRA's where it can."""
        return HALF if self.method == "qlora" and not self.float16 else FLOAT32

    @property
    def stream_bytes(self) -> int:
        """Of a number between the layers: as the embedding gives it."""
        return FLOAT32 if self.full else self.compute

    @property
    def positions(self) -> int:
        """Tokens computed at once: of a batch, padding included, or of a part in dense.py."""
        whole = self.batch * self.tokens
        return min(whole, max(TOKENS_AT_ONCE, self.tokens)) if self.dense else whole

    @property
    def short_loss(self) -> bool:
        """Whether the vocabulary is scored at once, as finetune/trainer.py does on a CPU."""
        alone = self.processes == 1 and not self.own_loss
        return self.dense or (self.device == "cpu" and self.compute == FLOAT32 and alone)

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask of its own: each layer then keeps a copy of it."""
        return self.packing or (self.batch > 1 and not self.short_loss)


def work_of(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> Work:
    """The work that a recipe means on a device, for rows of such sizes."""
    settings = recipe.finetune
    limit = min(recipe.data.max_length, shape.context)
    # Rows are batched by length, so the longest ones meet; packed ones are nearly as long as they
    # may be. A small set makes fewer rows than a batch has room for.
    size = settings.per_device_train_batch_size
    if settings.packing:
        total = limit * size if rows.total is None else rows.total
        batch, tokens = min(size, max(1, -(-total // limit))), min(limit, max(total, 1))
        learnt = rows.share
    else:
        batch, tokens = min(size, rows.rows or size), max(1, min(rows.longest, limit))
        learnt = min(1.0, rows.learnt / tokens)
    # finetune/dense.py takes a Phi-3 with LoRA, trained by one process of a CPU.
    alone = settings.num_processes == 1 and settings.loss is None
    plain = shape.fused and recipe.model.attn_implementation in (None, "sdpa")
    dense = device.kind == "cpu" and settings.method == "lora" and alone and plain
    precision = _precision(recipe, device, shape)
    dtype, frozen = precision.dtype, precision.frozen
    return Work(
        method=settings.method,
        device=device.kind,
        compute=BYTES[frozen],
        batch=batch,
        accumulation=settings.gradient_accumulation_steps,
        tokens=tokens,
        checkpointing=settings.gradient_checkpointing,
        attention=recipe.model.attn_implementation or "sdpa",
        lora_r=settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        packing=settings.packing,
        own_loss=settings.loss is not None,
        processes=settings.num_processes,
        float16=dtype == "float16",
        dense=dense,
        merged=BYTES[dtype] if frozen != dtype or settings.method == "qlora" else 0,
        learnt=learnt,
    )


def _precision(recipe: Recipe, device: Device, shape: ModelShape | None = None) -> Precision:
    """The training's number types on the device; a CPU that is not here rounds nothing."""
    return choose_precision(
        recipe,
        device.kind,
        has_bfloat16=device.bfloat16,
        parameters=shape.parameters if shape else 0,
        model_type="phi3" if shape and shape.fused else "",
        flags=None if device.is_here else frozenset(),
    )


def compute_bytes(recipe: Recipe, device: Device) -> int:
    """Bytes of a number that training on the device computes with."""
    return BYTES[_precision(recipe, device).dtype]


def step_phase(shape: ModelShape, work: Work) -> Phase:
    """The peak of a training step, from the second one on (the first has no moments yet).

    Weights and moments are always there. In addition a step passes three peaks:
      the loss:      all kept activations and the scores of the vocabulary
      the last layer's backward pass: all kept activations, one layer, its gradients
      the first layer's backward pass: one layer, its gradients, and those of all weights
    Gradients of weights grow as activations are given back, so nothing between is higher. They
    are there from the start when they are accumulated over several batches.
    """
    always = {
        "weights": weight_bytes(shape, work),
        "adapter": _adapter_weights(shape, work) * work.learning_bytes,
        "optimiser": optimiser_bytes(shape, work),
        "working copies": working_copies(shape, work),
    }
    gradients = gradient_bytes(shape, work)
    if work.processes > 1:  # what the processes exchange is held in addition to the gradients
        always["exchange"] = gradients
    before = gradients if work.accumulation > 1 else 0
    held, layer = activation_bytes(shape, work), layer_bytes(shape, work)
    backward = backward_bytes(shape, work)
    summits = (
        {"gradients": before, "activations": held, "loss": loss_bytes(shape, work)},
        {
            # The output matrix is the first one to get its gradient.
            "gradients": max(before, FLOAT32 * shape.vocab * shape.hidden if work.full else 0),
            "activations": held + (layer if work.checkpointing else 0),
            "backward pass": backward,
        },
        {"gradients": gradients, "activations": layer, "backward pass": backward},
    )
    higher = max(summits, key=lambda parts: sum(parts.values()))
    parts = {**always, **higher, "heap": heap_bytes(shape, work)}
    return Phase("train", {name: size for name, size in parts.items() if size})


def heap_bytes(shape: ModelShape, work: Work) -> int:
    """What the C library's heap wastes on a CPU, for models that finetune/runtime.py leaves alone.

    Not derived but measured: about half of all activations and scores, checkpointing or not,
    since what it frees in small pieces is between pieces that stay.
    """
    if work.device != "cpu" or not wastes_heap(shape.parameters):
        return 0
    plain = replace(work, checkpointing=False)
    return (activation_bytes(shape, plain) + loss_bytes(shape, plain)) // 2


def weight_bytes(shape: ModelShape, work: Work) -> int:
    """The base model: float32 when all of it learns, 4-bit matrices in QLoRA, else as computed."""
    if work.method == "full":
        return FLOAT32 * shape.parameters
    if work.method == "qlora":
        return int(FOUR_BIT * shape.linear_weights) + work.compute * shape.other_weights
    return work.compute * shape.parameters


def learning_weights(shape: ModelShape, work: Work) -> int:
    """How many weights learn."""
    return shape.parameters if work.method == "full" else _adapter_weights(shape, work)


def gradient_bytes(shape: ModelShape, work: Work) -> int:
    """One number for each weight that learns, in that weight's type."""
    return learning_weights(shape, work) * work.learning_bytes


def optimiser_bytes(shape: ModelShape, work: Work) -> int:
    """AdamW's two moments of each weight that learns, in that weight's type."""
    return _MOMENTS * learning_weights(shape, work) * work.learning_bytes


def working_copies(shape: ModelShape, work: Work) -> int:
    """Copies of weights that one step makes.

    Mixed precision keeps a half-size copy of the float32 weights that learn; QLoRA unpacks one
    matrix at a time; DoRA builds one whole matrix from its adapter (float32: itself, the sum with
    the base matrix, and its square) to measure its columns.
    """
    adapted = shape.adapted(work.target_modules)
    largest = max((linear.weights for linear in shape.linears), default=0)
    size = 0
    if work.compute < FLOAT32 and work.method != "qlora" and not work.dense:
        learning = shape.linear_weights if work.method == "full" else _adapter_weights(shape, work)
        size += work.compute * learning
    if work.method == "qlora":
        size += work.compute * largest
    if work.method == "dora":
        size += 3 * FLOAT32 * max((linear.weights for linear in adapted), default=0)
    return size


def activation_bytes(shape: ModelShape, work: Work) -> int:
    """What the forward pass keeps for the backward pass, over all layers.

    With gradient checkpointing a layer keeps its input only. The last norm, in front of the
    vocabulary, always keeps its input in float32, the normed input if it learns, and its output.
    """
    layer = layer_bytes(shape, work)
    if work.dense:
        each = work.positions * shape.hidden * FLOAT32 if work.checkpointing else layer
        return shape.layers * each + work.positions * shape.hidden * FLOAT32
    ends = work.positions * shape.hidden * (2 * FLOAT32 + (FLOAT32 if work.full else 0))
    if not work.checkpointing:
        return shape.layers * layer + ends
    return shape.layers * work.positions * shape.hidden * work.stream_bytes + ends


def layer_bytes(shape: ModelShape, work: Work) -> int:
    """What autograd keeps of one decoder layer.

    For each token, with hidden size h, MLP size i, q and k, v sizes of the heads, and b bytes a
    number (as computed) or 4 (the norms count in float32):
      both norms: their input 4·h each; the normed input too where the norm's weight learns; their
        output b·h each, which the matrices after them need if those learn or have an adapter
      attention:  b·(q + 2kv) of the fused projection (v is a view of it), the rotated q and k,
        and the output b·q; with eager attention also the softmax, 4·T (and b·T) for each head
      MLP:        gate and up b·2i, silu(gate) b·i, their product b·i
    An adapter adds its r inner numbers for each matrix, dropout one noise for each input, DoRA
    the matrix's output before and after the adapter.
    """
    b, h, i = work.compute, shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if work.dense:
        # What finetune/dense.py keeps, for each token: both norms' input 4·h each and, as computed,
        # their output; q, k and v after the rotation and attention's output, 4 each, and the
        # latter as computed; gate and up b·2i, and their product b·i. Inputs of layers without
        # adapter are not stored. No mask and no repeated k and v.
        inputs = {"qkv_proj": h, "o_proj": queries, "gate_up_proj": h, "down_proj": i}
        numbers = 2 * i + sum(inputs[name] for name in _adapted_names(shape, work))
        size = b * numbers + FLOAT32 * (2 * h + 2 * queries + 2 * keys)
        return work.positions * size + _adapter_activations(shape, work)
    names = _adapted_names(shape, work)
    numbers = queries + 2 * keys + queries + keys + queries + 3 * i
    # Inputs of matrices are kept for those that learn or have an adapter: the norms' outputs feed
    # the fused projections, the MLP's product feeds down_proj.
    numbers += 2 * h if work.full or names - {"down_proj", "o_proj"} else 0
    numbers += i if work.full or "down_proj" in names else 0
    if keys < queries and (work.attention == "eager" or work.masked):
        numbers += 2 * queries  # k and v are repeated for every query head
    size = work.positions * (b * numbers + 2 * FLOAT32 * h)
    if work.full:
        size += work.positions * 2 * h * work.stream_bytes
    # What grows with the square of the rows' length.
    squares = work.batch * work.tokens**2
    if work.attention == "eager":
        # The softmax in float32, and its copy in the compute type where that is another one.
        each = FLOAT32 if b == FLOAT32 else FLOAT32 + b
        size += squares * shape.heads * each
    elif work.masked:
        size += squares * b
    return size + _adapter_activations(shape, work)


def _adapted_names(shape: ModelShape, work: Work) -> set[str]:
    """The adapted modules of one layer, by the last part of their names."""
    return {linear.name.rpartition(".")[2] for linear in shape.adapted(work.target_modules)}


def _adapter_activations(shape: ModelShape, work: Work) -> int:
    if work.full:
        return 0
    size = 0
    # Dropout keeps a mask: in the number's type on a CPU, a byte each on a GPU.
    noise = work.compute if work.device == "cpu" else 1
    for linear in shape.adapted(work.target_modules):
        size += work.compute * work.lora_r
        size += noise * linear.inputs if work.lora_dropout else 0
        size += 2 * work.compute * linear.outputs if work.method == "dora" else 0
    return work.positions * size


def loss_bytes(shape: ModelShape, work: Work) -> int:
    """The scores of the vocabulary: for small models the largest term of all.

    On a CPU (finetune/trainer.py): the learnt positions alone, three float32 copies (logarithms
    of the probabilities, their gradient, and the scores' gradient); dense.py has a piece of them at
    a time. TRL's loss on a GPU: one tile of 4,096 positions by 32,768 words, and the float32
    gradient of the last hidden states. A custom loss gets every position's scores: as
    computed, and three float32 copies.
    """
    learnt = int(work.positions * work.learnt)
    # The output matrix is the first one to get its gradient.
    head = FLOAT32 * shape.vocab * shape.hidden if work.full else 0
    if work.dense:  # piece by piece, the gradient of the states at once; nothing is kept
        pieces = SCORED_AT_ONCE * shape.vocab * (FLOAT32 + 2 * work.compute)
        return pieces + learnt * shape.hidden * (FLOAT32 + 2 * work.compute)
    if work.own_loss:
        return work.positions * shape.vocab * (work.compute + 3 * FLOAT32) + head
    if work.short_loss:
        scores = learnt * shape.vocab * FLOAT32
        return learnt * shape.hidden * FLOAT32 + max(3 * scores, scores + head)
    tile = min(learnt, _TILE_TOKENS) * _TILE_WORDS * work.compute
    if work.device != "cuda":  # no kernel there: the tile in float32, its exponentials, gradient
        tile += 3 * min(learnt, _TILE_TOKENS) * _TILE_WORDS * FLOAT32
    return tile + learnt * shape.hidden * (FLOAT32 + work.compute) + head


def backward_bytes(shape: ModelShape, work: Work) -> int:
    """What the backward pass through one MLP holds in addition to the stored activations.

    The gradients of gate, up and their joined 2i, and two of the residual stream.
    """
    if work.dense:  # gradient, silu(gate), gradient·up, and gate's and up's gradients
        return work.positions * (5 * work.compute * shape.intermediate + 2 * FLOAT32 * shape.hidden)
    mlp = 4 * work.compute * shape.intermediate + 2 * FLOAT32 * shape.hidden
    scores = 0
    if work.attention == "eager":  # gradients of the softmax and of its input
        scores = 2 * FLOAT32 * shape.heads * work.tokens
    return work.positions * max(mlp, scores)


def _adapter_weights(shape: ModelShape, work: Work) -> int:
    """r·(inputs + outputs) for each adapted matrix; DoRA adds a size for each output."""
    if work.full:
        return 0
    return shape.layers * sum(
        work.lora_r * (linear.inputs + linear.outputs)
        + (linear.outputs if work.method == "dora" else 0)
        for linear in shape.adapted(work.target_modules)
    )
