"""A Phi-3 with a LoRA adapter, run over conversations without padding: the fast way on a CPU.

Computes what the model's own forward pass does. The tokens of a batch are concatenated in
one matrix; only attention knows where a conversation begins. Writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import (
    dropout,
    embedding,
    linear,
    pad,
    scaled_dot_product_attention,
    silu,
)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .audit import IGNORED
from .runtime import SCORED_AT_ONCE, TOKENS_AT_ONCE

# The tokens of a batch without its padding: which are computed, and which attend to each other.
# Reads padded batches as collators make them (padding on the right); writes nothing.

# Tokens come in multiples of this: oneDNN compiles each product of bfloat16 for its number of rows
# and keeps it. Every other length was a new one: 16 MB more each step of the 135 M model.
ROUND = 64
# Conversations share a block of attention while the shortest has this share of the longest's
# tokens: a block of its own costs about as much as a tenth of a batch's attention.
_ALIKE = 0.75


@dataclass(frozen=True)
class Block:
    """Conversations of similar length, one after the other from token `start` to `end`.

    `spread` gives for each of their padded places (conversations × width) the token that stands
    there, counted from `start`, and `gathered` the padded place of each token; both None where
    all are of one length.
    """

    start: int
    end: int
    width: int
    spread: Tensor | None
    gathered: Tensor | None


@dataclass(frozen=True)
class Layout:
    """T tokens in sequence, conversation by conversation, the longest first.

    `taken` gives the place of each in the flattened batch, `positions` its place in its
    conversation, `wanted` the token that it should guess (IGNORED: none). `longest` is the number
    of tokens of the batch's longest conversation.
    """

    taken: Tensor
    positions: Tensor
    wanted: Tensor
    blocks: tuple[Block, ...]
    longest: int


def layouts(
    labels: Tensor, positions: Tensor | None = None, at_once: int = TOKENS_AT_ONCE
) -> list[Layout]:
    """The layouts of a batch with these labels (rows × width), in parts of `at_once` tokens.

    A conversation begins with each row or, where `positions` (rows × width) are given, wherever
    they are 0; it is never divided. After its last trained token nothing is computed: causal
    attention never uses it.
    """
    wanted = torch.full_like(labels, IGNORED)
    wanted[:, :-1] = labels[:, 1:]
    wanted = wanted.flatten()
    width = labels.shape[1]
    if positions is None:
        borders = list(range(0, labels.numel() + 1, width))
    else:
        begins = positions == 0
        begins[:, 0] = True
        borders = [*begins.flatten().nonzero().squeeze(-1).tolist(), labels.numel()]
    learnt = (wanted != IGNORED).nonzero().squeeze(-1)
    before = torch.searchsorted(learnt, torch.tensor(borders)).tolist()  # learnt ones, by border
    places = [
        (start, int(learnt[after - 1]) + 1 - start)
        for start, (earlier, after) in zip(borders, pairwise(before), strict=False)
        if after > earlier
    ]
    ordered = sorted(places or [(0, 1)], key=lambda place: -place[1])
    parts: list[list[tuple[int, int]]] = [[]]
    for place in ordered:
        if parts[-1] and sum(size for _, size in parts[-1]) + place[1] > at_once:
            parts.append([])
        parts[-1].append(place)
    return [_arranged(part, wanted, longest=ordered[0][1]) for part in parts]


def _arranged(places: Sequence[tuple[int, int]], wanted: Tensor, *, longest: int) -> Layout:
    """The layout of conversations with these first places and lengths, the longest first."""
    sizes = [size for _, size in places]
    taken = torch.cat([torch.arange(start, start + size) for start, size in places])
    guessed = wanted[taken]
    if filling := -len(taken) % ROUND:
        # The batch's first token again and again: one more conversation, nothing of it learnt.
        sizes.append(filling)
        taken = torch.cat([taken, taken.new_zeros(filling)])
        guessed = torch.cat([guessed, guessed.new_full((filling,), IGNORED)])
    positions = torch.cat([torch.arange(size) for size in sizes])
    # Falling lengths in groups of like ones: the longest of each comes first.
    groups: list[list[int]] = []
    for size in sizes:
        if groups and _ALIKE * groups[-1][0] <= size <= groups[-1][0]:
            groups[-1].append(size)
        else:
            groups.append([size])
    blocks, start = [], 0
    for lengths in groups:
        width, end = lengths[0], start + sum(lengths)
        if end - start == width * len(lengths):
            blocks.append(Block(start, end, width, None, None))
        else:
            # Padding repeats a conversation's last token: causal attention never looks at it.
            borders = pairwise([0, *accumulate(lengths)])
            spread = [torch.arange(a, a + width).clamp(max=b - 1) for a, b in borders]
            gathered = [torch.arange(n) + i * width for i, n in enumerate(lengths)]
            blocks.append(Block(start, end, width, torch.cat(spread), torch.cat(gathered)))
        start = end
    return Layout(taken, positions, guessed, tuple(blocks), longest)


# The steps of a decoder layer that torch takes slowly on a CPU, with gradients written by hand.
# All work on rows of tokens (T × width), whatever conversation each token belongs to. Products are
# made in the number type of the frozen weights; sums, norms and what learns stay in float32.


@dataclass(frozen=True)
class Projection:
    """A frozen matrix (outputs × inputs), and its adapter where it has one: a (r × inputs) and b.

    `scale` is alpha / r; `dropout` the share of inputs that the adapter does not see in training.
    """

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    def __call__(self, rows: Tensor) -> Tensor:
        """T × inputs to T × outputs, both in the weight's number type."""
        if self.a is None or self.b is None:
            return _apply(_Frozen, rows, self.weight)
        seen = dropout(rows, self.dropout) if self.dropout else None
        return _apply(_Adapted, rows, seen, self.weight, self.a, self.b, self.scale)


