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
    """Root mean square norm of float32 rows, given in another number type; its weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        rate = length.square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(rows, weight, rate)
        normed: Tensor = (rows * rate).mul_(weight).to(dtype)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rows, weight, rate = ctx.saved_tensors
        inner = gradient * weight.float()
        along = torch.linalg.vecdot(inner, rows).unsqueeze_(-1)
        along.mul_(rate).mul_(rate).mul_(rate).div_(-rows.shape[-1])
        return inner.mul_(rate).addcmul_(rows, along), None, None, None


def norm(rows: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """The root mean square norm of float32 rows times a frozen weight, in `dtype`."""
    return _apply(_Norm, rows, weight, epsilon, dtype)


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
