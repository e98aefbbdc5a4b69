"""The steps of a decoder layer that torch takes slowly on a CPU, with gradients written by hand.

All work on rows of tokens (T × width), whatever conversation each token belongs to. Products are
made in the number type of the frozen weights; sums, norms and what learns stay in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import dropout, linear, silu

# Rows of the vocabulary's scores at once: 128 × 49,152 float32 are 25 MB, whatever the batch.
_SCORED_AT_ONCE = 128


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
        _turn(result[:, : ctx.turned], cos, sin, -1)
        return result.to(ctx.dtype), None, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, way: int) -> None:
    half = cos.shape[-1]
    one, two = states[..., :half], states[..., half : 2 * half]
    first = (one * cos).addcmul_(two, sin, value=-way)
    two.mul_(cos).addcmul_(one, sin, value=way)
    one.copy_(first)


def turn(rows: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """T × heads × size, in float32, the first `turned` heads turned by their positions.

    `cos` and `sin` are T × 1 × n for the first 2n numbers of a head; the others stay.
    """
    return _apply(_Turn, rows, cos, sin, turned)


class _Spread(Function):
    """Rows put at padded places; what stands there twice gets no gradient the second time."""

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
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for start in range(0, len(rows), _SCORED_AT_ONCE):
            part = slice(start, start + _SCORED_AT_ONCE)
            here = wanted[part].unsqueeze(-1)
            scores = torch.log_softmax(linear(rows[part], weight), -1, dtype=torch.float32)
            total -= scores.gather(-1, here).sum()
            if gradient is not None:
                scores.exp_().scatter_add_(-1, here, -torch.ones_like(here, dtype=scores.dtype))
                torch.mm(scores.to(weight.dtype), weight, out=gradient[part])
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * gradient.to(ctx.gradient.dtype), None, None


def surprise(rows: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """Summed cross entropy (float32) of the tokens `wanted` (T) after `rows` (T × h)."""
    return _apply(_Surprise, rows, weight, wanted)