def _apply(function: Any, *inputs: Any) -> Tensor:
    result: Tensor = function.apply(*inputs)
    return result


class _Frozen(Function):
    """rows @ weight.T, of which only the rows have a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None


class _Adapted(Function):
    """rows @ weight.T + scale · seen @ a.T @ b.T; no gradient of the weight is ever made.

    autograd would add two whole T × outputs tensors and make as many again on the way back; here
    the adapter's products are added in place by the matrix product itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        seen: Tensor | None,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        inputs = rows if seen is None else seen
        small_a, small_b = a.to(weight.dtype), (b * scale).to(weight.dtype)
        inner = linear(inputs, small_a)
        ctx.save_for_backward(inputs, inner, weight, small_a, small_b)
        ctx.scale, ctx.alone = scale, seen is None
        return linear(rows, weight).addmm_(inner, small_b.t())

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor, Tensor, None]:
        inputs, inner, weight, a, b = ctx.saved_tensors
        # y = x W' + s (x A') B', and b is s B: d(x A') = dy b, dA = d(x A')' x, dB = s dy' (x A').
        gradient_inner = gradient @ b
        gradient_a = (gradient_inner.t() @ inputs).float()
        gradient_b = (inner.t() @ gradient).t().float().mul_(ctx.scale)
        gradient_rows = gradient @ weight if ctx.needs_input_grad[0] else None
        gradient_seen = None
        if ctx.alone and gradient_rows is not None:
            gradient_rows.addmm_(gradient_inner, a)
        elif ctx.needs_input_grad[1]:
            gradient_seen = gradient_inner @ a
        return gradient_rows, gradient_seen, None, gradient_a, gradient_b, None


class _Norm(Function):
    """Root mean square norm of float32 rows, after something was added to them."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        added: Tensor | None,
        weight: Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        total = rows if added is None else rows + added
        length = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
        rate = length.square_().div_(total.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(total, weight, rate)
        ctx.added = None if added is None else added.dtype
        return total, (total * rate).mul_(weight).to(dtype)

    @staticmethod
    def backward(
        ctx: Any, of_total: Tensor, of_normed: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        # y = w x r with r = (mean(x²) + ε)^-½, so dx = r g - x r³ (g · x) / n for g = w dy.
        rows, weight, rate = ctx.saved_tensors
        inner = of_normed * weight.float()
        along = torch.linalg.vecdot(inner, rows).unsqueeze_(-1)
        along.mul_(rate).mul_(rate).mul_(rate).div_(-rows.shape[-1])
        inner.mul_(rate).addcmul_(rows, along).add_(of_total)
        return inner, None if ctx.added is None else inner.to(ctx.added), None, None, None


def add_and_norm(
    rows: Tensor, added: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`rows` (T × h, float32) plus `added`, and the root mean square norm of that in `dtype`.

    The norm's weight is frozen. One function for both: their gradients are summed in place.
    """
    function: Any = _Norm
    both: tuple[Tensor, Tensor] = function.apply(rows, added, weight, epsilon, dtype)
    return both


