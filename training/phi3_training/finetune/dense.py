"""A Phi-3 with a LoRA adapter, run over conversations without padding: the fast way on a CPU.

Computes what the model's own forward pass does. The tokens of a batch stand behind each other in
one matrix; only attention knows where a conversation begins. Writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .audit import IGNORED
from .gradients import (
    Projection,
    add_and_norm,
    gated_silu,
    gather,
    spread_out,
    surprise,
    turn,
)
from .layout import Block, Layout


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

    def __init__(self, model: Any, *, checkpointing: bool) -> None:
        self._plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._checkpointing = checkpointing

    @classmethod
    def of(cls, model: Any, *, checkpointing: bool = False) -> DensePhi3 | None:
        """None for models and adapters that have to go their libraries' own way."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        return cls(model, checkpointing=checkpointing) if _fits(plain) else None

    def loss(self, batch: Layout, ids: Tensor) -> Tensor:
        """Summed cross entropy (float32) of a batch with these ids (rows × width)."""
        body, head = self._plain.model, self._plain.lm_head.weight
        hidden, added = self._layers(batch, ids.flatten()[batch.taken])
        learnt = (batch.wanted != IGNORED).nonzero().squeeze(-1)
        _, rows = _normed(hidden[learnt], added[learnt], body.norm, head.dtype)
        return surprise(rows, head, batch.wanted[learnt])

    def _layers(self, batch: Layout, ids: Tensor) -> tuple[Tensor, Tensor]:
        """T × h, float32, in front of the last norm: all but what the last layer adds, and that."""
        body = self._plain.model
        hidden = _noisy(embedding(ids, body.embed_tokens.weight).float(), batch, body.embed_tokens)
        added: Any = None  # what the layer before adds
        with torch.no_grad():
            cos, sin = body.rotary_emb(hidden, batch.positions.unsqueeze(0))
            half = cos.shape[-1] // 2
            turns = cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()
        for layer in body.layers:
            parts = _parts(layer)
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
        """T × (queries, keys, values) to T × values of all heads, float32."""
        config = self._plain.config
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        # float32: the backward pass of torch's attention is five times slower in bfloat16.
        states = turn(qkv.view(len(qkv), heads + 2 * shared, -1), *turns, heads + shared)
        mixed = [
            _attend(states[b.start : b.end], b, heads, shared, config.sliding_window)
            for b in batch.blocks
        ]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def _noisy(hidden: Tensor, batch: Layout, embed: Any) -> Tensor:
    """With NEFTune's noise where the trainer asks for it, as transformers' hook adds it.

    Uniform within alpha / sqrt(length x width) of each number, https://arxiv.org/abs/2310.05914.
    """
    alpha = getattr(embed, "neftune_noise_alpha", None)
    if alpha is None or not embed.training:
        return hidden
    longest = int(batch.positions.max()) + 1
    reach = float(alpha) / math.sqrt(longest * hidden.shape[1])
    return hidden + torch.empty_like(hidden).uniform_(-reach, reach)


def _normed(
    hidden: Tensor, added: Tensor | None, norm: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return add_and_norm(hidden, added, norm.weight, norm.variance_epsilon, dtype)


def _attend(states: Tensor, block: Block, heads: int, shared: int, window: int | None) -> Tensor:
    """Causal attention within each conversation of a block, to the last `window` tokens at most."""
    if block.spread is not None and block.gathered is not None:
        states = spread_out(states, block.spread, block.gathered)
    split = states.view(-1, block.width, *states.shape[1:]).transpose(1, 2)
    q, k, v = torch.split(split, [heads, shared, shared], dim=1)
    band = None
    if window is not None and block.width > window:
        band = torch.ones(block.width, block.width, dtype=torch.bool).tril().triu(1 - window)
    mixed = scaled_dot_product_attention(
        q, k, v, attn_mask=band, is_causal=band is None, enable_gqa=heads != shared
    )
    rows = mixed.transpose(1, 2).reshape(-1, heads * states.shape[-1])
    return rows if block.gathered is None else gather(rows, block.gathered)


def _parts(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm,
        _projection(attention.qkv_proj),
        _projection(attention.o_proj),
        layer.post_attention_layernorm,
        _projection(mlp.gate_up_proj),
        _projection(mlp.down_proj),
    )


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


def _fits(model: Any) -> bool:
    """A Phi-3 whose own weights are frozen, with plain LoRA on its layers' matrices at most."""
    from transformers import Phi3ForCausalLM

    if type(model) is not Phi3ForCausalLM:
        return False
    config = model.config
    frozen = not any(w.requires_grad for n, w in model.named_parameters() if "lora_" not in n)
    plain = (
        config._attn_implementation == "sdpa"
        and config.hidden_act == "silu"
        and not (config.attention_dropout or config.resid_pdrop or config.embd_pdrop)
        and type(model.lm_head) is nn.Linear
        and type(model.model.embed_tokens) is nn.Embedding
    )
    return frozen and plain and all(_is_plain(layer) for layer in model.model.layers)


def _is_plain(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    attention, mlp = layer.self_attn, layer.mlp
    for module in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
        if type(module) is nn.Linear:
            continue
        if type(module) is not Linear or module.merged or module.disable_adapters:
            return False
        if len(module.active_adapters) != 1 or module.lora_variant:
            return False
    return True