class _Turn(Function):
    """Rotary positions in float32, of rows in any number type."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turned, ctx.dtype = turned, rows.dtype
        result = rows.to(torch.float32, copy=True)
        _turn(result[:, :turned], cos, sin, 1)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        result = gradient.clone()
        _turn(result[:, : ctx.turned], cos, sin, -1)  # a rotation's transpose turns back
        return result.to(ctx.dtype), None, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, way: int) -> None:
    # Phi-3 pairs number i of a head with number i + half, not with its neighbour.
    half = cos.shape[-1]
    left, right = states[..., :half], states[..., half : 2 * half]
    first = (left * cos).addcmul_(right, sin, value=-way)
    right.mul_(cos).addcmul_(left, sin, value=way)
    left.copy_(first)


def turn(rows: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """T × heads × size, in float32, the first `turned` heads turned by their positions.

    `cos` and `sin` are T × 1 × n for the first 2n numbers of a head; the others stay.
    """
    return _apply(_Turn, rows, cos, sin, turned)


class _Spread(Function):
    """Rows put at padded places; a row put twice gets no gradient the second time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, spread: Tensor, gathered: Tensor) -> Tensor:
        ctx.save_for_backward(gathered)
        return rows.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (gathered,) = ctx.saved_tensors
        return gradient.index_select(0, gathered), None, None


def spread_out(rows: Tensor, spread: Tensor, gathered: Tensor) -> Tensor:
    """`rows[spread]`, where the places other than `gathered` have no effect on the result."""
    return _apply(_Spread, rows, spread, gathered)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gathered: Tensor) -> Tensor:
        ctx.save_for_backward(gathered)
        ctx.count = len(rows)
        return rows.index_select(0, gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gathered,) = ctx.saved_tensors
        result = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return result.index_copy_(0, gathered, gradient), None


def gather(rows: Tensor, gathered: Tensor) -> Tensor:
    """`rows[gathered]`, which names no row twice."""
    return _apply(_Gather, rows, gathered)


class _GatedSilu(Function):
    """silu(gate) · up of rows that hold gate and up side by side."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        gate, up = rows.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        gate, up = rows.chunk(2, dim=-1)
        result = torch.empty_like(rows)
        of_gate, of_up = result.chunk(2, dim=-1)
        # Written into the halves of one tensor: joining two would copy both.
        torch.mul(gradient, silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result


def gated_silu(rows: Tensor) -> Tensor:
    """T × 2i (gate, then up) to T × i."""
    return _apply(_GatedSilu, rows)


class _Surprise(Function):
    """Summed cross entropy of rows against a frozen output matrix; gradient and loss in one go.

    The scores of the vocabulary are the largest tensor of a small model's step. Here each piece of
    them is used for the loss and for the gradient at once, and never kept.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        real = len(rows)  # learnt tokens: any number, so they are padded as ROUND explains
        rows, wanted = pad(rows, (0, 0, 0, -real % ROUND)), pad(wanted, (0, -real % ROUND))
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for start in range(0, len(rows), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            here = wanted[part].unsqueeze(-1)
            scores = torch.log_softmax(linear(rows[part], weight), -1, dtype=torch.float32)
            total -= scores.gather(-1, here)[: real - start].sum()
            if gradient is not None:
                # Of cross entropy by the scores: their softmax, less 1 at the right token.
                scores.exp_().scatter_add_(-1, here, -torch.ones_like(here, dtype=scores.dtype))
                torch.mm(scores.to(weight.dtype), weight, out=gradient[part])
        ctx.gradient = None if gradient is None else gradient[:real]
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * gradient.to(ctx.gradient.dtype), None, None


def surprise(rows: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """Summed cross entropy (float32) of the tokens `wanted` (T) after `rows` (T × h)."""
    return _apply(_Surprise, rows, weight, wanted)


@dataclass(frozen=True)
class _Layer:
    input_norm: Any
    qkv: Projection
    out: Projection
    mlp_norm: Any
    gate_up: Projection
    down: Projection


class DensePhi3:
    """The forward pass of one model; `of` says whether there is one for it."""

    def __init__(self, model: PreTrainedModel, *, checkpointing: bool) -> None:
        self._plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._checkpointing = checkpointing

    @classmethod
    def of(cls, model: PreTrainedModel, *, checkpointing: bool = False) -> DensePhi3 | None:
        """None for models and adapters that have to go their libraries' own way.

        Computed here is a Phi-3 whose own weights are frozen, with plain LoRA on its layers'
        matrices at most.
        """
        from peft.tuners.lora import Linear
        from transformers import Phi3ForCausalLM

        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        if type(plain) is not Phi3ForCausalLM:
            return None
        config = plain.config
        weights = plain.named_parameters()
        if not (
            config._attn_implementation == "sdpa"
            and config.hidden_act == "silu"
            and not (config.attention_dropout or config.resid_pdrop or config.embd_pdrop)
            and type(plain.lm_head) is nn.Linear
            and type(plain.model.embed_tokens) is nn.Embedding
            and not any(w.requires_grad for name, w in weights if "lora_" not in name)
        ):
            return None
        for layer in plain.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for module in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
                if type(module) is nn.Linear:
                    continue
                if type(module) is not Linear or module.merged or module.disable_adapters:
                    return None
                # peft's variants (DoRA and others) compute more than base + scale · B · A.
                if len(module.active_adapters) != 1 or module.lora_variant:
                    return None
        return cls(model, checkpointing=checkpointing)

    def loss(self, batch: Layout, ids: Tensor) -> Tensor:
        """Summed cross entropy (float32) of a part of the batch with these ids (rows × width)."""
        body, head = self._plain.model, self._plain.lm_head.weight
        hidden, added = self._layers(batch, ids.flatten()[batch.taken])
        learnt = (batch.wanted != IGNORED).nonzero().squeeze(-1)
        _, rows = _normed(hidden[learnt], added[learnt], body.norm, head.dtype)
        return surprise(rows, head, batch.wanted[learnt])

    def _layers(self, batch: Layout, ids: Tensor) -> tuple[Tensor, Tensor]:
        """T × h, float32, in front of the last norm: all but what the last layer adds, and that."""
        body = self._plain.model
        hidden = embedding(ids, body.embed_tokens.weight).float()
        # NEFTune's noise where the trainer asks for it, as transformers' hook adds it: uniform
        # within alpha / sqrt(length x width) of each number, https://arxiv.org/abs/2310.05914.
        alpha = getattr(body.embed_tokens, "neftune_noise_alpha", None)
        if alpha is not None and body.embed_tokens.training:
            reach = float(alpha) / math.sqrt(batch.longest * hidden.shape[1])
            hidden = hidden + torch.empty_like(hidden).uniform_(-reach, reach)
        added: Any = None  # what the layer before adds
        with torch.no_grad():
            # transformers has each number of a table twice, for its own formula; once suffices.
            cos, sin = body.rotary_emb(hidden, batch.positions.unsqueeze(0))
            half = cos.shape[-1] // 2
            turns = cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            parts = _Layer(
                layer.input_layernorm,
                _projection(attention.qkv_proj),
                _projection(attention.o_proj),
                layer.post_attention_layernorm,
                _projection(mlp.gate_up_proj),
                _projection(mlp.down_proj),
            )
            if self._checkpointing and torch.is_grad_enabled():
                hidden, added = checkpoint(
                    self._layer, hidden, added, parts, turns, batch, use_reentrant=False
                )
            else:
                hidden, added = self._layer(hidden, added, parts, turns, batch)
        return hidden, added

    def _layer(
        self,
        hidden: Tensor,
        added: Tensor | None,
        parts: _Layer,
        turns: tuple[Tensor, Tensor],
        batch: Layout,
    ) -> tuple[Tensor, Tensor]:
        dtype = parts.qkv.weight.dtype
        hidden, seen = _normed(hidden, added, parts.input_norm, dtype)
        added = parts.out(self._attention(parts.qkv(seen), turns, batch).to(dtype))
        hidden, seen = _normed(hidden, added, parts.mlp_norm, dtype)
        return hidden, parts.down(gated_silu(parts.gate_up(seen)))

    def _attention(self, qkv: Tensor, turns: tuple[Tensor, Tensor], batch: Layout) -> Tensor:
        """T × (queries, keys, values) to T × values of all heads, float32.

        A method of its own, so that what is not saved for the gradient is freed when it ends.
        """
        config = self._plain.config
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        # float32: the backward pass of torch's attention is five times slower in bfloat16.
        states = turn(qkv.view(len(qkv), heads + 2 * shared, -1), *turns, heads + shared)
        window = config.sliding_window
        parts = []
        for block in batch.blocks:
            part = states[block.start : block.end]
            if block.spread is not None and block.gathered is not None:
                part = spread_out(part, block.spread, block.gathered)
            split = part.view(-1, block.width, *part.shape[1:]).transpose(1, 2)
            q, k, v = torch.split(split, [heads, shared, shared], dim=1)
            # Causal, and to the last `window` tokens at most.
            band = None
            if window is not None and block.width > window:
                band = torch.ones(block.width, block.width, dtype=torch.bool)
                band = band.tril().triu(1 - window)
            mixed = scaled_dot_product_attention(
                q, k, v, attn_mask=band, is_causal=band is None, enable_gqa=heads != shared
            )
            rows = mixed.transpose(1, 2).reshape(-1, heads * part.shape[-1])
            parts.append(rows if block.gathered is None else gather(rows, block.gathered))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _normed(
    hidden: Tensor, added: Tensor | None, norm: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return add_and_norm(hidden, added, norm.weight, norm.variance_epsilon, dtype)


def _projection(module: Any) -> Projection:
    if isinstance(module, nn.Linear):
        return Projection(module.weight)
    (name,) = module.active_adapters
    drop = module.lora_dropout[name]
    return Projection(
        module.base_layer.weight,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
        drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0,
    )
